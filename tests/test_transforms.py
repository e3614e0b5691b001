"""torch.func: grad, vjp, jacrev, vmap, jvp and their compositions, against the stock layers.

All in float64, where the two differ by the rounding of sums of at most a few hundred terms of order
1 to 100.
"""

from __future__ import annotations

import copy

import fusedcnn
import pytest
import torch
import torch.nn.functional as F
from fusedcnn import conv_relu_max_pool2d
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)

CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def fused(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return conv_relu_max_pool2d(input, weight, bias, padding=1)


def stock(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.max_pool2d(F.relu(F.conv2d(input, weight, bias, padding=1)), 2)


def operands(*batches: int, ensemble: tuple[int, ...] = (), seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (*batches, 2, 6, 4), (*ensemble, 3, 2, 3, 3), (*ensemble, 3)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)


def assert_agree(transformed) -> None:
    """`transformed` maps one of the two functions to tensors."""
    ours, theirs = (torch.utils._pytree.tree_leaves(transformed(f)) for f in (fused, stock))
    assert len(ours) > 0
    torch.testing.assert_close(ours, theirs, **CLOSE)


def loss(function):
    return lambda *t: function(*t).square().sum()


@pytest.mark.parametrize("argnums", [0, 1, 2, (0, 1, 2)])
def test_grad(argnums):
    tensors = operands(2)
    assert_agree(lambda f: grad(loss(f), argnums)(*tensors))
    assert_agree(lambda f: grad_and_value(loss(f), argnums)(*tensors))


def test_grad_of_grad():
    assert_agree(lambda f: grad(loss(grad(loss(f), 1)), (0, 1))(*operands(2)))


def test_vjp():
    cotangent = torch.randn(2, 3, 3, 2, dtype=torch.float64)

    def run(f):
        output, pull = vjp(f, *operands(2))
        return output, pull(cotangent)

    assert_agree(run)


def test_jacobians():
    tensors = operands(1)
    assert_agree(lambda f: jacrev(f, (0, 1, 2))(*tensors))
    assert_agree(lambda f: jacfwd(f, (0, 1, 2))(*tensors))
    assert_agree(lambda f: hessian(loss(f), 2)(*tensors))


def test_jvp():
    tensors, tangents = operands(2), operands(2, seed=1)
    assert_agree(lambda f: jvp(f, tensors, tangents))
    assert_agree(lambda f: linearize(f, *tensors)[1](*tangents))
    assert_agree(lambda f: vmap(lambda t: jvp(f, tensors, (t, *tangents[1:])))(
        torch.stack([tangents[0], -tangents[0]])))  # fmt: skip
    # Forward over reverse: a Hessian-vector product.
    assert_agree(lambda f: jvp(grad(loss(f), (0, 1, 2)), tensors, tangents))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_dual_numbers(which):
    """Also where one operand alone has a tangent, and through the module."""
    tensors = list(operands(2))
    module = fusedcnn.ConvReLUMaxPool2d(2, 3, 3, padding=1).double()

    def run(f):
        with forward_ad.dual_level():
            duals = list(tensors)
            duals[which] = forward_ad.make_dual(duals[which], torch.ones_like(duals[which]))
            return forward_ad.unpack_dual(f(*duals))

    def by_module(input, weight, bias):
        return functional_call(module, {"weight": weight, "bias": bias}, input)

    assert_agree(run)
    assert_agree(lambda f: run(by_module if f is fused else f))


@pytest.mark.parametrize(
    ("batches", "ensemble", "in_dims"),
    [
        ((4, 2), (), (0, None, None)),  # over inputs
        ((4,), (), (0, None, None)),  # over images without a batch
        ((2,), (5,), (None, 0, 0)),  # over weights: an ensemble on the same images
        ((5, 2), (5,), (0, 0, 0)),  # over both: each with its own
        ((2,), (5,), (None, 0, None)),
    ],
)
def test_vmap(batches, ensemble, in_dims):
    input, weight, bias = operands(*batches, ensemble=ensemble)
    bias = bias[0] if ensemble and in_dims[2] is None else bias
    assert_agree(lambda f: vmap(f, in_dims)(input, weight, bias))
    assert_agree(lambda f: vmap(f, in_dims[:2])(input, weight))
    assert_agree(lambda f: vmap(grad(loss(f), (0, 1, 2)), in_dims)(input, weight, bias))
    assert_agree(lambda f: vmap(f, in_dims, out_dims=1)(input, weight, bias))


def test_vmap_of_vmap_and_chunks():
    input, weight, bias = operands(4, 2, ensemble=(3,))
    assert_agree(lambda f: vmap(vmap(f, (0, None, None)), (None, 0, 0))(input, weight, bias))
    assert_agree(lambda f: vmap(f, (0, None, None), chunk_size=3)(input, weight[0], bias[0]))


def test_per_sample_gradients_of_the_model():
    """functional_call and vmap(grad), equal to one backward a sample."""
    model = fusedcnn.FusedSimpleCNN().double().eval()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    labels = torch.tensor([1, 2, 3])
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def one(parameters, image, label):
        return F.cross_entropy(functional_call(model, parameters, image[None]), label[None])

    ours = vmap(grad(one), (None, 0, 0))(parameters, images, labels)
    for i in range(3):
        model.zero_grad()
        F.cross_entropy(model(images[i : i + 1]), labels[i : i + 1]).backward()
        theirs = {name: p.grad for name, p in model.named_parameters()}
        torch.testing.assert_close({name: g[i] for name, g in ours.items()}, theirs, **CLOSE)


def test_ensembles_of_models():
    """stack_module_state, as in torch's tutorial on ensembling."""
    models = [fusedcnn.FusedSimpleCNN().double().eval() for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    outputs = vmap(lambda p, b: functional_call(base, (p, b), images))(parameters, buffers)
    expected = torch.stack([model(images) for model in models])
    torch.testing.assert_close(outputs, expected, **CLOSE)


def test_compiled_transforms():
    """torch.compile over per-sample gradients."""
    tensors = operands(4)
    transformed = vmap(grad(loss(fused), (1, 2)), (0, None, None))
    torch._dynamo.reset()
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), transformed(*tensors), **CLOSE)
    torch._dynamo.reset()


@pytest.mark.parametrize("vectorize", [False, True])
def test_autograd_functional_jacobian(vectorize):
    """The older interface; its forward mode cannot batch the stock layers either."""
    jacobian = torch.autograd.functional.jacobian
    assert_agree(lambda f: jacobian(f, operands(1), vectorize=vectorize))


def test_batched_gradients():
    """is_grads_batched runs the backward under vmap."""
    tensors = [t.requires_grad_() for t in operands(2)]
    cotangents = torch.randn(4, 2, 3, 3, 2, dtype=torch.float64)
    assert_agree(
        lambda f: torch.autograd.grad(f(*tensors), tensors, cotangents, is_grads_batched=True)
    )


def test_gradient_penalty_of_the_model():
    """A step of WGAN-GP's kind: the gradient's norm at the images, differentiated once more."""
    reference = fusedcnn.SimpleCNN(1).double().eval()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    results = []
    for model in (reference, fusedcnn.fuse(reference)):
        leaf = images.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(leaf).sum(), leaf, create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
        wanted = [p for name, p in model.named_parameters() if name.endswith("weight")]
        results.append([penalty, *torch.autograd.grad(penalty, wanted)])
    assert isinstance(model.features[0], fusedcnn.ConvReLUMaxPool2d)
    torch.testing.assert_close(results[1], results[0], **CLOSE)


def test_a_folded_model_under_transforms():
    """A fused stranger under vmap(grad)."""
    layers = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)
    model = nn.Sequential(*layers).double().eval()
    model[1].running_mean.uniform_(-1, 1)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    images = torch.randn(4, 2, 6, 6, dtype=torch.float64)
    results = []
    for module in (model, fusedcnn.fuse(model)):

        def one(parameters, image, module=module):
            return functional_call(module, parameters, image[None]).square().sum()

        results.append(vmap(grad(one), (None, 0))(parameters, images))
    torch.testing.assert_close(results[1], results[0], **CLOSE)
