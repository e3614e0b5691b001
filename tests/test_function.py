"""conv_relu_max_pool2d as users call it: with autograd, over every geometry, dtype and layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from forcing import KERNELS
from fusedcnn import _ops, conv_relu_max_pool2d
from geometries import BLOCKS, DTYPES, Block, by_name, dtype_name, pair
from reference import (
    LAYOUTS,
    Operands,
    exact_case,
    float_case,
    gradients_of_winners,
    largest_error,
    with_layout,
)
from torch import Tensor

over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
over_blocks = pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)


def fused(block: Block, *tensors: Tensor | None) -> Tensor:
    return conv_relu_max_pool2d(*tensors, *block.conv_arguments, **block.fused_keywords)


def run(function, operands: Operands) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Output and gradients of `function`(input, weight, bias), by autograd."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in operands[:3]]
    output = function(*leaves)
    output.backward(operands.grad_output)
    return output.detach(), tuple(None if t is None else t.grad for t in leaves)


@over_dtypes
@over_blocks
def test_integers_are_exact(block, dtype, exact):
    operands, expected = exact_case(block.name, dtype)
    expected_output = expected.output
    expected_bias = None if operands.bias is None else expected.grad_bias
    expected_grads = (expected.grad_input, expected.grad_weight, expected_bias)
    for layout in LAYOUTS:
        laid_out = operands.map(lambda t, layout=layout: with_layout(t, layout))
        output, grads = run(lambda *tensors: fused(block, *tensors), laid_out)
        assert torch.equal(output, expected_output), layout
        for name, grad, expected in zip(
            ("input", "weight", "bias"), grads, expected_grads, strict=True
        ):
            assert (grad is None) == (expected is None), (name, layout)
            assert grad is None or torch.equal(grad, expected), (name, layout)
        with torch.no_grad():  # the forward without a code
            assert torch.equal(fused(block, *laid_out[:3]), expected_output), layout


@over_blocks
def test_floats_are_as_close_as_the_stock_layers(block):
    """In float32, by autograd, with the kernels that are selected by default.

    The gradients are compared with those of the winners that the forward picked (see reference.py).
    """
    largest = {f.pass_name: f.error for f in sorted(KERNELS, key=lambda f: f.error)}
    case = float_case(block.name, torch.float32)
    output, grads = run(lambda *tensors: fused(block, *tensors), case.operands)
    assert largest_error(output, case.output.reference) <= case.output.allowed(largest["forward"])
    _, code = _ops.forward_op(*case.operands[:3], block.pack(), True)
    references = gradients_of_winners(block, case.operands, code)
    bounds = (case.grad_input, case.grad_weight, case.grad_bias)
    for grad, reference, bound in zip(grads, references, bounds, strict=True):
        if grad is not None:
            assert (grad.double() - reference).abs().max() <= bound.allowed(largest["grad_input"])


@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("input_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "name", ["simplecnn1_n2", "simplecnn2_n5", "kernel4x4", "channels1to1", "groups2", "unbatched"]
)
def test_memory_formats_are_those_of_the_stock_layers(name, input_layout, weight_layout):
    """channels_last in, channels_last out; strides are compared where a size leaves no doubt."""
    block = by_name(name)
    operands, _ = exact_case(name, torch.float32)
    operands = operands._replace(
        input=with_layout(operands.input, input_layout),
        weight=with_layout(operands.weight, weight_layout),
    )
    output, grads = run(lambda *tensors: fused(block, *tensors), operands)
    expected, expected_grads = run(block.stock, operands)
    assert memory_format(output) == memory_format(expected)
    # A gradient has its tensor's format, which autograd asks of leaves.
    for grad, expected_grad in zip(grads[:2], expected_grads[:2], strict=True):
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
    output, grads = run(lambda *tensors: fused(block, *tensors), expanded)
    dense = expanded.map(Tensor.contiguous)
    expected, expected_grads = run(block.stock, dense)
    assert torch.equal(output, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("name", ["simplecnn2_n2", "kernel5x5", "pool3_stride2"])
def test_sum_backward(name, exact):
    """.sum() sends back one number expanded over the output, with all strides 0."""
    block = by_name(name)
    operands, _ = exact_case(name, torch.float32)
    ones = operands._replace(grad_output=torch.ones_like(operands.grad_output))
    _, expected = run(block.stock, ones)
    leaves = [t.detach().requires_grad_() for t in operands[:3]]
    fused(block, *leaves).sum().backward()
    for leaf, grad in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, grad)


@pytest.mark.parametrize("name", ["simplecnn2_n2", "kernel5x5"])
def test_half_of_the_output_used(name, exact):
    """The gradient of a slice arrives padded with zeros, and that of a transpose transposed."""
    block = by_name(name)
    operands, _ = exact_case(name, torch.float32)

    def loss(function):
        leaves = [t.detach().requires_grad_() for t in operands[:3]]
        output = function(*leaves)
        scale = torch.arange(output.shape[-1]).remainder(3) - 1.0
        (output[:, ::2].transpose(2, 3) * scale.view(-1, 1)).sum().backward()
        return [leaf.grad for leaf in leaves]

    for grad, expected in zip(loss(lambda *t: fused(block, *t)), loss(block.stock), strict=True):
        assert torch.equal(grad, expected)


def test_arguments_as_ints_tuples_and_lists(exact):
    """One number, a pair, a list: the same block."""
    operands, _ = exact_case("kernel5x5", torch.float32)
    input, weight, bias, _ = operands
    expected = conv_relu_max_pool2d(input, weight, bias, 2, 1, 1, 1, pool_kernel_size=3)
    for two, one, three in (((2, 2), (1, 1), (3, 3)), ([2, 2], [1, 1], [3, 3]), ([2], (1,), [3])):
        output = conv_relu_max_pool2d(
            input,
            weight,
            bias,
            stride=two,
            padding=one,
            dilation=one,
            pool_kernel_size=three,
            pool_stride=three,
            pool_dilation=one,
        )
        assert torch.equal(output, expected)
    empty_stride = conv_relu_max_pool2d(
        input, weight, bias, 2, 1, pool_kernel_size=3, pool_stride=[]
    )
    assert torch.equal(empty_stride, expected)


def test_the_operator_without_a_code(exact):
    """with_code=False: the same output and an empty code."""
    block = by_name("simplecnn2_n2")
    operands, expected = exact_case(block.name, torch.float32)
    op = torch.ops.fusedcnn.conv_relu_max_pool2d
    output, code = op(*operands[:3], block.pack(), False)
    assert torch.equal(output, expected.output)
    assert code.numel() == 0
    output, code = op(*operands[:3], block.pack(), True)
    assert torch.equal(output, expected.output)
    assert torch.equal(code, expected.code)


def test_the_backward_operator_computes_what_is_asked():
    """Each combination of the mask's bits: a gradient or an empty tensor."""
    block = by_name("simplecnn2_n2")
    operands, expected = exact_case(block.name, torch.float32)
    wanted = (expected.grad_input, expected.grad_weight, expected.grad_bias)
    for mask in range(8):
        grads = torch.ops.fusedcnn.conv_relu_max_pool2d_backward(
            operands.grad_output, operands.input, operands.weight, expected.code, block.pack(), mask
        )
        for bit, (grad, right) in enumerate(zip(grads, wanted, strict=True)):
            if mask >> bit & 1:
                assert torch.equal(grad, right), (mask, bit)
            else:
                assert grad.numel() == 0, (mask, bit)


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
@pytest.mark.parametrize(
    "name",
    ["simplecnn2_n2", "ceil_odd", "pool3_padding1", "pool_rectangular", "ceil_padding",
     "pool_dilation_padding", "window289", "window19x20_padded"],
)  # fmt: skip
def test_codes_that_no_forward_wrote_are_an_error(name, layout):
    """A window's element is taken if it is there and refused if not, and the process goes on."""
    block = by_name(name)
    operands, expected = exact_case(name, torch.float32)
    plane = block.conv(*operands[:3]).shape[-2:]
    out = expected.output.shape[-2:]
    exists = existing_elements(block, plane, out)
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
