"""FusedSimpleCNN's training forward as one autograd node: what its modules compute."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle

import fusedcnn
import pytest
import torch
from fusedcnn import FusedSimpleCNN, SimpleCNN
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


def make(dtype: torch.dtype = torch.float32) -> FusedSimpleCNN:
    torch.manual_seed(5)
    return FusedSimpleCNN().to(dtype)


def draw(count: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(7)).to(dtype)


def by_modules(model: nn.Module, images: Tensor) -> Tensor:
    return model.classifier(model.features(images))


def is_one_node(logits: Tensor) -> bool:
    return logits.grad_fn.name() == "SimpleCNNFunctionBackward"


def seeded(forward, *arguments) -> Tensor:
    torch.manual_seed(9)  # of the dropout
    return forward(*arguments)


def assert_same(ours, theirs) -> None:
    """To the bit, with None in the same places."""
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def assert_close(ours, theirs) -> None:
    """But for the order in which up to 2048 products are added: as far as 64 roundings of the
    largest element, a random walk of as many steps; with None in the same places."""
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            room = 64 * torch.finfo(other.dtype).eps * other.abs().max()
            assert one.dtype == other.dtype
            assert (one - other).abs().max() <= room


def gradients(logits: Tensor, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = iter(torch.autograd.grad(logits, wanted, grad))
    return tuple(next(grads) if leaf.requires_grad else None for leaf in leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("count", [1, 5])
def test_same_as_the_modules(count, training, channels_last, dtype):
    """Logits, all gradients, and the random numbers that are drawn."""
    model, images = make(dtype).train(training), draw(count, dtype)
    model.classifier[3].p = 0.3  # whose inverse has to be rounded
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    images.requires_grad_()
    leaves = [images, *model.parameters()]
    results = []
    for forward in (model, functools.partial(by_modules, model)):
        logits = seeded(forward, images)
        results.append((logits, *gradients(logits, leaves), torch.rand(1)))
        assert is_one_node(logits) is (forward is model)
    assert_close(*results)
    assert torch.equal(results[0][-1], results[1][-1])


def test_same_dropout_as_the_stock_model():
    """A step of each under one seed: what ReLU lets through is dropped in the same places."""
    fused, images = make(), draw(64)
    stock = SimpleCNN()
    stock.load_state_dict(fused.state_dict())
    dropped = {}
    handle = stock.classifier[3].register_forward_hook(
        lambda _module, inputs, output: dropped.update(stock=(output == 0) & (inputs[0] > 0))
    )
    seeded(stock, images)
    handle.remove()
    saved = seeded(fused, images).grad_fn.saved_tensors
    hidden, kept = saved[13:15]
    assert torch.equal((kept == 0) & (hidden > 0), dropped["stock"])
    assert 0.1 < dropped["stock"].float().mean() < 0.4


LEAVES = 9
SUBSETS = [
    *({i} for i in range(LEAVES)),
    *(set(range(LEAVES)) - {i} for i in range(LEAVES)),
    {7, 8},
]


@pytest.mark.parametrize("needed", SUBSETS, ids=lambda needed: "".join(map(str, sorted(needed))))
def test_some_gradients(needed):
    """The others are None."""
    model, images = make(), draw()
    leaves = [images, *model.parameters()]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in needed)
    logits = seeded(model, images)
    weights = {1, 3, 5, 7}  # of frozen layers, modules keep less
    assert is_one_node(logits) == (weights <= needed)
    expected = gradients(seeded(by_modules, model, images), leaves)
    assert_close(gradients(logits, leaves), expected)


def test_against_float64():
    """In float32 at most twice as far from the float64 gradients as the stock layers are.

    Where a window or a ReLU is tied to within rounding, either may go another way: such images are
    left out. The floor is the rounding of the largest element.
    """
    fused, images = make(), draw(64)
    stock = SimpleCNN()
    stock.load_state_dict(fused.state_dict())
    exact = copy.deepcopy(stock).double()
    planes = []
    for conv in (exact.features[0], exact.features[3], exact.classifier[1]):
        conv.register_forward_hook(lambda _module, _inputs, output: planes.append(output.detach()))
    with torch.no_grad():
        exact(images.double())
    clear = planes.pop().abs().amin(1) > 1e-5
    for plane in planes:
        windows = plane.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
        best, second = windows.topk(2).values.unbind(-1)
        margin = torch.where(best > 0, torch.minimum(best, best - second), -best)
        clear &= margin.flatten(1).amin(1) > 1e-5
    images = images[clear]
    assert len(images) >= 5
    results = []
    for model in (fused, stock, exact):
        logits = seeded(model, images.to(model.classifier[1].weight.dtype))
        results.append(gradients(logits, list(model.parameters())))
    for ours, theirs, reference in zip(*results, strict=True):
        floor = torch.finfo(torch.float32).eps * reference.abs().max()
        assert (ours - reference).abs().max() <= 2 * (theirs - reference).abs().max() + floor


def test_accumulation_over_two_calls():
    models = [make() for _ in range(2)]
    for forward in (models[0], functools.partial(by_modules, models[1])):
        torch.manual_seed(2)
        for images in (draw(), draw(2)):
            forward(images).square().sum().backward()
    assert_close(*([p.grad for p in model.parameters()] for model in models))


def test_graph_kept_for_two_calls():
    model = make()
    logits = seeded(model, draw())
    once = torch.autograd.grad(logits.sum(), list(model.parameters()), retain_graph=True)
    again = torch.autograd.grad(logits.sum(), list(model.parameters()))
    assert_same(once, again)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        logits.sum().backward()


def test_parameter_changed_before_the_backward():
    model = make()
    logits = model(draw())
    with torch.no_grad():
        model.classifier[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


@pytest.mark.parametrize("training", [False, True])
def test_double_backward(training):
    """Of a gradient's norm, and with images that come from a parameter themselves."""
    model = make(torch.float64).train(training)
    leaves = [draw(2, torch.float64).requires_grad_(), *model.parameters()]
    results = []
    for forward in (model, functools.partial(by_modules, model)):
        images = leaves[0] * leaves[1].sum()
        logits = seeded(forward, images)
        first = torch.autograd.grad(logits.square().sum(), leaves, create_graph=True)
        norm = sum(grad.square().sum() for grad in first)
        results.append((*first, *torch.autograd.grad(norm, leaves)))
    # Sums of at most a few thousand float64 terms, in four stages each way.
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    assert all(grad.abs().max() > 0 for grad in results[0])


def test_batched_gradients():
    """As torch.autograd.functional.jacobian(vectorize=True) asks for them."""
    model, images = make(torch.float64), draw(2, torch.float64)
    results = []
    for forward in (model, functools.partial(by_modules, model)):
        logits = seeded(forward, images)
        cotangents = torch.eye(logits.numel()).to(logits).view(-1, *logits.shape)
        leaves = list(model.parameters())
        results.append(torch.autograd.grad(logits, leaves, cotangents, is_grads_batched=True))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_checkpointed():
    model, images = make(), draw()
    expected = torch.autograd.grad(seeded(model, images).sum(), list(model.parameters()))
    logits = seeded(functools.partial(checkpoint, use_reentrant=False), model, images)
    # Whoever looks at it while it recomputes finds the same tensors saved.
    model.classifier[1].register_forward_hook(lambda *_: None)
    assert_close(torch.autograd.grad(logits.sum(), list(model.parameters())), expected)


def test_copies():
    images = draw()
    model = make()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_one_node(copied(images))
        assert_same([seeded(copied, images)], [seeded(model, images)])


@pytest.mark.parametrize("count", [3, 40])
def test_any_number_of_threads(count):
    model, images = make(), draw(count)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(seeded(model, images), list(model.parameters())))
    finally:
        torch.set_num_threads(before)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_other_sizes_of_the_classifier():
    model, images = FusedSimpleCNN(3), draw()
    model.classifier[1], model.classifier[4] = nn.Linear(2048, 7), nn.Linear(7, 1)
    logits = seeded(model, images)
    assert is_one_node(logits)
    assert_close([logits], [seeded(by_modules, model, images)])


# ---- the plain way -------------------------------------------------------------------------------
#
# Whatever is unusual: the modules are called, and hooks and whoever replaced a part see it.


def hooked(register: str):
    return lambda model: getattr(model.classifier[2], register)(lambda *_: None)


def replaced(path: str, module: nn.Module):
    return lambda model: model.set_submodule(path, module)


def attribute(path: str, **values):
    def change(model):
        for name, value in values.items():
            setattr(model.get_submodule(path), name, value)

    return change


class OwnLinear(nn.Linear):
    pass


CHANGES = {
    "forward hook": hooked("register_forward_hook"),
    "forward pre-hook": hooked("register_forward_pre_hook"),
    "backward hook": hooked("register_full_backward_hook"),
    "backward pre-hook": hooked("register_full_backward_pre_hook"),
    "hook on a container": lambda m: m.features.register_forward_hook(lambda *_: None),
    "another layer": replaced("classifier.2", nn.GELU()),
    "another block": replaced("features.1", nn.Dropout(0.1)),
    "derived layer": replaced("classifier.4", OwnLinear(128, 10)),
    "another classifier": replaced("classifier", nn.Sequential(nn.Flatten(), nn.Linear(2048, 10))),
    "no bias": replaced("classifier.4", nn.Linear(128, 10, bias=False)),
    "one layer more": lambda m: m.classifier.append(nn.Softmax(1)),
    "own forward": lambda m: setattr(m.classifier[2], "forward", torch.sin),
    "compiled part": lambda m: m.classifier.compile(backend="eager"),
    "parametrised": lambda m: parametrizations.spectral_norm(m.classifier[1]),
    "weight_norm": lambda m: parametrizations.weight_norm(m.features[3]),
    "computed weight": lambda m: torch.nn.utils.spectral_norm(m.classifier[4]),
    "frozen": lambda m: m.requires_grad_(False),
    "flattened elsewhere": attribute("classifier.0", start_dim=-3),
    "padding mode": attribute(
        "features.0", padding_mode="circular", _reversed_padding_repeated_twice=[1, 1, 1, 1]
    ),
    "pool": attribute("features.3", pool_kernel_size=3, pool_padding=1),
    "everything dropped": attribute("classifier.3", p=1.0),
    "a tensor's share dropped": attribute("classifier.3", p=torch.tensor(0.5)),
    "frozen features": lambda m: m.features.requires_grad_(False),
    "stock blocks": lambda m: fusedcnn.unfuse(m, inplace=True),
    "half type": lambda m: m.bfloat16(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_model(name):
    model = make()
    CHANGES[name](model)
    images = draw().to(next(model.parameters()).dtype)
    if name == "frozen":
        assert not model(images).requires_grad
        return
    states = copy.deepcopy(model.state_dict())  # of the power iteration, too
    logits = seeded(model, images)
    assert not is_one_node(logits)
    model.load_state_dict(states)
    assert torch.equal(logits, seeded(by_modules, model, images))


def test_hooks_are_called():
    """And seen by the gradients."""
    model = make()
    model.classifier[2].register_forward_hook(lambda _module, _inputs, output: output * 0)
    assert torch.equal(model(draw()), model.classifier[4].bias.expand(3, 10))
    seen = []
    with_global = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    make()(draw())
    with_global.remove()
    assert len(seen) == 14


def test_replaced_class(monkeypatch):
    """As libraries do that put other kernels into all layers of a class."""
    model = make()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x.new_ones(len(x), 128))
    assert torch.equal(model.eval()(draw()), torch.ones(3, 128))


class Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, function, _types, arguments=(), keywords=None):
        self.names.add(getattr(function, "__name__", ""))
        return function(*arguments, **keywords or {})


@pytest.mark.parametrize(
    "context",
    [
        functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16),
        Seen,
        functools.partial(FlopCounterMode, display=False),
        torch.autograd.forward_ad.dual_level,
        functools.partial(torch.autograd.graph.saved_tensors_hooks, lambda t: t, lambda t: t),
    ],
)
def test_context(context):
    model, images = make(), draw()
    with context() as entered:
        logits = seeded(model, images)
        assert torch.equal(logits, seeded(by_modules, model, images))
    assert not is_one_node(logits)
    if isinstance(entered, Seen):
        assert {"conv_relu_max_pool2d", "relu", "dropout", "linear"} <= entered.names


def test_default_device_changes_nothing():
    with torch.device("cpu"):
        assert is_one_node(make()(draw()))


def test_frozen_features_made_for_inference():
    """Nothing of them is kept for a backward that does not reach them."""
    model = make()
    model.features.requires_grad_(False)
    with torch.inference_mode():
        images = draw() + 0
    model(images).sum().backward()
    assert model.classifier[1].weight.grad is not None


def test_forward_mode_from_the_backward_on():
    """Tangents of the gradients, which nothing else has recorded."""
    forward_ad = torch.autograd.forward_ad
    model, images = make(torch.float64).eval(), draw(3, torch.float64)
    tangents = []
    for forward in (model, functools.partial(by_modules, model)):
        logits = forward(images)
        with forward_ad.dual_level():
            grad = forward_ad.make_dual(torch.ones_like(logits), torch.ones_like(logits))
            (result,) = torch.autograd.grad(logits, model.classifier[1].weight, grad)
            assert not result.requires_grad
            tangents.append(forward_ad.unpack_dual(result).tangent)
    torch.testing.assert_close(*tangents, rtol=1e-10, atol=1e-12)


class OwnTensor(Tensor):
    pass


@pytest.mark.parametrize(
    "images",
    [
        draw().as_subclass(OwnTensor),
        draw(0),
        draw().to_sparse(),
        draw()[:, :2],
        torch.zeros(3, 3, 40, 40),
        torch.zeros(3, 32, 32),
        draw().double(),
        None,
    ],
    ids=["subclass", "empty", "sparse", "channels", "size", "unbatched", "dtype", "none"],
)
def test_other_images(images):
    """What the modules answer, be it an error."""
    model, results = make(), []
    for forward in (model, functools.partial(by_modules, model)):
        error = contextlib.nullcontext()
        try:
            results.append(seeded(forward, images))
            assert not is_one_node(results[-1])
        except (RuntimeError, TypeError, AttributeError, NotImplementedError) as raised:
            error = raised
            results.append(f"{type(error)} {error}")
    assert type(results[0]) is type(results[1])
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        assert torch.equal(*results)


def test_empty_batch_trains():
    model = make()
    model(draw(0)).sum().backward()
    assert all(parameter.grad.abs().max() == 0 for parameter in model.parameters())


def test_not_while_compiling():
    """torch.compile and export see the layers."""
    model, images = make(), draw()
    program = torch.export.export(model, (images,))
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("conv_relu_max_pool2d" in name for name in names) == 2
    assert sum("linear" in name for name in names) == 2
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.equal(seeded(compiled, images), seeded(by_modules, model, images))
    assert len(graphs) == 1


def test_functional_call():
    """Parameters from outside, plain tensors and under torch.func.grad, go through the modules."""
    model, images = make(torch.float64).eval(), draw(2, torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values):
        return torch.func.functional_call(model, values, (images,)).square().sum()

    expected = torch.autograd.grad(by_modules(model, images).square().sum(), model.parameters())
    torch.testing.assert_close(list(torch.func.grad(loss)(parameters).values()), list(expected))
