"""What autograd sees: which gradients come, what is saved, empty batches, modes, hooks."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from fusedcnn import ConvReLUMaxPool2dFunction, conv_relu_max_pool2d
from geometries import DTYPES, Block, by_name, dtype_name
from reference import exact_case, integer_operands
from torch import Tensor

pytestmark = pytest.mark.usefixtures("exact")

# Bytes held for the backward are counted on both blocks of the SimpleCNN.
SIMPLE_CNN = ("simplecnn1_n5", "simplecnn2_n5")


def fused(block: Block, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return conv_relu_max_pool2d(input, weight, bias, *block.conv_arguments, **block.fused_keywords)


@pytest.mark.parametrize("name", ["simplecnn2_n2", "kernel5x5", "unbatched", "no_bias"])
def test_gradients_only_where_needed(name):
    """All subsets of (input, weight, bias): the right gradient, or none."""
    block = by_name(name)
    operands, expected = exact_case(name, torch.float32)
    tensors = [t for t in operands[:3] if t is not None]
    for needs in itertools.product((False, True), repeat=len(tensors)):
        leaves = [t.detach().clone().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
        output = fused(block, *leaves)
        assert torch.equal(output, expected.output)
        assert output.requires_grad == any(needs)
        if not any(needs):
            assert output.grad_fn is None
            continue
        output.backward(operands.grad_output)
        for leaf, need, right in zip(leaves, needs, expected[2:], strict=False):
            assert (leaf.grad is not None) == need
            assert not need or torch.equal(leaf.grad, right)


def test_no_forward_code_without_grad():
    """no_grad and inference_mode: the same output, nothing recorded."""
    block = by_name("simplecnn2_n2")
    operands, expected = exact_case(block.name, torch.float32)
    leaves = [t.detach().requires_grad_() for t in operands[:3]]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output = fused(block, *leaves)
        assert torch.equal(output, expected.output)
        assert not output.requires_grad
    with torch.inference_mode():
        frozen = operands.input.clone()
        assert fused(block, frozen, *leaves[1:]).is_inference()


def test_an_inference_tensor_cannot_be_saved():
    """Outside of inference mode, as in the stock convolution, it is refused, not misused."""
    operands, _ = exact_case("simplecnn2_n2", torch.float32)
    with torch.inference_mode():
        frozen = operands.input.clone()
    weight = operands.weight.detach().requires_grad_()
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensors"):
        conv_relu_max_pool2d(frozen, weight, operands.bias, padding=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (0, 4, 9, 11)])
def test_empty_batch(shape, dtype):
    """Forward and backward of no images: right shapes, zero gradients of the parameters."""
    input = torch.empty(shape, dtype=dtype, requires_grad=True)
    weight = torch.ones(6, shape[1], 3, 3, dtype=dtype, requires_grad=True)
    bias = torch.ones(6, dtype=dtype, requires_grad=True)
    output = conv_relu_max_pool2d(input, weight, bias, padding=1)
    assert output.shape == (0, 6, shape[2] // 2, shape[3] // 2)
    assert output.dtype == dtype
    output.sum().backward()
    assert input.grad.shape == shape
    for parameter in (weight, bias):
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.dtype == dtype
        assert parameter.grad.eq(0).all()


def test_empty_batch_channels_last():
    input = torch.empty(0, 3, 8, 8).to(memory_format=torch.channels_last)
    output = conv_relu_max_pool2d(input, torch.ones(4, 3, 3, 3), None, padding=1)
    assert output.shape == (0, 4, 4, 4)


def saved_bytes(function) -> tuple[int, Tensor]:
    """Bytes of the distinct storages that `function`() saves for its backward, and its result."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return sum(storages.values()), result


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", SIMPLE_CNN)
def test_bytes_saved(name, layout):
    """Input, weight, and one byte per pooled output; nothing else."""
    block = by_name(name)
    operands, _ = exact_case(name, torch.float32)
    memory_format = getattr(torch, layout if layout == "channels_last" else "contiguous_format")
    input = operands.input.contiguous(memory_format=memory_format)
    leaves = [t.detach().requires_grad_() for t in (input, *operands[1:3])]
    count, output = saved_bytes(lambda: fused(block, *leaves))
    assert count == leaves[0].nbytes + leaves[1].nbytes + output.numel()


def test_bytes_saved_for_a_large_window():
    """A window of more than 255 elements: four bytes per pooled output."""
    block = by_name("window289")
    leaves = [t.requires_grad_() for t in integer_operands(block, torch.float32)[:3]]
    count, output = saved_bytes(lambda: fused(block, *leaves))
    assert count == leaves[0].nbytes + leaves[1].nbytes + 4 * output.numel()


def test_bytes_saved_beside_the_stock_layers():
    """Both blocks of the SimpleCNN in a row hold at most a fifth of what the stock layers hold."""
    first, second = (by_name(name) for name in SIMPLE_CNN)
    one, two = (exact_case(name, torch.float32)[0] for name in SIMPLE_CNN)
    parameters = [t.detach().requires_grad_() for t in (*one[1:3], *two[1:3])]

    def chain(block_1, block_2):
        return block_2(block_1(one.input, *parameters[:2]), *parameters[2:])

    ours, _ = saved_bytes(lambda: chain(lambda *t: fused(first, *t), lambda *t: fused(second, *t)))
    theirs, _ = saved_bytes(lambda: chain(first.stock, second.stock))
    held_by_parameters = sum(p.nbytes for p in parameters[::2])
    assert ours - held_by_parameters <= (theirs - held_by_parameters) / 5


@pytest.mark.parametrize("which", [0, 1])
def test_modifying_a_saved_tensor_is_an_error(which):
    """Input and weight are read by the backward; writing to them in between is caught."""
    operands, _ = exact_case("simplecnn2_n2", torch.float32)
    leaves = [t.detach().clone().requires_grad_() for t in operands[:3]]
    tensors = [leaf * 1 for leaf in leaves]  # not leaves, which may not be written to
    output = conv_relu_max_pool2d(*tensors, padding=1)
    tensors[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_modifying_bias_or_output_is_not():
    """Neither is saved: the gradients are those of before."""
    operands, expected = exact_case("simplecnn2_n2", torch.float32)
    leaves = [t.detach().clone().requires_grad_() for t in operands[:3]]
    bias = leaves[2] * 1
    output = conv_relu_max_pool2d(*leaves[:2], bias, padding=1)
    bias.zero_()
    output.mul_(1)  # in place, so that the stock ReLU's saved result would be written to
    output.backward(operands.grad_output)
    for leaf, right in zip(leaves, expected[2:], strict=True):
        assert torch.equal(leaf.grad, right)


def test_backward_twice():
    """retain_graph gives the same gradients again; without it the second call is an error."""
    operands, expected = exact_case("simplecnn2_n2", torch.float32)
    leaves = [t.detach().requires_grad_() for t in operands[:3]]
    output = conv_relu_max_pool2d(*leaves, padding=1)
    for _ in range(2):
        grads = torch.autograd.grad(output, leaves, operands.grad_output, retain_graph=True)
        for grad, right in zip(grads, expected[2:], strict=True):
            assert torch.equal(grad, right)
    output.backward(operands.grad_output)
    with pytest.raises(RuntimeError, match="second time"):
        output.backward(operands.grad_output)


def test_gradients_accumulate():
    """Two calls with one weight add up, as do two backward passes into .grad."""
    operands, expected = exact_case("simplecnn2_n2", torch.float32)
    leaves = [t.detach().requires_grad_() for t in operands[:3]]
    both = [conv_relu_max_pool2d(*leaves, padding=1) for _ in range(2)]
    torch.autograd.backward(both, [operands.grad_output, 2 * operands.grad_output])
    for leaf, right in zip(leaves, expected[2:], strict=True):
        assert torch.equal(leaf.grad, 3 * right)


def test_no_gradient_arrives():
    """An undefined output gradient is no gradient, not a crash or a tensor of zeros."""
    operands, _ = exact_case("simplecnn2_n2", torch.float32)
    leaves = [t.detach().requires_grad_() for t in operands[:3]]

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input):
            return input.clone()

        @staticmethod
        def backward(ctx, grad_output):
            return None

    output = Stop.apply(conv_relu_max_pool2d(*leaves, padding=1))
    output.sum().backward()
    assert all(leaf.grad is None for leaf in leaves)


def test_gradient_of_another_dtype_or_device_is_an_error_of_autograd():
    """The output's gradient must match the output; nothing reaches a kernel otherwise."""
    operands, _ = exact_case("simplecnn2_n2", torch.float32)
    weight = operands.weight.detach().requires_grad_()
    output = conv_relu_max_pool2d(operands.input, weight, operands.bias, padding=1)
    with pytest.raises(RuntimeError, match=r"[Mm]ismatch in shape"):
        output.backward(operands.grad_output[:, :, :1])


def test_tensor_hooks_and_retained_gradients():
    """The output is an ordinary node: hooks see its gradient and may change it."""
    operands, expected = exact_case("simplecnn2_n2", torch.float32)
    leaves = [t.detach().requires_grad_() for t in operands[:3]]
    output = conv_relu_max_pool2d(*leaves, padding=1)
    output.retain_grad()
    output.register_hook(lambda grad: 2 * grad)
    output.backward(operands.grad_output)
    assert torch.equal(output.grad, 2 * operands.grad_output)
    assert torch.equal(leaves[1].grad, 2 * expected.grad_weight)


def test_function_is_public():
    """ConvReLUMaxPool2dFunction takes the packed geometry."""
    block = by_name("simplecnn2_n2")
    operands, expected = exact_case(block.name, torch.float32)
    weight = operands.weight.detach().requires_grad_()
    output = ConvReLUMaxPool2dFunction.apply(operands.input, weight, operands.bias, block.pack())
    assert torch.equal(output, expected.output)
    output.backward(operands.grad_output)
    assert torch.equal(weight.grad, expected.grad_weight)


def test_views_of_parameters():
    """Weights computed from others (tied, scaled, transposed) receive their gradient."""
    operands, expected = exact_case("simplecnn2_n2", torch.float32)
    raw = (operands.weight / 2).transpose(2, 3).contiguous().requires_grad_()
    weight = (2 * raw).transpose(2, 3)
    output = conv_relu_max_pool2d(operands.input, weight, operands.bias, padding=1)
    output.backward(operands.grad_output)
    assert torch.equal(raw.grad, 2 * expected.grad_weight.transpose(2, 3))


@pytest.mark.slow
def test_more_than_two_gigabytes():
    """Offsets beyond 2^31 bytes: the last image of a large batch is where 32 bits would fail."""
    images = torch.zeros(17, 16, 2048, 2048, dtype=torch.bfloat16)  # 2.1 GiB
    images[-1] = 1
    weight = torch.ones(16, 16, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    output = conv_relu_max_pool2d(images, weight, None, pool_kernel_size=32)
    assert output[:-1].eq(0).all()
    assert output[-1].eq(16).all()
    output.sum().backward()
    assert weight.grad.eq(64 * 64).all()  # one winner in each window of the last image


def test_a_pool_stride_beyond_every_image():
    """A stride that no second window can use is as good as any: sizes must not overflow."""
    input, weight = torch.randn(1, 16, 8, 8), torch.randn(16, 16, 3, 3)
    expected = F.max_pool2d(F.relu(F.conv2d(input, weight)), 2, 6)
    for exponent in (40, 61, 62):
        output = conv_relu_max_pool2d(input, weight, pool_kernel_size=2, pool_stride=2**exponent)
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    ("dtype", "integer"), [(torch.bfloat16, 256), (torch.float16, 2048)], ids=str
)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_half_types_choose_the_winner_before_rounding(dtype, integer, kernel_size):
    """integer + 1 rounds to integer: the stock layers see a tie, and take the first of the two."""
    images = torch.zeros(1, 2, 2, 2, dtype=dtype)
    images[0, 0] = integer
    images[0, 1, 1, 1] = 1
    middle = kernel_size // 2
    weight = torch.zeros(1, 2, kernel_size, kernel_size, dtype=dtype)
    weight[..., middle, middle] = 1

    def stock(input, weight, padding):
        return F.max_pool2d(F.relu(F.conv2d(input, weight, padding=padding)), 2)

    def winner(function, dtype) -> int:
        leaf = images.to(dtype, copy=True).requires_grad_()
        output = function(leaf, weight.to(dtype), padding=middle)
        return torch.autograd.grad(output, leaf)[0][0, 0].argmax().item()

    assert winner(stock, dtype) == 0
    assert winner(stock, torch.float64) == 3
    assert winner(conv_relu_max_pool2d, dtype) == 3
