"""What autograd sees: which gradients come, what is saved, empty batches, modes, hooks."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from checks import assert_equal, leaves_of, over, over_dtypes, step
from fusedcnn import ConvReLUMaxPool2dFunction, conv_relu_max_pool2d
from geometries import by_name, stock
from reference import Operands, Result, exact_case, integer_operands, with_layout
from torch import Tensor

pytestmark = pytest.mark.usefixtures("exact")

# Bytes held for the backward are counted on both blocks of the SimpleCNN.
SIMPLE_CNN = ("simplecnn1_n5", "simplecnn2_n5")

fused = functools.partial(conv_relu_max_pool2d, padding=1)  # the block of `case`


@pytest.fixture
def case() -> tuple[Operands, Result, list[Tensor]]:
    """Operands, what is right for them, and input, weight and bias as leaves."""
    operands, expected = exact_case("simplecnn2_n2", torch.float32)
    return operands, expected, leaves_of(t.clone() for t in operands[:3])


@over(["simplecnn2_n2", "kernel5x5", "unbatched", "no_bias"])
def test_gradients_only_where_needed(block):
    """All subsets of (input, weight, bias): the right gradient, or none."""
    operands, expected = exact_case(block.name, torch.float32)
    tensors = [t for t in operands[:3] if t is not None]
    for needs in itertools.product((False, True), repeat=len(tensors)):
        leaves = [t.detach().clone().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
        output = block.fused(*leaves)
        assert torch.equal(output, expected.output)
        assert output.requires_grad == any(needs)
        if not any(needs):
            assert output.grad_fn is None
            continue
        output.backward(operands.grad_output)
        wanted = [g if n else None for g, n in zip(expected[2:], needs, strict=False)]
        assert_equal([leaf.grad for leaf in leaves], wanted)


def test_no_forward_code_without_grad(case):
    """no_grad and inference_mode: the same output, nothing recorded."""
    operands, expected, leaves = case
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output = fused(*leaves)
        assert torch.equal(output, expected.output)
        assert not output.requires_grad
    with torch.inference_mode():
        assert fused(operands.input.clone(), *leaves[1:]).is_inference()


def test_an_inference_tensor_cannot_be_saved(case):
    """Outside of inference mode, as in the stock convolution, it is refused, not misused."""
    with torch.inference_mode():
        frozen = case[0].input.clone()
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensors"):
        fused(frozen, *case[2][1:])


@over_dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (0, 4, 9, 11)])
def test_empty_batch(shape, layout, dtype):
    """Forward and backward of no images: right shapes, zero gradients of the parameters."""
    tensors = torch.empty(shape), torch.ones(6, shape[1], 3, 3), torch.ones(6)
    tensors = [with_layout(t, layout).to(dtype) for t in tensors]
    output, *grads = step(fused, tensors)
    assert_equal(output, torch.empty(0, 6, shape[2] // 2, shape[3] // 2, dtype=dtype))
    assert_equal(grads, [torch.zeros_like(t) for t in tensors])


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
@pytest.mark.parametrize(("name", "code"), [*((n, 1) for n in SIMPLE_CNN), ("window289", 4)])
def test_bytes_saved(name, code, layout):
    """Input, weight, and one byte per pooled output, or four for windows of more than 255 elements;
    nothing else.
    """
    block = by_name(name)
    tensors = integer_operands(block, torch.float32)[:3]
    leaves = leaves_of(with_layout(t, layout) for t in tensors)
    count, output = saved_bytes(lambda: block.fused(*leaves))
    assert count == leaves[0].nbytes + leaves[1].nbytes + code * output.numel()


def test_bytes_saved_beside_the_stock_layers():
    """Both blocks of the SimpleCNN in a row hold at most a fifth of what the stock layers hold."""
    first, second = (by_name(name) for name in SIMPLE_CNN)
    one, two = (exact_case(name, torch.float32)[0] for name in SIMPLE_CNN)
    parameters = leaves_of((*one[1:3], *two[1:3]))

    def chain(block_1, block_2):
        return block_2(block_1(one.input, *parameters[:2]), *parameters[2:])

    ours, _ = saved_bytes(lambda: chain(first.fused, second.fused))
    theirs, _ = saved_bytes(lambda: chain(first.stock, second.stock))
    held_by_parameters = sum(p.nbytes for p in parameters[::2])
    assert ours - held_by_parameters <= (theirs - held_by_parameters) / 5


@pytest.mark.parametrize("which", [0, 1])
def test_modifying_a_saved_tensor_is_an_error(case, which):
    """Input and weight are read by the backward; writing to them in between is caught."""
    tensors = [leaf * 1 for leaf in case[2]]  # not leaves, which may not be written to
    output = fused(*tensors)
    tensors[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_modifying_bias_or_output_is_not(case):
    """Neither is saved: the gradients are those of before."""
    operands, expected, leaves = case
    bias = leaves[2] * 1
    output = fused(*leaves[:2], bias)
    bias.zero_()
    output.mul_(1)  # in place, so that the stock ReLU's saved result would be written to
    output.backward(operands.grad_output)
    assert_equal([leaf.grad for leaf in leaves], list(expected[2:]))


def test_backward_twice(case):
    """retain_graph gives the same gradients again; without it the second call is an error."""
    operands, expected, leaves = case
    output = fused(*leaves)
    for _ in range(2):
        grads = torch.autograd.grad(output, leaves, operands.grad_output, retain_graph=True)
        assert_equal(grads, expected[2:])
    output.backward(operands.grad_output)
    with pytest.raises(RuntimeError, match="second time"):
        output.backward(operands.grad_output)


def test_gradients_accumulate(case):
    """Two calls with one weight add up, as do two backward passes into .grad."""
    operands, expected, leaves = case
    both = [fused(*leaves) for _ in range(2)]
    torch.autograd.backward(both, [operands.grad_output, 2 * operands.grad_output])
    assert_equal([leaf.grad for leaf in leaves], [3 * right for right in expected[2:]])


def test_no_gradient_arrives(case):
    """An undefined output gradient is no gradient, not a crash or a tensor of zeros."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input):
            return input.clone()

        @staticmethod
        def backward(ctx, grad_output):
            return None

    Stop.apply(fused(*case[2])).sum().backward()
    assert all(leaf.grad is None for leaf in case[2])


def test_gradient_of_another_shape_is_an_error_of_autograd(case):
    """The output's gradient must match the output; nothing reaches a kernel otherwise."""
    with pytest.raises(RuntimeError, match=r"[Mm]ismatch in shape"):
        fused(*case[2]).backward(case[0].grad_output[:, :, :1])


def test_tensor_hooks_and_retained_gradients(case):
    """The output is an ordinary node: hooks see its gradient and may change it."""
    operands, expected, leaves = case
    output = fused(*leaves)
    output.retain_grad()
    output.register_hook(lambda grad: 2 * grad)
    output.backward(operands.grad_output)
    assert torch.equal(output.grad, 2 * operands.grad_output)
    assert torch.equal(leaves[1].grad, 2 * expected.grad_weight)


def test_function_is_public(case):
    """ConvReLUMaxPool2dFunction takes the packed geometry."""
    operands, expected, leaves = case
    output = ConvReLUMaxPool2dFunction.apply(*leaves, by_name("simplecnn2_n2").pack())
    assert torch.equal(output, expected.output)
    output.backward(operands.grad_output)
    assert torch.equal(leaves[1].grad, expected.grad_weight)


def test_views_of_parameters(case):
    """Weights computed from others (tied, scaled, transposed) receive their gradient."""
    operands, expected, _ = case
    raw = (operands.weight / 2).transpose(2, 3).contiguous().requires_grad_()
    output = fused(operands.input, (2 * raw).transpose(2, 3), operands.bias)
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
    expected = stock(input, weight, pool_stride=6)
    for exponent in (40, 61, 62):
        output = conv_relu_max_pool2d(input, weight, pool_stride=2**exponent)
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
    weight = F.pad(torch.ones(1, 2, 1, 1, dtype=dtype), [middle] * 4)

    def winner(function, dtype) -> int:
        function = functools.partial(function, padding=middle)
        return step(function, [images.to(dtype), weight.to(dtype)])[1][0, 0].argmax().item()

    assert winner(stock, dtype) == 0
    assert winner(stock, torch.float64) == 3
    assert winner(conv_relu_max_pool2d, dtype) == 3
