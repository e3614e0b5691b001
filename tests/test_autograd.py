"""Derivatives of both orders, the registered operators, torch.compile, torch.func, autocast."""

from __future__ import annotations

import fusedcnn
import pytest
import torch
import torch.nn.functional as F
from fusedcnn import conv_relu_max_pool2d
from geometries import Block
from reference import with_layout
from torch import Tensor

# Small, since gradcheck runs the block once or twice per number in its operands.
BLOCKS = [
    Block("specialised", (2, 1, 4, 4), 2, padding=1),
    Block("no_bias", (1, 2, 5, 4), 2, padding=1, bias=False),
    Block("same_even", (1, 2, 4, 5), 2, kernel=(2, 4), padding="same"),
    Block("groups", (1, 4, 4, 4), 4, kernel=2, groups=2),
    Block("depthwise", (1, 3, 5, 5), 3, padding=1, groups=3),
    Block("overlapping", (1, 2, 5, 6), 1, padding=1, pool=3, pool_stride=1),
    Block("padded_pool", (1, 1, 5, 5), 2, padding=1, pool=3, pool_stride=2, pool_padding=1),
    Block("stride_dilation", (1, 2, 7, 5), 1, stride=(2, 1), dilation=(1, 2), padding=2),
    Block("gapped_ceil", (1, 1, 7, 8), 2, pool=2, pool_stride=3, ceil_mode=True),
    Block("dilated_pool", (1, 1, 7, 7), 2, pool_dilation=2),
    Block("unbatched", (2, 5, 6), 3, padding=1),
]
over_blocks = pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)

# Half the distance that finite differences (1e-6 in an operand, of sums of at most 20 terms no
# larger than 4) can move an element by is far below this.
MARGIN = 1e-3


def operands(block: Block, seed: int = 0, dtype=torch.float64) -> list[Tensor]:
    """Leaves whose every window has one clear winner, clearly on one side of 0.

    The block has no derivative elsewhere. Seeds are tried in turn until the margins hold.
    """
    while True:
        generator = torch.Generator().manual_seed(seed)
        shapes = [block.input, block.weight] + [(block.out_channels,)] * block.bias
        leaves = [torch.randn(s, generator=generator, dtype=dtype) for s in shapes]
        leaves = [leaf.clamp(-2, 2).requires_grad_() for leaf in leaves]
        if smallest_margin(block, leaves) > MARGIN:
            return leaves
        seed += 1000


def smallest_margin(block: Block, leaves: list[Tensor]) -> float:
    """Smallest distance of a window's maximum to its second, where above 0, and of any to 0."""
    with torch.no_grad():
        plane = block.conv(*leaves, *[None] * (3 - len(leaves)))
        pooled, index = F.max_pool2d(plane, *block.pool_arguments, return_indices=True)
        margin = pooled.abs().min().item()
        # Windows overlap, so the maxima are taken out one at a time.
        flat, where = plane.flatten(-2), index.flatten(-2)
        for place in range(where.shape[-1]):
            one = where[..., place : place + 1]
            without = flat.scatter(-1, one, -torch.inf).view_as(plane)
            second = F.max_pool2d(without, *block.pool_arguments).flatten(-2)[..., place]
            best = pooled.flatten(-2)[..., place]
            gap = torch.where(best > 0, best - second, torch.inf)
            margin = min(margin, gap.min().item())
        return margin


def fused(block: Block, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return conv_relu_max_pool2d(input, weight, bias, *block.conv_arguments, **block.fused_keywords)


def stock(block: Block, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return block.stock(input, weight, bias)


@over_blocks
def test_gradcheck(block):
    leaves = operands(block)
    assert torch.autograd.gradcheck(lambda *t: fused(block, *t), leaves)


@over_blocks
def test_gradgradcheck(block):
    leaves = operands(block)
    assert torch.autograd.gradgradcheck(lambda *t: fused(block, *t), leaves)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradgradcheck_of_one_operand(which):
    """Only some of the gradients' gradients are asked for."""
    block = BLOCKS[0]
    leaves = operands(block)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == which)

    assert torch.autograd.gradgradcheck(
        lambda leaf: fused(block, *leaves[:which], leaf, *leaves[which + 1 :]), leaves[which]
    )


def test_gradcheck_of_the_registered_operators():
    """The path of torch.compile and export, and the backward operator by itself."""
    block = Block("smallest", (1, 1, 4, 4), 2, padding=1)
    leaves = operands(block)
    geometry = block.pack()
    forward = torch.ops.fusedcnn.conv_relu_max_pool2d
    backward = torch.ops.fusedcnn.conv_relu_max_pool2d_backward
    output, code = forward(*leaves, geometry, True)
    assert not code.requires_grad
    assert torch.autograd.gradcheck(lambda *t: forward(*t, geometry, True)[0], leaves)
    assert torch.autograd.gradgradcheck(lambda *t: forward(*t, geometry, True)[0], leaves)
    grad_output = torch.randn_like(output).requires_grad_()
    for mask in (1, 6, 7):
        assert torch.autograd.gradcheck(
            lambda *t, mask=mask: [
                grad
                for bit, grad in enumerate(backward(*t, code.detach(), geometry, mask))
                if mask >> bit & 1
            ],
            [grad_output, *leaves[:2]],
        )


@over_blocks
def test_gradient_penalty(block):
    """A step of a gradient penalty, the common use of double backward, as the stock layers do it.

    Sums of at most a few hundred float64 terms of order 1 to 100, in three stages.
    """

    def penalty_gradients(function):
        leaves = [leaf.detach().requires_grad_() for leaf in operands(block)]
        output = function(block, *leaves)
        (gradient,) = torch.autograd.grad(output.square().sum(), leaves[0], create_graph=True)
        loss = output.sum() + (gradient.square().sum().sqrt() - 1).square()
        loss.backward()
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    for ours, theirs in zip(penalty_gradients(fused), penalty_gradients(stock), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_third_derivative():
    """Whatever order is asked for, it is the stock layers' or an error: here the third."""
    block = BLOCKS[0]

    def third(function):
        input, weight, bias = operands(block)
        value = function(block, input, weight, bias).pow(3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, weight, create_graph=True)
            value = gradient.pow(2).sum()
        return gradient.detach()

    torch.testing.assert_close(third(fused), third(stock), rtol=1e-10, atol=0)


def test_hessian_vector_product():
    """A Hessian-vector product in all three operands at once."""
    block = BLOCKS[0]
    leaves = operands(block)
    vectors = tuple(torch.randn_like(leaf) for leaf in leaves)

    def loss(function):
        return lambda *t: function(block, *t).square().sum()

    _, ours = torch.autograd.functional.hvp(loss(fused), tuple(leaves), vectors)
    _, theirs = torch.autograd.functional.hvp(loss(stock), tuple(leaves), vectors)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


# ---- the registered operators -------------------------------------------------------------------


def test_the_operator_without_a_code_can_be_differentiated():
    """As in a program that was exported under no_grad: the backward finds the winners itself."""
    block = BLOCKS[0]
    leaves = operands(block)
    results = []
    for with_code in (True, False):
        output, _ = torch.ops.fusedcnn.conv_relu_max_pool2d(*leaves, block.pack(), with_code)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    forward = torch.ops.fusedcnn.conv_relu_max_pool2d
    assert torch.autograd.gradgradcheck(lambda *t: forward(*t, block.pack(), False)[0], leaves)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["specialised", "no_bias", "overlapping", "unbatched"])
def test_opcheck_forward(name, layout):
    """Schema, fake tensors (shapes and strides), autograd registration and dynamic shapes."""
    block = next(b for b in BLOCKS if b.name == name)
    leaves = [t.detach() for t in operands(block)]
    leaves[0] = with_layout(leaves[0], layout) if block.name != "unbatched" else leaves[0]
    leaves += [None] * (3 - len(leaves))
    op = torch.ops.fusedcnn.conv_relu_max_pool2d.default
    for with_code in (True, False):
        torch.library.opcheck(op, (*leaves, list(block.pack()), with_code))
    needing = [t if t is None else t.requires_grad_() for t in leaves]
    torch.library.opcheck(op, (*needing, list(block.pack()), True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["specialised", "overlapping", "unbatched"])
def test_opcheck_backward(name, layout):
    block = next(b for b in BLOCKS if b.name == name)
    input, weight, bias = (t.detach() for t in operands(block))
    input = with_layout(input, layout) if block.name != "unbatched" else input
    geometry = list(block.pack())
    output, code = torch.ops.fusedcnn.conv_relu_max_pool2d(input, weight, bias, geometry, True)
    op = torch.ops.fusedcnn.conv_relu_max_pool2d_backward.default
    for mask in (1, 6, 7):
        torch.library.opcheck(op, (torch.randn_like(output), input, weight, code, geometry, mask))


# ---- torch.compile, torch.func, autocast --------------------------------------------------------


@pytest.fixture
def fresh_dynamo():
    """Nothing compiled before counts towards the recompile limit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["specialised", "same_even", "unbatched"])
def test_compile(name, fresh_dynamo):
    """Without a graph break, forward and backward, in eager's own numbers."""
    block = next(b for b in BLOCKS if b.name == name)
    leaves = operands(block)
    grad_output = torch.randn_like(fused(block, *leaves))

    def step(function):
        output = function(*leaves)
        return [output, *torch.autograd.grad(output, leaves, grad_output)]

    arguments, keywords = block.conv_arguments, block.fused_keywords

    def doubled(*tensors):
        return conv_relu_max_pool2d(*tensors, *arguments, **keywords) * 2

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(step(compiled), step(doubled), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(compiled(*leaves), doubled(*leaves))


def test_compile_with_dynamic_shapes(fresh_dynamo):
    """One graph for several batch and image sizes."""
    compiled = torch.compile(
        lambda *t: conv_relu_max_pool2d(*t, padding=1),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    weight, bias = torch.randn(4, 3, 3, 3), torch.randn(4)
    for shape in ((2, 3, 8, 8), (3, 3, 10, 12), (5, 3, 7, 9)):
        input = torch.randn(shape)
        expected = conv_relu_max_pool2d(input, weight, bias, padding=1)
        assert torch.equal(compiled(input, weight, bias), expected)


def test_compile_the_model(fresh_dynamo):
    """The whole drop-in, by its module."""
    model = fusedcnn.FusedSimpleCNN().eval()
    input = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), model(input), rtol=1e-5, atol=1e-6)


def test_export():
    """torch.export keeps the block as one operator."""
    model = fusedcnn.FusedSimpleCNN().eval()
    input = torch.randn(2, 3, 32, 32)
    program = torch.export.export(model, (input,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("fusedcnn.conv_relu_max_pool2d" in target for target in targets) == 2
    torch.testing.assert_close(program.module()(input), model(input), rtol=1e-5, atol=1e-6)


def test_func_grad_and_vmap():
    """Per-sample gradients, the common use of torch.func."""
    block = BLOCKS[0]
    input, weight, bias = (t.detach() for t in operands(block))

    def per_sample(function):
        def loss(weight, bias, image):
            return function(block, image, weight, bias).square().sum()

        gradient = torch.func.grad(loss, argnums=(0, 1))
        return torch.func.vmap(gradient, in_dims=(None, None, 0))(weight, bias, input)

    for ours, theirs in zip(per_sample(fused), per_sample(stock), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_func_jvp_and_dual_numbers():
    """Forward-mode differentiation, by both of torch's interfaces."""
    block = BLOCKS[0]
    leaves = tuple(t.detach() for t in operands(block))
    tangents = tuple(torch.randn_like(t) for t in leaves)
    _, ours = torch.func.jvp(lambda *t: fused(block, *t), leaves, tangents)
    _, theirs = torch.func.jvp(lambda *t: stock(block, *t), leaves, tangents)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    with torch.autograd.forward_ad.dual_level():
        duals = [
            torch.autograd.forward_ad.make_dual(t, tangent)
            for t, tangent in zip(leaves, tangents, strict=True)
        ]
        tangent = torch.autograd.forward_ad.unpack_dual(fused(block, *duals)).tangent
    torch.testing.assert_close(tangent, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Integers, so that both are exact: the same dtypes, the same values."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 8, 8), (4, 3, 3, 3), (4,))
    tensors = [torch.randint(-1, 2, shape, generator=generator).float() for shape in shapes]

    def step(function):
        leaves = [t.detach().requires_grad_() for t in tensors]
        with torch.autocast("cpu", dtype):
            output = function(*leaves)
        output.float().sum().backward()
        return [output.detach(), *(leaf.grad for leaf in leaves)]

    ours = step(lambda *t: conv_relu_max_pool2d(*t, padding=1))
    theirs = step(lambda *t: F.max_pool2d(F.relu(F.conv2d(*t, padding=1)), 2))
    assert ours[0].dtype == dtype
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_autocast_leaves_float64_alone():
    """As torch's own does."""
    input, weight = torch.ones(1, 1, 4, 4).double(), torch.ones(1, 1, 3, 3).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert conv_relu_max_pool2d(input, weight).dtype == torch.float64
        assert F.conv2d(input, weight).dtype == torch.float64


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
    assert torch.equal(output.as_subclass(Tensor), torch.full((1, 1, 1, 1), 9.0))
