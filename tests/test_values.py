"""Ties, zeros, NaN, infinities, negative zero: the values at which implementations part."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from fusedcnn import conv_relu_max_pool2d
from geometries import DTYPES, Block, by_name, dtype_name
from reference import Operands, exact_case, integer_operands, with_layout
from torch import Tensor

# Integers are compared for equality.
pytestmark = pytest.mark.usefixtures("exact_kernels")

NAN, INF = math.nan, math.inf

over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
# A specialised shape with full and with ragged vectors, and two that only the general kernel runs.
over_blocks = pytest.mark.parametrize(
    "name", ["simplecnn1_n2", "channels3to17", "kernel5x5", "pool3_stride2", "pool3_padding1"]
)


def both(block: Block, operands: Operands) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of the fused block, and of the stock layers."""

    def results(function):
        leaves = [t.detach().clone().requires_grad_() for t in operands[:3]]
        output = function(*leaves)
        output.backward(operands.grad_output)
        return [output.detach(), *(leaf.grad for leaf in leaves)]

    def fused(*tensors):
        return conv_relu_max_pool2d(*tensors, *block.conv_arguments, **block.fused_keywords)

    return results(fused), results(block.stock)


def assert_all_equal(results: list[Tensor], expected: list[Tensor]) -> None:
    for name, result, right in zip(
        ("output", "grad_input", "grad_weight", "grad_bias"), results, expected, strict=True
    ):
        assert torch.equal(result, right), name


@over_dtypes
@over_blocks
def test_every_window_tied(name, dtype):
    """All elements equal and positive: the first one takes the gradient."""
    block = by_name(name)
    operands = integer_operands(block, dtype)
    operands = operands._replace(
        weight=torch.zeros_like(operands.weight), bias=torch.ones_like(operands.bias)
    )
    results, expected = both(block, operands)
    assert results[0].eq(1).all()
    assert_all_equal(results, expected)


@over_dtypes
@over_blocks
def test_all_windows_zero(name, dtype):
    """ReLU's gradient at 0 is 0: nothing flows anywhere."""
    block = by_name(name)
    operands = integer_operands(block, dtype)
    operands = operands._replace(
        input=torch.zeros_like(operands.input), bias=torch.zeros_like(operands.bias)
    )
    results, expected = both(block, operands)
    assert all(result.eq(0).all() for result in results)
    assert_all_equal(results, expected)


@over_dtypes
def test_negative_zero(dtype):
    """-0.0 is 0: no gradient, whether it comes from a product or from a bias."""
    block = by_name("simplecnn2_n2")
    operands = integer_operands(block, dtype)
    operands = operands._replace(
        input=torch.full_like(operands.input, -0.0),
        weight=operands.weight.abs(),
        bias=torch.full_like(operands.bias, -0.0),
    )
    results, expected = both(block, operands)
    assert results[0].eq(0).all()
    assert all(grad.eq(0).all() for grad in results[1:])
    assert_all_equal(results, expected)


@over_blocks
def test_tied_pairs_in_every_place(name):
    """Two equal maxima, at every pair of places of a window: the first in row order wins."""
    block = by_name(name)
    operands, _ = exact_case(name, torch.float32)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        bits = torch.randint(0, 2, operands.input.shape, generator=generator).float()
        centre = torch.zeros_like(operands.weight)
        centre[:, 0, centre.shape[2] // 2, centre.shape[3] // 2] = 1
        results, expected = both(block, operands._replace(input=bits, weight=centre))
        assert_all_equal(results, expected)


def specials(block: Block, which: str, value: float, dtype: torch.dtype) -> Operands:
    """Integer operands with `value` at a few places of `which`."""
    operands = integer_operands(block, dtype)
    tensor = getattr(operands, which).clone()
    tensor.view(-1)[3 :: max(7, tensor.numel() // 5)] = value
    return operands._replace(**{which: tensor})


@over_dtypes
@over_blocks
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("which", ["input", "weight", "bias"])
def test_special_values(which, value, name, dtype):
    """NaN and infinities give the stock layers' output, and route gradients as they do.

    The reference is the stock layers in float32: in bfloat16 their convolution spreads a NaN to
    pixels that do not see it. And they part among themselves on whether padding times a NaN weight
    is NaN, so there is no padding where the weight is special (see the next test).

    Their backward is dense: it multiplies the zero gradients of elements that did not win by input
    and weight as well, and 0 * NaN is NaN. The fused backward does not touch what did not win. So
    it may have fewer NaN in grad_input (from the weight) and in grad_weight (from the input), never
    others; and nothing else may differ. (Where windows overlap, the stock pool adds up an element's
    gradients before they meet an infinity: inf there may be inf - inf here.)
    """
    block = by_name(name)
    if which == "weight":
        block = block._replace(padding=0)
    operands = specials(block, which, value, dtype)
    output, grad_input, grad_weight, grad_bias = both(block, operands)[0]
    expected = [t.to(dtype) for t in both(block, operands.map(Tensor.float))[1]]
    torch.testing.assert_close(output, expected[0], rtol=0, atol=0, equal_nan=True)
    # grad_bias adds up what arrived: equal only if gradients went to live windows alone.
    assert torch.equal(grad_bias, expected[3])
    for grad, right, factor in (
        (grad_input, expected[1], operands.weight),
        (grad_weight, expected[2], operands.input),
    ):
        agree = (grad == right) | (grad.isnan() & right.isnan())
        if not factor.isfinite().all():
            agree |= right.isnan()
            if block.pool_stride not in (None, block.pool):
                agree |= ~grad.isfinite() & right.isinf()
        assert agree.all()


@pytest.mark.parametrize("name", ["simplecnn1_n2", "kernel5x5"])
def test_nan_weight_over_padding(name):
    """A NaN tap spoils what it meets a pixel in; where it meets padding, torch has it both ways."""
    block = by_name(name)
    operands = specials(block, "weight", NAN, torch.float32)
    output = both(block, operands)[0][0]
    tap = operands.weight.isnan().float()
    unpadded = torch.ones_like(operands.input)
    padded = F.pad(unpadded, [block.padding] * 4, value=1.0)
    spoilt = F.max_pool2d(block.conv(unpadded, tap, None), *block.pool_arguments) > 0
    may_be = F.max_pool2d(F.conv2d(padded, tap), *block.pool_arguments) > 0
    assert output[spoilt].isnan().all()
    assert output[~may_be].isfinite().all()
    expected = block.stock(operands.input, operands.weight.nan_to_num(0), operands.bias)
    assert torch.equal(output[~may_be], expected[~may_be])


def test_the_last_nan_of_a_window_takes_the_gradient():
    """As in torch, whose comparison lets every NaN replace what came before it."""
    input = torch.tensor([[[[NAN, 5.0], [NAN, 1.0]]]], requires_grad=True)
    weight, bias = torch.ones(1, 1, 1, 1), torch.zeros(1)
    conv_relu_max_pool2d(input, weight, bias).sum().backward()
    assert torch.equal(input.grad, torch.tensor([[[[0.0, 0.0], [1.0, 0.0]]]]))


def test_nan_stays_in_its_image_and_channel():
    """A NaN spreads no further than the windows that see it: vectors hold many channels."""
    block = by_name("simplecnn2_n2")
    operands = integer_operands(block, torch.float32)
    weight = operands.weight.clone()
    weight[5, 3, 1, 1] = NAN  # the middle tap, which meets no padding
    results, expected = both(block, operands._replace(weight=weight))
    spoilt = results[0].isnan().flatten(2).any(2)
    assert spoilt[:, 5].all()
    assert spoilt.sum() == block.input[0]
    assert torch.equal(results[0].isnan(), expected[0].isnan())
    # And in the gradients: grad_weight does not read the weight.
    assert torch.equal(results[2], expected[2])


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
        results, expected = both(block, case)
        assert torch.equal(results[0], expected[0])
        assert torch.equal(results[3], expected[3])
    assert both(block, overflowing)[0][0].isinf().sum() == results[0].numel() / 2


def test_windows_without_an_element():
    """A dilated window can lie in the padding altogether: torch's maximum of nothing is -inf.

    No gradient flows there. (The stock layers' backward reads an index outside of the plane, so it
    is not asked.)
    """
    arguments = {"pool_kernel_size": 2, "pool_stride": 1, "pool_padding": 1, "pool_dilation": 3}
    input = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], requires_grad=True)
    weight = torch.ones(1, 1, 1, 1, requires_grad=True)
    output = conv_relu_max_pool2d(input, weight, None, **arguments)
    assert torch.equal(output, F.max_pool2d(F.relu(input), 2, 1, 1, 3))
    assert output.item() == -INF
    output.backward(torch.ones_like(output))
    assert input.grad.eq(0).all()
    assert weight.grad.eq(0).all()


@pytest.mark.parametrize("name", ["simplecnn1_n2", "kernel5x5"])
def test_garbage_around_the_operands_is_not_read(name):
    """NaN between the elements of strided operands must not leak into any result."""
    block = by_name(name)
    operands, expected = exact_case(name, torch.float32)

    def amid_nan(tensor):
        larger = torch.full([2 * size + 1 for size in tensor.shape], NAN)
        return larger[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)

    amid = operands.map(amid_nan)
    geometry = block.pack()
    op = torch.ops.fusedcnn
    output, code = op.conv_relu_max_pool2d(*amid[:3], geometry, True)
    assert torch.equal(output, expected.output)
    grads = op.conv_relu_max_pool2d_backward(amid.grad_output, *amid[:2], code, geometry, 7)
    for grad, right in zip(grads, expected[2:], strict=True):
        assert torch.equal(grad, right)
