"""Geometries that nobody thought of: drawn at random, the wrong ones included.

Data are small integers, so that results are exact and equality is asked for. Where the stock layers
raise, so must the fused block, with the same class. The stock layers run in float64, which keeps
them off oneDNN: in torch 2.13 its float32 convolution crashes on some of what is drawn here (a 1x1
kernel with groups, padding 3x1 and stride 1x3 in channels_last).
"""

from __future__ import annotations

from typing import Any

import checks
import pytest
import torch
from forcing import ISAS, KERNELS
from fusedcnn import conv_relu_max_pool2d
from fusedcnn._ops import _C, force, forward_op
from fusedcnn.backends import winograd
from fusedcnn.functional import pack_geometry
from geometries import stock
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from reference import with_layout
from torch import Tensor

FORWARD_KERNELS = sorted({f.kernel for f in KERNELS if f.pass_name == "forward" and f.exact})


def pairs(*values: int) -> st.SearchStrategy[int | tuple[int, int]]:
    one = st.sampled_from(values)
    return one | st.tuples(one, one)


@st.composite
def calls(draw, general: bool) -> dict[str, Any]:
    """Arguments of a call, right or wrong; `general` is False for 3x3 with 2x2 pools."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3])) if general else 1
    per_group = draw(st.integers(1, 4) | st.sampled_from([5, 16, 17]))
    out_per_group = draw(st.integers(1, 6) | st.sampled_from([15, 16, 17, 33]))
    kernel = (3, 3)
    if general:
        kernel = draw(st.tuples(*[st.integers(1, 5) | st.sampled_from([7, 11])] * 2))
    height = draw(st.integers(1, 20))
    width = draw(st.integers(1, 20) | st.sampled_from([31, 33, 64]))
    batch = draw(st.sampled_from([(), (0,), (1,), (1,), (2,), (3,)]))
    # Of a wrong call, one thing is wrong.
    wrong = draw(st.sampled_from([0] * 9 + [1, 2])) if general else 0
    call = {
        "input": (*batch, groups * per_group, height, width),
        "weight": (groups * out_per_group, per_group + (wrong == 1), *kernel),
        "bias": draw(st.booleans()),
        "padding": draw(pairs(0, 1, 2)),
    }
    if general:
        numbers = [0, 1, 1, 2, 3]
        call |= {
            "stride": draw(pairs(1, 1, 2, 3)),
            "padding": draw(pairs(*numbers) | st.sampled_from(["same", "valid"])),
            "dilation": draw(pairs(1, 1, 2, 3)),
            "groups": groups + (wrong == 2),
            "pool_kernel_size": draw(pairs(1, 2, 2, 3, 4, 17)),
            "pool_stride": draw(st.none() | pairs(1, 2, 3)),
            "pool_padding": draw(pairs(*numbers) | st.just(0)),
            "pool_dilation": draw(pairs(1, 1, 2)),
            "ceil_mode": draw(st.booleans()),
        }
    call["dtype"] = draw(st.sampled_from([torch.float32, torch.float64]))
    call["channels_last"] = draw(st.booleans())
    call["seed"] = draw(st.integers(0, 2**16))
    return call


def operands(
    input, weight, bias, dtype, channels_last, seed, **arguments
) -> tuple[list[Tensor | None], dict[str, Any]]:
    """The tensors of a call, and the rest of its arguments."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randint(-2, 3, shape, generator=generator).to(dtype)
        for shape in (input, weight, weight[:1])
    ]
    if channels_last and len(input) == 4:
        tensors[0] = with_layout(tensors[0], "channels_last")
    return [*tensors[:2], tensors[2] if bias else None], arguments


def results(function, call: dict[str, Any], dtype: torch.dtype) -> list[Tensor | None]:
    """Output, and gradients of all operands for an output gradient of small integers."""
    tensors, arguments = operands(**{**call, "dtype": dtype})
    leaves = checks.leaves_of(tensors)
    output = function(*leaves, **arguments)
    numbers = torch.arange(output.numel()).mul(7).remainder(5).sub(2)
    output.backward(numbers.view(output.shape).to(dtype))
    return [output.detach(), *(t if t is None else t.grad for t in leaves)]


def check(call: dict[str, Any]) -> None:
    try:
        expected = results(stock, call, torch.float64)
    except (RuntimeError, ValueError, TypeError) as stock_error:
        event("refused")
        with pytest.raises(type(stock_error), match=r"^\w+: "):
            results(conv_relu_max_pool2d, call, call["dtype"])
        return
    event("compared" if expected[0].isfinite().all() else "compared, with windows of padding")
    with winograd.flags(enabled=False):  # the larger transforms round integers too
        actual = results(conv_relu_max_pool2d, call, call["dtype"])
    checks.assert_equal(actual, [t if t is None else t.to(call["dtype"]) for t in expected])
    if expected[0].numel():
        compare_forward_kernels(call, expected[0])


def compare_forward_kernels(call: dict[str, Any], expected: Tensor) -> None:
    """Every exact forward kernel of the selected ISA gives this output, and all the same code."""
    tensors, arguments = operands(**call)
    geometry = pack_geometry(tensors[1].shape[2:], **arguments)
    codes = []
    isa = _C.forced()[0]
    for kernel in FORWARD_KERNELS:
        with force(isa, kernel):
            try:
                output, code = forward_op(*tensors, geometry, True)
            except RuntimeError as error:
                if "no forward kernel covers" in str(error):
                    continue
                raise
        assert torch.equal(output.double(), expected), kernel
        codes.append(code)
    assert all(torch.equal(code, codes[0]) for code in codes)


def thorough(max_examples: int):
    """Reproducible, with no time limit per example: the first call of a size is slower."""
    return settings(
        max_examples=max_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


@thorough(1000)
@given(calls(general=True))
def test_any_geometry(call):
    check(call)


@thorough(500)
@given(calls(general=False), st.sampled_from(ISAS))
def test_specialised_geometries(call, isa):
    """3x3 stride 1 with 2x2 pools, on each ISA."""
    with force(isa):
        check(call)


@pytest.mark.slow
@pytest.mark.parametrize("general", [True, False])
def test_at_length(general):
    """Twenty thousand of each kind."""

    @thorough(20000)
    @given(calls(general=general), st.sampled_from(ISAS))
    def run(call, isa):
        with force(isa):
            check(call)

    run()
