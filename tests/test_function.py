"""conv_relu_max_pool2d as users call it: with autograd, over every geometry, dtype and layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checks import assert_equal, over, over_dtypes, step
from forcing import KERNELS
from fusedcnn import _ops, conv_relu_max_pool2d
from geometries import BLOCKS, Block, by_name, pair
from reference import (
    LAYOUTS,
    Operands,
    exact_case,
    float_case,
    gradients_of_winners,
    integer_operands,
    largest_error,
    with_layout,
)
from torch import Tensor


@over_dtypes
@over(BLOCKS)
def test_integers_are_exact(block, dtype, exact):
    operands, right = exact_case(block.name, dtype)
    bias = None if operands.bias is None else right.grad_bias
    expected = [right.output, right.grad_input, right.grad_weight, bias]
    for layout in LAYOUTS:
        *tensors, grad_output = operands.map(lambda t, layout=layout: with_layout(t, layout))
        assert_equal(step(block.fused, tensors, grad_output), expected)
        with torch.no_grad():  # the forward without a code
            assert torch.equal(block.fused(*tensors), right.output), layout


@over(BLOCKS)
def test_floats_are_as_close_as_the_stock_layers(block):
    """In float32, by autograd, with the kernels that are selected by default.

    The gradients are compared with those of the winners that the forward picked (see reference.py).
    """
    largest = {f.pass_name: f.error for f in sorted(KERNELS, key=lambda f: f.error)}
    case = float_case(block.name, torch.float32)
    output, *grads = step(block.fused, case.operands[:3], case.operands.grad_output)
    assert largest_error(output, case.output.reference) <= case.output.allowed(largest["forward"])
    _, code = _ops.forward_op(*case.operands[:3], block.pack(), True)
    references = gradients_of_winners(block, case.operands, code)
    bounds = (case.grad_input, case.grad_weight, case.grad_bias)
    for grad, reference, bound in zip(grads, references, bounds, strict=True):
        if grad is not None:
            assert (grad.double() - reference).abs().max() <= bound.allowed(largest["grad_input"])


@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("input_layout", ["contiguous", "channels_last"])
@over([
    "simplecnn1_n2", "simplecnn2_n5", "kernel4x4", "channels1to1", "groups2", "unbatched",
    Block("one_tap", (2, 1, 6, 6), 4, kernel=1),  # a weight that fits both formats
])  # fmt: skip
def test_memory_formats_are_those_of_the_stock_layers(block, input_layout, weight_layout):
    """channels_last in, channels_last out; strides are compared where a size leaves no doubt."""
    operands = integer_operands(block, torch.float32)
    tensors = (
        with_layout(operands.input, input_layout),
        with_layout(operands.weight, weight_layout),
        operands.bias,
    )
    output, *grads, _ = step(block.fused, tensors, operands.grad_output)
    expected, *expected_grads, _ = step(block.stock, tensors, operands.grad_output)
    assert memory_format(output) == memory_format(expected)
    # A gradient has its tensor's format, which autograd asks of leaves.
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert memory_format(grad) == memory_format(expected_grad)


def memory_format(tensor: Tensor) -> set[torch.memory_format]:
    """The formats that a tensor is dense in; both, where a size of 1 makes them the same."""
    formats = {torch.contiguous_format} if tensor.is_contiguous() else set()
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        formats.add(torch.channels_last)
    return formats


def test_expanded_operands(exact):
    """Stride-0 dimensions: one image for a whole batch, one kernel for all output channels."""
    block = by_name("simplecnn1_n5")
    operands, _ = exact_case(block.name, torch.float32)
    expanded = Operands(
        operands.input[:1].expand(block.input),
        operands.weight[:1].expand(block.weight),
        operands.bias[:1].expand(block.out_channels),
        operands.grad_output[:, :1].expand_as(operands.grad_output),
    )
    dense = expanded.map(Tensor.contiguous)
    assert_equal(
        step(block.fused, expanded[:3], expanded.grad_output),
        step(block.stock, dense[:3], dense.grad_output),
    )


@over(["simplecnn2_n2", "kernel5x5", "pool3_stride2"])
def test_gradients_of_sums_and_of_parts(block, exact):
    """.sum() sends back one number expanded over the output, with all strides 0; the gradient of a
    slice arrives padded with zeros, and that of a transpose transposed.
    """
    operands, _ = exact_case(block.name, torch.float32)

    def half(output: Tensor) -> Tensor:
        scale = torch.arange(output.shape[-1]).remainder(3) - 1.0
        return (output[:, ::2].transpose(2, 3) * scale.view(-1, 1)).sum()

    for reduce in (Tensor.sum, half):
        ours, theirs = (
            step(lambda *t, layer=layer, reduce=reduce: reduce(layer(*t)), operands[:3])
            for layer in (block.fused, block.stock)
        )
        assert_equal(ours, theirs)


def test_arguments_as_ints_tuples_and_lists(exact):
    """One number, a pair, a list: the same block."""
    operands = exact_case("kernel5x5", torch.float32)[0][:3]
    expected = conv_relu_max_pool2d(*operands, 2, 1, 1, 1, pool_kernel_size=3)
    for two, one, three in (((2, 2), (1, 1), (3, 3)), ([2, 2], [1, 1], [3, 3]), ([2], (1,), [3])):
        convolution = {"stride": two, "padding": one, "dilation": one}
        pool = {"pool_kernel_size": three, "pool_stride": three, "pool_dilation": one}
        assert torch.equal(conv_relu_max_pool2d(*operands, **convolution, **pool), expected)
    empty_stride = conv_relu_max_pool2d(*operands, 2, 1, pool_kernel_size=3, pool_stride=[])
    assert torch.equal(empty_stride, expected)


def test_the_operators_compute_what_is_asked(exact):
    """A code or none, and each combination of the mask's bits: a result or an empty tensor."""
    block = by_name("simplecnn2_n2")
    operands, expected = exact_case(block.name, torch.float32)
    *tensors, grad_output = operands
    code = expected.code
    for with_code in (True, False):
        results = torch.ops.fusedcnn.conv_relu_max_pool2d(*tensors, block.pack(), with_code)
        assert_equal(results, (expected.output, code if with_code else code.new_empty(0)))
    for mask in range(8):
        results = torch.ops.fusedcnn.conv_relu_max_pool2d_backward(
            grad_output, *tensors[:2], code, block.pack(), mask
        )
        wanted = [
            grad if mask >> bit & 1 else grad.new_empty(0) for bit, grad in enumerate(expected[2:])
        ]
        assert_equal(results, tuple(wanted))


def existing_elements(block: Block, plane: torch.Size, out: torch.Size) -> Tensor:
    """[OH, OW, window]: whether each element of each window lies on the convolution's output."""
    kernel, dilation = pair(block.pool), pair(block.pool_dilation)
    stride = pair(block.pool if block.pool_stride is None else block.pool_stride)
    before = pair(block.pool_padding)
    reach = [
        (o - 1) * s + d * (k - 1) + 1
        for o, s, d, k in zip(out, stride, dilation, kernel, strict=True)
    ]
    after = [r - size - b for r, size, b in zip(reach, plane, before, strict=True)]
    ones = F.pad(torch.ones(1, 1, *plane), (before[1], after[1], before[0], after[0]))
    return F.unfold(ones, kernel, dilation, 0, stride).view(-1, *out).permute(1, 2, 0) != 0


@pytest.mark.parametrize("layout", LAYOUTS)
@over([
    "simplecnn2_n2", "ceil_odd", "pool3_padding1", "pool_rectangular", "ceil_padding",
    "pool_dilation_padding", "window289", "window19x20_padded",
])  # fmt: skip
def test_codes_that_no_forward_wrote_are_an_error(block, layout):
    """A window's element is taken if it is there and refused if not, and the process goes on."""
    operands, expected = exact_case(block.name, torch.float32)
    out = expected.output.shape[-2:]
    exists = existing_elements(block, block.conv(*operands[:3]).shape[-2:], out)
    window = exists.shape[-1]
    wide = expected.code.dtype == torch.int32
    outside = [window, window + 1] + ([-2, 2**31 - 1] if wide else [254])

    def accepted(row: int, col: int, element: int) -> bool:
        code = torch.full_like(expected.code, -1 if wide else 255)
        code[-1, -1, row, col] = element
        try:
            torch.ops.fusedcnn.conv_relu_max_pool2d_backward(
                operands.grad_output, operands.input, operands.weight,
                with_layout(code, layout), block.pack(), 7,
            )  # fmt: skip
        except RuntimeError as error:
            if "code: expected the tensor that the forward returned" not in str(error):
                raise
            return False
        return True

    for row in {0, out[0] // 2, out[0] - 1}:
        for col in {0, out[1] // 2, out[1] - 1}:
            for element in range(0, window, 1 + window // 24):
                assert accepted(row, col, element) == bool(exists[row, col, element])
            assert not any(accepted(row, col, element) for element in outside)
