"""Ties, zeros, NaN, infinities, negative zero: the values at which implementations part."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from checks import assert_equal, over, over_dtypes, step
from forcing import KERNELS, run_everywhere, run_pass
from fusedcnn import conv_relu_max_pool2d
from geometries import Block, by_name
from reference import (
    Operands,
    exact_case,
    integer_operands,
    normal_operands,
    stock_result,
    with_layout,
)
from torch import Tensor

NAN, INF = math.nan, math.inf

# A specialised shape with full and with ragged vectors, and two that only the general kernel runs.
over_blocks = over([
    "simplecnn1_n2", "channels16to16", "channels3to17",
    "kernel5x5", "pool3_stride2", "pool3_padding1",
])  # fmt: skip


def stock(block: Block, operands: Operands) -> dict[str, Tensor]:
    """Output and gradients of the stock layers, by name."""
    results = stock_result(block, operands)._asdict()
    del results["code"]
    return results


def assert_equal_everywhere(
    block: Block, operands: Operands, expected: dict[str, Tensor], exact_only: bool = True
) -> None:
    """Every kernel's results are `expected`, to the bit but for the sign of 0."""
    for ran, results in run_everywhere(block, operands, exact_only):
        for name, result in results.items():
            if name in expected:
                assert torch.equal(result, expected[name]), (ran, name)


@pytest.mark.parametrize(
    ("value", "changed"),
    [
        # All elements equal and positive: the first one takes the gradient.
        (1, {"weight": 0, "bias": 1}),
        # ReLU's gradient at 0 is 0: nothing flows anywhere. So it is at -0.0, whether that comes
        # from a product or from a bias.
        (0, {"input": 0, "bias": 0}),
        (0, {"input": -0.0, "weight": 1, "bias": -0.0}),
    ],
    ids=["tied", "zero", "negative_zero"],
)
@over_dtypes
@over_blocks
def test_all_windows_alike(block, dtype, value, changed):
    operands = integer_operands(block, dtype)
    operands = operands._replace(
        **{name: torch.full_like(getattr(operands, name), x) for name, x in changed.items()}
    )
    expected = stock(block, operands)
    assert expected["output"].eq(value).all()
    assert value or all(result.eq(0).all() for result in expected.values())
    assert_equal_everywhere(block, operands, expected, exact_only=False)


@over_blocks
def test_tied_pairs_in_every_place(block):
    """Equal maxima at random places of the windows: the first in row order wins."""
    operands, _ = exact_case(block.name, torch.float32)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        bits = torch.randint(0, 2, operands.input.shape, generator=generator).float()
        centre = torch.zeros_like(operands.weight)
        centre[:, 0, centre.shape[2] // 2, centre.shape[3] // 2] = 1
        tied = operands._replace(input=bits, weight=centre)
        assert_equal_everywhere(block, tied, stock(block, tied))


def with_specials(which: str, value: float, operands: Operands) -> Operands:
    """The operands with `value` at a few places of one of them."""
    tensor = getattr(operands, which).clone()
    tensor.view(-1)[3 :: max(7, tensor.numel() // 5)] = value
    return operands._replace(**{which: tensor})


def without_padding(block: Block, which: str) -> Block:
    """Where the weight is special: the stock layers part among themselves on whether padding times
    a NaN weight is NaN (see test_nan_weight_over_padding).
    """
    return block._replace(padding=0) if which == "weight" else block


@over_dtypes
@over_blocks
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("which", ["input", "weight", "bias"])
def test_special_values(which, value, block, dtype):
    """NaN and infinities give the stock layers' output, and route gradients as they do.

    The reference is the stock layers in float32: in bfloat16 their convolution spreads a NaN to
    pixels that do not see it.

    Their backward is dense: it multiplies the zero gradients of elements that did not win by input
    and weight as well, and 0 * NaN is NaN. The fused backward does not touch what did not win. So
    it may have fewer NaN in grad_input (from the weight) and in grad_weight (from the input), never
    others; and nothing else may differ. (Where windows overlap, the stock pool adds up an element's
    gradients before they meet an infinity: inf there may be inf - inf here.)
    """
    block = without_padding(block, which)
    operands = with_specials(which, value, integer_operands(block, dtype))
    expected = stock(block, operands.map(Tensor.float))
    overlapping = block.pool_stride not in (None, block.pool)
    factors = {"grad_input": operands.weight, "grad_weight": operands.input}
    for ran, results in run_everywhere(block, operands):
        results.pop("code", None)
        for name, result in results.items():
            right = expected[name].to(dtype)
            agree = (result == right) | (result.isnan() & right.isnan())
            if name in factors and not factors[name].isfinite().all():
                agree |= right.isnan()
                if overlapping:
                    agree |= ~result.isfinite() & right.isinf()
            assert agree.all(), (ran, name)


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e38, -1e38])
@pytest.mark.parametrize("which", ["input", "weight"])
@over(["simplecnn1_n2", "simplecnn2_n2", "wide_map13x34_p1", "vgg64"])
def test_special_values_stay_where_they_belong(block, which, value):
    """The same among random floats, for kernels that round: they mix pixels in their transforms.

    NaN and infinities in the same places; what is finite, within the bound of the same operands
    without the special ones where those do not reach.
    """
    block = without_padding(block, which)
    plain = normal_operands(block, torch.float32)
    operands = with_specials(which, value, plain)
    expected, plain_output = block.stock(*operands[:3]), block.stock(*plain[:3])
    untouched = expected == plain_output
    wide = block.stock(*operands.map(Tensor.double)[:3])
    error = (plain_output - block.stock(*plain.map(Tensor.double)[:3])).abs().max()
    for forced in (f for f in KERNELS if f.pass_name == "forward"):
        results = run_pass(forced, block, operands)
        if results is None:
            continue
        output = results["output"]
        assert torch.equal(output.isnan(), expected.isnan()), str(forced)
        assert torch.equal(output.isinf(), expected.isinf()), str(forced)
        assert (output - wide)[untouched].abs().max() <= 5 * error, str(forced)


@over(["simplecnn1_n2", "kernel5x5"])
def test_nan_weight_over_padding(block):
    """A NaN tap spoils what it meets a pixel in; where it meets padding, torch has it both ways."""
    operands = with_specials("weight", NAN, integer_operands(block, torch.float32))
    tap = operands.weight.isnan().float()
    unpadded = torch.ones_like(operands.input)
    padded = F.pad(unpadded, [block.padding] * 4, value=1.0)
    spoilt = F.max_pool2d(block.conv(unpadded, tap), *block.pool_arguments) > 0
    may_be = F.max_pool2d(F.conv2d(padded, tap), *block.pool_arguments) > 0
    expected = block.stock(operands.input, operands.weight.nan_to_num(0), operands.bias)
    for ran, results in run_everywhere(block, operands):
        if "output" in results:
            output = results["output"]
            assert output[spoilt].isnan().all(), ran
            assert torch.equal(output[~may_be], expected[~may_be]), ran


def test_the_last_nan_of_a_window_takes_the_gradient():
    """As in torch, whose comparison lets every NaN replace what came before it."""
    tensors = torch.tensor([[[[NAN, 5.0], [NAN, 1.0]]]]), torch.ones(1, 1, 1, 1), torch.zeros(1)
    grad_input = step(conv_relu_max_pool2d, tensors)[1]
    assert_equal(grad_input, torch.tensor([[[[0.0, 0.0], [1.0, 0.0]]]]))


def test_nan_stays_in_its_channel():
    """A NaN spreads no further than the output channel that it belongs to: vectors hold many."""
    block = by_name("simplecnn2_n2")
    operands = integer_operands(block, torch.float32)
    operands.weight[5, 3, 1, 1] = NAN  # the middle tap, which meets no padding
    expected = stock(block, operands)
    assert expected["output"].isnan().sum() == expected["output"][:, 5].numel()
    for ran, results in run_everywhere(block, operands, exact_only=False):
        if "output" in results:
            assert torch.equal(results["output"].isnan(), expected["output"].isnan()), ran
        # The pass does not read the weight; after winograd_f4x4 ties may have other codes.
        if "grad_weight" in results and "winograd_f4x4" not in ran:
            assert torch.equal(results["grad_weight"], expected["grad_weight"]), ran


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@over_dtypes
def test_overflow_and_the_smallest_numbers(dtype, layout):
    """Sums that overflow are infinite, in either direction; the smallest normal numbers survive."""
    limits = torch.finfo(dtype)
    block = Block("limits", (1, 2, 8, 8), 16, padding=1)
    operands = integer_operands(block, dtype)
    # All terms of a sum have one sign, so that every order of adding them up overflows.
    one_sign = torch.ones_like(operands.weight)
    one_sign[::2] = -1
    overflowing = operands._replace(
        input=with_layout(torch.full_like(operands.input, limits.max / 4), layout), weight=one_sign
    )
    smallest = operands._replace(
        input=with_layout(operands.input * limits.tiny, layout),
        bias=operands.bias * limits.tiny,
    )
    for case in (overflowing, smallest):
        expected = stock(block, case)
        names = ("output", "grad_bias")
        assert_equal_everywhere(block, case, {name: expected[name] for name in names})
    infinite = stock(block, overflowing)["output"].isinf()
    assert infinite.sum() == infinite.numel() / 2


@over(["simplecnn1_n2", "kernel5x5"])
def test_garbage_around_the_operands_is_not_read(block):
    """NaN between the elements of strided operands must not leak into any result."""
    operands, expected = exact_case(block.name, torch.float32)

    def amid_nan(tensor):
        larger = torch.full([2 * size + 1 for size in tensor.shape], NAN)
        return larger[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)

    assert_equal_everywhere(block, operands.map(amid_nan), expected._asdict())
