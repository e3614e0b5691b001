"""Every kernel of every ISA, forced one by one, against the stock layers, over every geometry."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checks import over, over_dtypes
from forcing import KERNELS, PASSES, run_pass
from fusedcnn import build_info
from geometries import BLOCKS, Block
from reference import LAYOUTS, decode, exact_case, float_case, largest_error, with_layout
from torch import Tensor

# The lowest decorator varies slowest, so that a block's reference is computed once.
over_blocks = over(BLOCKS)


@pytest.mark.parametrize("forced", KERNELS, ids=str)
def test_every_kernel_is_exercised(forced):
    """A kernel that covers next to none of the list would pass all else here unseen."""
    covered = dict.fromkeys((torch.float32, torch.bfloat16), 0)
    for dtype in covered:
        for block in BLOCKS:
            operands, expected = exact_case(block.name, dtype)
            covered[dtype] += run_pass(forced, block, operands, expected.code) is not None
    assert max(covered.values()) >= (len(BLOCKS) if forced.kernel == "general" else 20)


@pytest.mark.parametrize("isa", [i["name"] for i in build_info()["isas"] if i["supported"]])
def test_every_isa_has_all_passes(isa):
    """Its own, or those of the ISA that it is a feature of."""
    isas = [isa, *(i["base"] for i in build_info()["isas"] if i["name"] == isa)]
    passes = {(f.pass_name, f.kernel) for f in KERNELS if f.isa in isas}
    assert {(pass_name, "general") for pass_name in PASSES} <= passes


@over_dtypes
@over_blocks
def test_integers_are_exact(block, dtype):
    """Where all sums are exact, so is the result: in any layout, ties included.

    Of any kernel, but for those that say that they round integers too.
    """
    operands, expected = exact_case(block.name, dtype)
    wrong = []
    for layout in LAYOUTS:
        laid_out = operands.map(lambda t, layout=layout: with_layout(t, layout))
        code = with_layout(expected.code, layout)
        for forced in (f for f in KERNELS if f.exact):
            results = run_pass(forced, block, laid_out, code) or {}
            for name, result in results.items():
                if not torch.equal(result, getattr(expected, name)):
                    differ = (result != getattr(expected, name)).sum().item()
                    wrong.append(f"{name}, {layout}, {forced}: {differ} of {result.numel()} differ")
    assert not wrong, "\n".join(wrong)


@over_dtypes
@over_blocks
def test_floats_are_as_close_as_the_stock_layers(block, dtype):
    """The rule of reference.py, for each result of each kernel.

    In one layout, and in all for kernels that the test on integers leaves out.
    """
    case = float_case(block.name, dtype)
    wrong = []
    for forced in KERNELS:
        for layout in LAYOUTS[: 1 if forced.exact else None]:
            operands = case.operands.map(lambda t, layout=layout: with_layout(t, layout))
            results = run_pass(forced, block, operands, case.code) or {}
            code = results.pop("code", None)
            for name, result in results.items():
                bound = getattr(case, name)
                error = largest_error(result, bound.reference)
                allowed = bound.allowed(forced.error)
                if not error <= allowed:
                    wrong.append(f"{name}, {layout}, {forced}: {error:.3g} > {allowed:.3g}")
                if name == "output" and not winners_win(block, code, case.plane, allowed):
                    wrong.append(f"winners, {layout}, {forced}")
    assert not wrong, "\n".join(wrong)


def winners_win(block: Block, code: Tensor, plane: Tensor, allowed: float) -> bool:
    """Whether each winner is its window's maximum, and "off" means none above 0, up to rounding."""
    live, index = decode(block, code, plane.shape[-1])
    best = F.max_pool2d(plane, *block.pool_arguments)
    value = plane.flatten(-2).gather(-1, index.flatten(-2)).view_as(best)
    # Two values, each within `allowed` of the exact one, may change places within twice that.
    wins = (value >= best - 2 * allowed) & (best >= -allowed)
    return bool(torch.where(live, wins, best <= allowed).all())


def test_the_list_covers_what_it_should():
    """The kinds of geometry that the kernels distinguish are all there."""
    blocks = {block.name: block for block in BLOCKS}
    assert len(blocks) == len(BLOCKS)
    codes = {name: exact_case(name, torch.float32)[1].code.dtype for name in blocks}
    assert codes["window15x17"] == torch.uint8
    assert codes["window256"] == codes["window289"] == torch.int32
    assert {len(block.input) for block in BLOCKS} == {3, 4}
    assert blocks["same_even"].padding == "same"
