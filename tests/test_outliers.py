"""Outputs that see ordinary values alone are as accurate as ever, whatever other pixels hold.

A kernel that transforms patches mixes pixels into outputs that do not see them. Here large values
stand in all sorts of places, and errors are taken where no output of a window sees one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from checks import over
from forcing import KERNELS, Forced, run_pass
from geometries import DTYPES, Block, dtype_name
from reference import Operands, with_layout
from torch import Tensor

# The others add up what an output sees, and nothing else.
TRANSFORMING = [f for f in KERNELS if f.kernel.startswith("winograd")]
over_blocks = over([
    Block("few", (2, 3, 20, 20), 16, padding=1),
    Block("some", (2, 16, 20, 20), 32, padding=1),
    Block("many", (2, 64, 19, 17), 32, padding=1),
    Block("wide_padding", (2, 19, 16, 18), 17, padding=2),
    Block("no_padding", (2, 33, 20, 18), 24),
])  # fmt: skip

ALL = slice(None)
PLACES = {
    # Every place within a tile of winograd_f4x4, whose tiles lie four pixels apart.
    **{f"pixel{y}x{x}": [(y, x)] for y, x in ((4, 4), (5, 6), (6, 5), (7, 7), (7, 8), (8, 11))},
    "corner": [(0, 0)],
    "edges": [(0, 9), (9, 0), (-1, 6), (6, -1)],
    "several": [(2, 3), (6, 11), (12, 12), (13, 3)],
    "row": [(7, ALL)],
    "border": [(0, ALL), (ALL, 0), (-1, ALL), (ALL, -1)],
    "half": [(ALL, slice(10, None))],
    "all_but_a_square": [
        (slice(7), ALL), (slice(11, None), ALL), (ALL, slice(7)), (ALL, slice(11, None)),
    ],
}  # fmt: skip
over_places = pytest.mark.parametrize("place", PLACES)
CHANNELS = {"all": ALL, "first": slice(0, 1), "last": slice(-1, None)}


@pytest.fixture(autouse=True)
def _one_thread(restore_threads) -> None:
    """Threads have little to share in such small blocks, and wait for each other busily."""
    torch.set_num_threads(1)


class Case(NamedTuple):
    """Operands with large values, and where the windows are that see none of them."""

    block: Block
    operands: Operands
    clean: Tensor  # bool [OH, OW]
    near: Tensor  # bool [OH, OW]: clean, and close to a large value
    what: tuple[object, ...]

    def results(self) -> Iterator[tuple[Forced, dict[str, Tensor]]]:
        """Of every transforming kernel that covers the block."""
        for forced in TRANSFORMING:
            if results := run_pass(forced, self.block, self.operands):
                yield forced, results


def windows_that_see(block: Block, mask: Tensor, margin: int) -> Tensor:
    """Which windows' receptive fields, `margin` pixels wider all around, meet the mask [H, W]."""
    padding = [block.padding + margin] * 4
    return F.max_pool2d(F.pad(mask[None, None].double(), padding), 4 + 2 * margin, 2)[0, 0] > 0


def make_case(
    block: Block,
    place: str,
    channels: str,
    value: float,
    background: str = "normal",
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Seeded by the block and the place alone."""
    generator = torch.Generator().manual_seed(len(block.name) * 100 + len(place))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    out, per_group = block.out_channels, block.input[-3]
    input = {
        "normal": lambda: normal(*block.input),
        "uniform": lambda: torch.rand(block.input, generator=generator),
        "small": lambda: normal(*block.input).relu() * 1e-3,
        "zeros": lambda: torch.zeros(block.input),
    }[background]()
    mask = torch.zeros(block.input[-2:], dtype=torch.bool)
    for y, x in PLACES[place]:
        mask[y, x] = True
    # All images but the first, which stays as it is.
    input[1:, CHANNELS[channels]] = input[1:, CHANNELS[channels]].masked_fill(mask, value)
    weight = normal(*block.weight) / math.sqrt(9 * per_group)
    bias = normal(out) * (1e-4 if background == "small" else 0.1)
    operands = Operands(input, weight, bias, None).map(lambda t: t.to(dtype))
    clean = ~windows_that_see(block, mask, 0)
    near = clean & windows_that_see(block, mask, 2)
    return Case(block, operands, clean, near, (place, background, channels, value))


def assert_accurate(case: Case) -> None:
    """Every transforming kernel keeps its bound where no large value is seen but some are near.

    The bound is that of reference.py, but for the root of the mean square of the errors: of so few,
    the largest is large or small by chance.
    """
    if not case.near.any():
        return
    reference = case.block.stock(*case.operands.map(Tensor.double)[:3])[1:, :, case.near]

    def error(output: Tensor) -> float:
        return (output[1:, :, case.near].double() - reference).square().mean().sqrt().item()

    stock = case.block.stock(*case.operands[:3])
    floor = torch.finfo(stock.dtype).eps / 2 * reference.abs().max().item()
    for forced, results in case.results():
        allowed = forced.error * error(stock) + floor
        assert error(results["output"]) <= allowed, (str(forced), *case.what)


@over_blocks
@over_places
def test_large_values(place, block):
    """No-data marks, raw sensor values, numbers near the largest, NaN: in one channel or in all."""
    values = (255.0, -9999.0, 65535.0, 1e6, -1e30, math.inf, math.nan)
    for turn in range(len(place), len(place) + 3):
        channels = ("all", "first", "last")[turn // 2 % 3]
        background = ("normal", "uniform", "small")[turn % 3]
        assert_accurate(make_case(block, place, channels, values[turn % 7], background))


@over_blocks
@over_places
def test_moderately_large_values(place, block):
    """Either side of where a kernel may begin to mind, in multiples of the background's size.

    A value of one channel weighs as much as the same sum of squares spread over all of them.
    """
    for turn, times in enumerate((3, 4, 5, 7, 10, 14, 30, 100), len(place)):
        background, size = (("normal", 1), ("uniform", 3**-0.5), ("small", 0.7e-3))[turn % 3]
        channels, spread = (("all", 1), ("first", math.sqrt(block.input[-3])))[turn // 3 % 2]
        assert_accurate(make_case(block, place, channels, times * size * spread, background))


@over_blocks
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=dtype_name)
def test_half_types(dtype, block):
    """They are transformed in float32, whose rounding of a large value can exceed their own."""
    for turn, place in enumerate(PLACES):
        value = (255.0, -9999.0, 60000.0)[turn % 3]
        channels = ("all", "first", "last")[turn // 3 % 3]
        assert_accurate(make_case(block, place, channels, value, dtype=dtype))


@over_blocks
@over_places
def test_over_zeros_the_output_is_the_bias(place, block):
    """Exactly, and where that is not above 0 no gradient flows."""
    for channels, value in (("all", 3.0), ("first", 1e6), ("last", 1e30)):
        case = make_case(block, place, channels, value, "zeros")
        expected = case.operands.bias.view(-1, 1).expand(-1, int(case.clean.sum()))
        for forced, results in case.results():
            output = results["output"][:, :, case.clean]
            assert torch.equal(output, expected.relu().expand_as(output)), (str(forced), value)
            live = results["code"][:, :, case.clean] != 255
            assert torch.equal(live, (expected > 0).expand_as(live)), (str(forced), value)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@over_blocks
def test_an_image_with_large_values_does_not_depend_on_its_batch(block, layout):
    """Nor do its neighbours."""
    case = make_case(block, "several", "all", 1e4)
    many = case.operands.input.repeat(4, 1, 1, 1)
    together = case.operands._replace(input=with_layout(many, layout))
    for forced, results in case._replace(operands=together).results():
        for n in range(2):
            alone = case.operands._replace(input=with_layout(many[n : n + 1], layout))
            for name, result in run_pass(forced, block, alone).items():
                assert torch.equal(result[0], results[name][n]), (str(forced), name)
