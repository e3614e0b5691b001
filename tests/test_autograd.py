"""Derivatives of both orders, and the registered operators.

Under torch.compile, export, torch.func and autocast: test_compile.py, test_export.py,
test_transforms.py, test_torch_features.py.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from checks import assert_equal, leaves_of, over, step
from fusedcnn import conv_relu_max_pool2d
from geometries import Block
from reference import with_layout
from torch import Tensor

# Small, since gradcheck runs the block once or twice per number in its operands.
SPECIALISED = Block("specialised", (2, 1, 4, 4), 2, padding=1)
SAME_EVEN = Block("same_even", (1, 2, 4, 5), 2, kernel=(2, 4), padding="same")
OVERLAPPING = Block("overlapping", (1, 2, 5, 6), 1, padding=1, pool=3, pool_stride=1)
UNBATCHED = Block("unbatched", (2, 5, 6), 3, padding=1)
WIDE_CODES = Block("wide_codes", (1, 1, 16, 18), 2, kernel=1, pool=16, pool_stride=1)
BLOCKS = [
    SPECIALISED,
    Block("no_bias", (1, 2, 5, 4), 2, padding=1, bias=False),
    SAME_EVEN,
    OVERLAPPING,
    UNBATCHED,
    Block("groups", (1, 4, 4, 4), 4, kernel=2, groups=2),
    Block("depthwise", (1, 3, 5, 5), 3, padding=1, groups=3),
    Block("padded_pool", (1, 1, 5, 5), 2, padding=1, pool=3, pool_stride=2, pool_padding=1),
    Block("stride_dilation", (1, 2, 7, 5), 1, stride=(2, 1), dilation=(1, 2), padding=2),
    Block("gapped_ceil", (1, 1, 7, 8), 2, pool=2, pool_stride=3, ceil_mode=True),
    Block("dilated_pool", (1, 1, 7, 7), 2, pool_dilation=2),
]

# Half the distance that finite differences (1e-6 in an operand, of sums of at most 20 terms no
# larger than 4) can move an element by is far below this.
MARGIN = 1e-3

forward = torch.ops.fusedcnn.conv_relu_max_pool2d.default
backward = torch.ops.fusedcnn.conv_relu_max_pool2d_backward.default

# Sums of at most a few hundred float64 terms of order 1 to 100, in three stages.
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)


def operands(block: Block, seed: int = 0) -> list[Tensor]:
    """Leaves whose every window has one clear winner, clearly on one side of 0.

    The block has no derivative elsewhere. Seeds are tried in turn until the margins hold.
    """
    while True:
        generator = torch.Generator().manual_seed(seed)
        shapes = [block.input, block.weight] + [(block.out_channels,)] * block.bias
        leaves = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        leaves = [leaf.clamp(-2, 2).requires_grad_() for leaf in leaves]
        if smallest_margin(block, leaves) > MARGIN:
            return leaves
        seed += 1000


@torch.no_grad()
def smallest_margin(block: Block, leaves: list[Tensor]) -> float:
    """Smallest distance of a window's maximum to its second, where above 0, and of any to 0."""
    plane = block.conv(*leaves)
    pooled, index = F.max_pool2d(plane, *block.pool_arguments, return_indices=True)
    margin = pooled.abs().min().item()
    # Windows overlap, so the maxima are taken out one at a time.
    flat, where = plane.flatten(-2), index.flatten(-2)
    for place in range(where.shape[-1]):
        without = flat.scatter(-1, where[..., place : place + 1], -torch.inf).view_as(plane)
        second = F.max_pool2d(without, *block.pool_arguments).flatten(-2)[..., place]
        best = pooled.flatten(-2)[..., place]
        margin = min(margin, torch.where(best > 0, best - second, torch.inf).min().item())
    return margin


@over(BLOCKS)
def test_gradcheck(block):
    assert torch.autograd.gradcheck(block.fused, operands(block))


@over(BLOCKS)
def test_gradgradcheck(block):
    # Along random directions, which takes a tenth of the time of all numbers one by one.
    assert torch.autograd.gradgradcheck(block.fused, operands(block), fast_mode=True)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradgradcheck_of_one_operand(which):
    """Only some of the gradients' gradients are asked for."""
    leaves = operands(SPECIALISED)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == which)
    assert torch.autograd.gradgradcheck(
        lambda leaf: SPECIALISED.fused(*leaves[:which], leaf, *leaves[which + 1 :]), leaves[which]
    )


def test_gradcheck_of_the_registered_operators():
    """The path of torch.compile and export, and the backward operator by itself."""
    block = Block("smallest", (1, 1, 4, 4), 2, padding=1)
    leaves, geometry = operands(block), block.pack()
    output, code = forward(*leaves, geometry, True)
    assert not code.requires_grad
    assert torch.autograd.gradcheck(lambda *t: forward(*t, geometry, True)[0], leaves)
    assert torch.autograd.gradgradcheck(lambda *t: forward(*t, geometry, True)[0], leaves)

    def gradients(mask: int, *tensors: Tensor) -> list[Tensor]:
        results = backward(*tensors, code.detach(), geometry, mask)
        return [grad for bit, grad in enumerate(results) if mask >> bit & 1]

    tensors = [torch.randn_like(output).requires_grad_(), *leaves[:2]]
    for mask in (1, 6, 7):
        assert torch.autograd.gradcheck(functools.partial(gradients, mask), tensors)


@over(BLOCKS)
def test_gradient_penalty(block):
    """The common use of double backward."""

    def penalty(*leaves: Tensor, function) -> Tensor:
        output = function(*leaves)
        (gradient,) = torch.autograd.grad(output.square().sum(), leaves[0], create_graph=True)
        return output.sum() + (gradient.square().sum().sqrt() - 1).square()

    ours, theirs = (
        step(functools.partial(penalty, function=function), operands(block))
        for function in (block.fused, block.stock)
    )
    assert_close(ours, theirs)


def test_third_derivative():
    """Whatever order is asked for, it is the stock layers' or an error: here the third."""

    def third(function) -> Tensor:
        leaves = operands(SPECIALISED)
        value = function(*leaves).pow(3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, leaves[1], create_graph=True)
            value = gradient.pow(2).sum()
        return gradient.detach()

    assert_close(third(SPECIALISED.fused), third(SPECIALISED.stock), rtol=1e-10, atol=0)


def test_hessian_vector_product():
    """In all three operands at once."""
    leaves = tuple(operands(SPECIALISED))
    vectors = tuple(torch.randn_like(leaf) for leaf in leaves)

    def product(function):
        return torch.autograd.functional.hvp(
            lambda *t: function(*t).square().sum(), leaves, vectors
        )

    assert_close(product(SPECIALISED.fused), product(SPECIALISED.stock))


# ---- the registered operators -------------------------------------------------------------------


def test_the_operator_without_a_code_can_be_differentiated():
    """As in a program that was exported under no_grad: the backward finds the winners itself."""
    leaves, geometry = operands(SPECIALISED), SPECIALISED.pack()
    with_code, without = (
        step(lambda *t, code=code: forward(*t, geometry, code)[0].square().sum(), leaves)
        for code in (True, False)
    )
    assert_equal(without, with_code)
    assert torch.autograd.gradgradcheck(lambda *t: forward(*t, geometry, False)[0], leaves)


over_layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def operator_arguments(block: Block, layout: str) -> list[Tensor | None]:
    """Input, weight and bias, the input in this layout if it is a batch."""
    tensors = [t.detach() for t in operands(block)]
    if tensors[0].dim() == 4:
        tensors[0] = with_layout(tensors[0], layout)
    return tensors + [None] * (3 - len(tensors))


@over_layouts
@over([SPECIALISED, SAME_EVEN._replace(bias=False), WIDE_CODES, UNBATCHED])
def test_opcheck_forward(block, layout):
    """Schema, fake tensors (shapes and strides), autograd registration and dynamic shapes."""
    tensors = operator_arguments(block, layout)
    for with_code in (True, False):
        torch.library.opcheck(forward, (*tensors, list(block.pack()), with_code))
    torch.library.opcheck(forward, (*leaves_of(tensors), list(block.pack()), True))


@over_layouts
@over([SPECIALISED, OVERLAPPING, UNBATCHED])
def test_opcheck_backward(block, layout):
    input, weight, bias = operator_arguments(block, layout)
    geometry = list(block.pack())
    output, code = forward(input, weight, bias, geometry, True)
    for mask in (1, 6, 7):
        arguments = (torch.randn_like(output), input, weight, code, geometry, mask)
        torch.library.opcheck(backward, arguments)


def test_tensor_subclasses_are_asked():
    """__torch_function__ sees the call, as it sees those of torch.nn.functional."""
    seen = []

    class Watched(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    input = torch.ones(1, 1, 4, 4).as_subclass(Watched)
    output = conv_relu_max_pool2d(input, torch.ones(1, 1, 3, 3))
    assert seen[0] is conv_relu_max_pool2d
    assert_equal(output.as_subclass(Tensor), torch.full((1, 1, 1, 1), 9.0))
