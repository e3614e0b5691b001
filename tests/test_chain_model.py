"""FusedSimpleCNN in evaluation mode: one operator call, where nobody can tell the difference."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import fusedcnn
import pytest
import torch
from fusedcnn import inference
from fusedcnn._chain import chain_op
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

# Logits from two evaluation orders in float32: sums of at most 2,049 terms with magnitudes below 1,
# three layers after one another.
CLOSE = {"rtol": 0, "atol": 3 * 2049 * 2.0**-24}


@pytest.fixture
def model() -> nn.Module:
    return fusedcnn.FusedSimpleCNN().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 32, 32)


class Doubling(TorchDispatchMode):
    """Doubles what a linear layer computes."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is torch.ops.aten.addmm.default else result


def in_one_call(model: nn.Module, images: Tensor) -> bool:
    """Whether the model takes the operator, whose result it returns."""
    results = []

    def noting(*arguments):
        results.append(chain_op(*arguments))
        return results[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "chain_op", noting)
        output = model(images)
    assert len(results) <= 1
    return bool(results) and output is results[0]


def layer_by_layer(model: nn.Module, images: Tensor) -> Tensor:
    return model.classifier(model.features(images))


@pytest.mark.parametrize("n", [0, 1, 2, 5, 33])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_one_call(mode, n, model):
    images = torch.randn(n, 3, 32, 32)
    with mode():
        assert in_one_call(model, images)
        output = model(images)
        torch.testing.assert_close(output, layer_by_layer(model, images), **CLOSE)
    assert output.is_inference() == (mode is torch.inference_mode)
    assert not output.requires_grad


def test_as_accurate_as_the_stock_model(model, images):
    """Against float64: no further off than the stock layers, give or take their own error."""
    stock = fusedcnn.SimpleCNN().eval()
    stock.load_state_dict(model.state_dict())
    images = torch.randn(256, 3, 32, 32)
    with torch.no_grad():
        ours, theirs = model(images), stock(images)
        exact = stock.double()(images.double())
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def test_num_classes_and_any_images(images):
    """Channels_last, expanded and sliced images; another number of classes."""
    model = fusedcnn.FusedSimpleCNN(3).eval()
    with torch.no_grad():
        for layout in (
            images.contiguous(memory_format=torch.channels_last),
            images[:1].expand(4, -1, -1, -1),
            torch.randn(2, 3, 64, 64)[..., ::2, 1::2],
        ):
            assert in_one_call(model, layout)
            assert model(layout).shape == (len(layout), 3)
            torch.testing.assert_close(model(layout), layer_by_layer(model, layout), **CLOSE)


@torch.no_grad()
def test_training_mode_and_gradients_go_layer_by_layer(model, images):
    assert not in_one_call(model.train(), images)
    model.eval()
    model.classifier.train()  # dropout is on
    assert not in_one_call(model, images)
    model.eval()
    model.features.train()  # which makes no difference
    assert in_one_call(model, images)
    with torch.enable_grad():
        assert not in_one_call(model, images)
        model(images).sum().backward()
        assert model.features[0].weight.grad is not None
        assert in_one_call(model.requires_grad_(False), images)
        assert not in_one_call(model, images.requires_grad_())


@torch.no_grad()
def test_parameters_changed_and_replaced(model, images):
    """The next call sees what an optimizer, load_state_dict or a user has done."""
    before = model(images)
    for parameter in model.parameters():
        parameter.mul_(1.5)
        assert in_one_call(model, images)
        after = model(images)
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, layer_by_layer(model, images), rtol=1e-5, atol=1e-4)
        before = after
    other = fusedcnn.FusedSimpleCNN().eval()
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(images), other(images))
    model.classifier[4].weight = nn.Parameter(torch.zeros(10, 128))
    assert in_one_call(model, images)
    assert torch.equal(model(images), model.classifier[4].bias.expand(5, -1))
    model.classifier[4] = nn.Linear(128, 4)  # for other classes
    model.features = nn.Sequential(*model.features)
    assert in_one_call(model, images)
    torch.testing.assert_close(model(images), layer_by_layer(model, images), rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_copies_and_pickles(model, images):
    """Each is its own: nothing of the original is kept."""
    expected = model(images)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for parameter in model.parameters():
            parameter.neg_()
        assert in_one_call(made, images)
        assert torch.equal(made(images), expected)
        for parameter in model.parameters():
            parameter.neg_()


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class Other(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def replaced(path: str, module: Callable[[], nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        sequential, index = path.split(".")
        getattr(model, sequential)[int(index)] = module()

    return change


def with_attribute(path: str, name: str, value: object) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model.get_submodule(path), name, value)


def doubled(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
    return output * 2


def with_buffers(model: nn.Module) -> None:
    last = model.classifier[4]
    weight, bias = last.weight.detach(), last.bias.detach()
    del last.weight, last.bias
    last.register_buffer("weight", weight)
    last.register_buffer("bias", bias)


def with_tensors(model: nn.Module) -> None:
    last = model.classifier[4]
    weight, bias = last.weight.detach(), last.bias.detach()
    del last.weight, last.bias
    last.weight, last.bias = weight, bias


# What makes a model unusual: after each, it computes what its layers compute, one by one.
UNUSUAL = {
    "derived_layer": replaced("classifier.4", lambda: Other(128, 10).eval()),
    "activation": replaced("classifier.2", nn.GELU),
    "identity": replaced("features.2", lambda: nn.AvgPool2d(1)),
    "dropout": replaced("classifier.3", nn.Identity),
    "block": replaced("features.3", lambda: fusedcnn.ConvReLUMaxPool2d(16, 32, 3, padding="same")),
    "stock_block": lambda model: fusedcnn.unfuse(model, inplace=True),
    "appended": lambda model: model.classifier.append(nn.Softmax(1)),
    "prepended": lambda model: model.features.insert(0, nn.InstanceNorm2d(3)),
    "forward_hook": lambda model: model.features[4].register_forward_hook(doubled),
    "pre_hook": lambda model: model.classifier[2].register_forward_pre_hook(lambda m, a: a[0] * 2),
    "sequential_hook": lambda model: model.features.register_forward_hook(doubled),
    "forward": with_attribute("features.1", "forward", torch.neg),
    "parametrized": lambda model: parametrize.register_parametrization(
        model.features[0], "weight", Halved()
    ),
    "weight_norm": lambda model: nn.utils.parametrizations.weight_norm(model.classifier[1]),
    "old_weight_norm": lambda model: nn.utils.weight_norm(model.classifier[1]),
    "pruned": lambda model: prune.random_unstructured(model.classifier[1], "weight", 0.5),
    "no_bias": lambda model: model.classifier[4].register_parameter("bias", None),
    "buffers": with_buffers,
    "tensors": with_tensors,
    "shadowed": lambda model: vars(model.classifier[4]).update(bias=torch.ones(10)),
    "shadowed_features": lambda model: vars(model).update(features=nn.Identity()),
    "pool": with_attribute("features.3", "pool_kernel_size", (2, 2)),
    "padding_mode": with_attribute("features.0", "padding_mode", "circular"),
    "ceil_mode": with_attribute("features.0", "ceil_mode", True),
    "flatten": with_attribute("classifier.0", "end_dim", 3),
    "a_second_dropout": with_attribute("classifier.3", "training", True),
    "float64": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
@torch.no_grad()
def test_unusual_models_go_layer_by_layer(name, model, images):
    assert in_one_call(model, images)
    UNUSUAL[name](model)
    images = images.to(next(model.parameters()).dtype)
    if name != "shadowed_features":  # whose output does not fit the classifier
        assert not in_one_call(model, images)
    if name not in ("float64", "bfloat16"):  # which are the input's, too
        assert inference.parameters_as_built(model) is None  # what torch.compile follows
    if name not in ("a_second_dropout", "shadowed_features"):
        torch.testing.assert_close(model(images), layer_by_layer(model, images), **CLOSE)


@torch.no_grad()
def test_hooks_come_and_go(model, images):
    """Those on the model itself run, whichever way its layers are computed."""
    handle = model.features[0].register_forward_hook(doubled)
    assert not in_one_call(model, images)
    handle.remove()
    assert in_one_call(model, images)
    plain = model(images)
    handle = model.register_forward_hook(doubled)
    assert torch.equal(model(images), plain * 2)
    handle.remove()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    model(images)
    handle.remove()
    assert {*model.modules()} == {*seen}


class Wrapped(Tensor):
    pass


def under_function_mode(model: nn.Module, images: Tensor) -> bool:
    with torch.overrides.BaseTorchFunctionMode():
        return in_one_call(model, images)


def under_autocast(model: nn.Module, images: Tensor) -> bool:
    with torch.autocast("cpu", torch.bfloat16):
        return in_one_call(model, images)


def in_forward_mode(model: nn.Module, images: Tensor) -> bool:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(images, torch.ones_like(images))
        return in_one_call(model, dual)


def with_wrapped_parameter(model: nn.Module, images: Tensor) -> bool:
    model.classifier[4].weight = nn.Parameter(model.classifier[4].weight.as_subclass(Wrapped))
    return in_one_call(model, images)


CALLS = {
    "function_mode": under_function_mode,
    "autocast": under_autocast,
    "forward_mode": in_forward_mode,
    "subclass": lambda model, images: in_one_call(model, images.as_subclass(Wrapped)),
    "wrapped_parameter": with_wrapped_parameter,
    "float64": lambda model, images: in_one_call(model.double(), images.double()),
    "meta": lambda model, images: in_one_call(model.to("meta"), images.to("meta")),
}


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_unusual_calls_go_layer_by_layer(name, model, images):
    assert not CALLS[name](model, images)


@torch.no_grad()
def test_under_a_dispatch_mode(model, images):
    plain = model(images)
    with Doubling():
        assert not in_one_call(model, images)
        # Both linear layers: 4 times, but for the biases.
        assert not torch.allclose(model(images), plain)


@torch.no_grad()
def test_patched_class(model, images, monkeypatch):
    plain, forward = model(images), nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * forward(self, x))
    assert not in_one_call(model, images)
    assert not torch.allclose(model(images), plain)


@torch.no_grad()
def test_default_device_changes_nothing(model, images):
    with torch.device("cpu"):
        assert in_one_call(model, images)


class Quantized(Tensor):
    """A weight of another representation, which only a linear layer can read."""

    @staticmethod
    def __new__(cls, dense):
        return Tensor._make_wrapper_subclass(cls, dense.shape, dtype=dense.dtype)

    def __init__(self, dense):
        self.dense = dense

    def __tensor_flatten__(self):
        return ["dense"], None

    @staticmethod
    def __tensor_unflatten__(inner, _context, _size, _stride):
        return Quantized(inner["dense"])

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            input, weight, bias = args
            return function(input, weight.dense, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Quantized(args[0].dense.detach())
        raise NotImplementedError(f"Quantized has no {function}")


@torch.no_grad()
def test_weights_of_another_representation(model, images):
    """Only their own layer can compute with them, in a graph as well."""
    plain = model(images)
    weight = model.classifier[4].weight
    model.classifier[4].weight = nn.Parameter(Quantized(weight.detach()), requires_grad=False)
    for forward in (model, torch.compile(model, backend="eager")):
        torch.testing.assert_close(forward(images), plain, **CLOSE)
    torch._dynamo.reset()


@torch.no_grad()
def test_vmap_over_a_model(model, images):
    expected = torch.stack([model(image[None]) for image in images])
    batched = torch.vmap(lambda image: model(image[None]))(images)
    torch.testing.assert_close(batched, expected, **CLOSE)


WRONG = {
    "channels": (torch.ones(2, 1, 32, 32), r"^input: expected 3 channels"),
    "size": (torch.ones(2, 3, 28, 28), "shapes cannot be multiplied"),
    "dtype": (torch.ones(2, 3, 32, 32).double(), "^weight: expected float64 like input"),
    "rank": (torch.ones(2, 3), "^input: expected"),
    "integers": (torch.ones(2, 3, 32, 32).int(), "^input: expected float32"),
}


@pytest.mark.parametrize("name", WRONG)
@torch.no_grad()
def test_errors_are_those_of_the_layers(name, model):
    images, message = WRONG[name]
    with pytest.raises(RuntimeError, match=message):
        model(images)
    with pytest.raises((TypeError, AttributeError), match=r"expected a Tensor|has no attribute"):
        model("images")


@torch.no_grad()
def test_a_parameter_elsewhere(model, images):
    """On another device: an error, not a result without values."""
    model.classifier[4].to("meta")
    with pytest.raises(RuntimeError):
        model(images)


@torch.no_grad()
def test_a_forced_kernel(model, images):
    """Forcing and measuring reach the blocks in the chain, too."""
    plain = model(images)
    with fusedcnn._ops.force("", "general"):
        torch.testing.assert_close(model(images), plain, **CLOSE)
        assert fusedcnn._C.last_selected()["forward"] == "general"
    fusedcnn.backends.benchmark = True
    try:
        torch.testing.assert_close(model(images), plain, **CLOSE)
    finally:
        fusedcnn.backends.benchmark = False


def test_compiled(model, images):
    """One graph with one operator; a change of mode is seen."""
    graphs = []

    def keep(graph, inputs):
        graphs.append([n.target for n in graph.graph.nodes if "fusedcnn" in str(n.target)])
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=keep)
    with torch.no_grad():
        assert torch.equal(compiled(images), model(images))
        model.train()
        compiled(images)
    torch._dynamo.reset()
    assert [len(graph) for graph in graphs] == [1, 2]
    assert graphs[0] == [chain_op]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_exported(training, strict, model, images):
    """Of the model in evaluation mode, one call; in training mode, one a block."""
    model.train(training)
    program = torch.export.export(model, (images,), strict=strict)
    targets = [n.target for n in program.graph.nodes if "fusedcnn" in str(n.target)]
    assert (targets == [chain_op]) == (not training)
    assert len(targets) == 1 + training


def test_gradients_of_an_exported_program(model, images):
    """Which the operator computes again, layer by layer."""
    program = torch.export.export(model, (images,)).module()
    assert any(n.target is chain_op for n in program.graph.nodes)
    program(images).square().sum().backward()
    model(images).square().sum().backward()
    theirs = dict(model.named_parameters())
    for name, ours in program.named_parameters():
        # Sums of 5 * 1,024 terms, of gradients that are sums of 128.
        torch.testing.assert_close(ours.grad, theirs[name].grad, rtol=1e-4, atol=1e-4)
