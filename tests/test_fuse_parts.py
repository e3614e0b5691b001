"""fuse, and forwards that take a Sequential apart: its layers stay, whatever the idiom."""

from __future__ import annotations

import functools
import linecache
import types
from collections.abc import Callable
from typing import Any

import fusedcnn
import pytest
import torch
from fusing import LeNet, Net, assert_equal, block, blocks, integers, net, run, with_integers
from torch import Tensor, nn

pytestmark = [
    pytest.mark.usefixtures("exact"),
    pytest.mark.filterwarnings("ignore:fuse has replaced nothing"),
]


def two_blocks() -> nn.Sequential:
    return nn.Sequential(*block(), *block(channels=(4, 4)))


class Base(nn.Module):
    """Two chains in a Sequential, and a forward that torch.fx cannot follow."""

    def __init__(self, **attributes):
        super().__init__()
        self.features = two_blocks()
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, images):
        if images.sum() > 1e30:
            images = images + 1
        return self.run(images)


def first_two(layers, images):
    return layers[1](layers[0](images))


def outer_two(model, images):
    return first_two(model.features, images)


class Runner(nn.Module):
    def forward(self, layers, images):
        return first_two(layers, images)


# ---- parts ---------------------------------------------------------------------------------------

# What `run` of a class derived from Base returns; fuse reads it in the source.
IDIOMS = {
    "slice": "self.features[:2](images)",
    "index": "self.features[1](self.features[0](images))",
    "name of a layer": "getattr(self.features, '1')(getattr(self.features, '0')(images))",
    "iteration": "torch.stack([images := layer(images) for layer in list(self.features)[:2]])",
    "unpacking": "(lambda conv, relu, *_: relu(conv(images)))(*self.features)",
    "name": "(layers := self.features)[1](layers[0](images))",
    "children": "first_two(list(self.features.children()), images)",
    "own children": "first_two(next(iter(self.children())), images)",
    "modules": "first_two(list(self.modules())[2:], images)",
    "table": "first_two(list(self._modules['features']._modules.values()), images)",
    "dict": "first_two(self.__dict__['_modules']['features'], images)",
    "getattr": "first_two(getattr(self, 'features'), images)",
    "locals": "first_two(locals()['self'].features, images)",
    "submodule": "self.get_submodule('features.1')(self.get_submodule('features.0')(images))",
    "forward of the class": "nn.Sequential.forward(self.features[:2], images)",
    "argument": "first_two(self.features, images)",
    "self as argument": "outer_two(self, images)",
    "keyword": "first_two(layers=self.features, images=images)",
    "nested function": "(lambda i: self.features[i])(slice(2))(images)",
}


def derived(expression: str) -> type[Base]:
    """A class whose `run` returns the expression, its source where `inspect` looks for it."""
    source, file = f"def run(self, images):\n    return {expression}\n", f"<{expression}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    namespace: dict[str, Any] = {}
    exec(compile(source, file, "exec"), globals(), namespace)
    return type("Derived", (Base,), namespace)


class Helper(Base):
    def run(self, images):
        return self.help(images)

    def help(self, images):
        return first_two(self.features, images)


class Property(Base):
    @property
    def layers(self):
        return self.features

    def run(self, images):
        return first_two(self.layers, images)


class Super(Helper):
    def run(self, images):
        return super().run(images) + 1


class OldSuper(Helper):
    def run(self, images):
        return super(OldSuper, self).run(images) + 1  # noqa: UP008


class SuperChildren(Base):
    def run(self, images):
        return first_two(next(iter(super().children())), images)


class Decorated(Base):
    def tapping(function):  # noqa: N805
        def run(self, images):
            return first_two(self.features, images)

        return run

    @tapping
    def run(self, images):
        return self.features(images)


class OverriddenGetattr(Base):
    def __getattr__(self, name):
        if name == "tapped":
            return super().__getattr__("features")[:2]
        return super().__getattr__(name)

    def run(self, images):
        return self.tapped(images)


class OnSelf(nn.Sequential):
    def forward(self, images):
        if images.sum() > 1e30:
            return images
        return first_two(self, images)


class Tagged(list):
    """Holds more than what it lists."""


def tagged(layers: nn.Sequential) -> Tagged:
    result = Tagged()
    result.layers = layers
    return result


def called(held: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return held(images)


# Layers held beside the children: what the attribute is, and how it is used.
HELD = {
    "list": (lambda layers: list(layers), first_two),
    "object": (
        lambda layers: types.SimpleNamespace(deep={"layers": (layers,)}),
        lambda held, images: first_two(held.deep["layers"][0], images)),
    "list with a layer": (tagged, lambda held, images: first_two(held.layers, images)),
    "partial": (lambda layers: functools.partial(first_two, layers), called),
    "closure": (lambda layers: lambda images: first_two(layers, images), called),
    "default": (lambda layers: lambda images, layers=layers: first_two(layers, images), called),
    "method": (lambda layers: [layers.__getitem__], lambda held, x: held[0](slice(2))(x)),
}  # fmt: skip


def held(how: str) -> nn.Module:
    """A model that holds the layers of its `features` once more."""
    hold, use = HELD[how]
    model = derived("self.use(self.held, images)")(use=use)
    model.held = hold(model.features)
    return model


def grandchild() -> nn.Module:
    inner = nn.Module()
    inner.features = two_blocks()
    return derived("first_two(self.inner.features, images)")(features=None, inner=inner)


def called_by_two() -> nn.Module:
    """A Sequential in two places, taken apart in one of them."""
    model = derived("self.whole(images).mean() + first_two(self.features, images)")()
    model.whole = net(lambda self, images: self.layers(images), layers=model.features)
    return model


def followed() -> nn.Module:
    """torch.fx could follow this one, and would be told of other layers than those called."""

    def forward(self, images):
        for layer in self.held:
            images = layer(images)
        return images

    layers = nn.Sequential(*block(nn.BatchNorm2d(4)))
    return net(forward, layers=layers, held=tuple(layers))


def conv_in_a_table() -> nn.Module:
    model = net(lambda self, images: self.pool(self.relu(self.table["conv"](images))))
    model.table = {"conv": model.conv}
    return model


def followed_slice(self: Net, images: Tensor) -> Tensor:
    low = self.features[:2](images)
    return low.mean() + self.features[2:](low)


IN_PARTS = {
    **{name: derived(expression) for name, expression in IDIOMS.items()},
    **{
        cls.__name__: cls
        for cls in (Helper, Property, Super, OldSuper, SuperChildren, Decorated, OverriddenGetattr)
    },
    **{f"held: {how}": functools.partial(held, how) for how in HELD},
    "argument of a module": lambda: derived("self.runner(self.features, images)")(runner=Runner()),
    "called and in parts": lambda: derived("self.unit(images).mean() + self.unit.conv(images)")(
        features=None, unit=net(lambda self, images: self.pool(self.relu(self.conv(images))))),
    "grandchild": grandchild,
    "ModuleList": lambda: derived("self.stages[:1][0][:2](images)")(
        features=None, stages=nn.ModuleList([nn.Sequential(*block())])),
    "on self": lambda: OnSelf(*block()),
    "called by two": called_by_two,
    "followed slice": lambda: net(followed_slice, features=two_blocks()),
    "followed": followed,
    "convolution in a table": conv_in_a_table,
    "in a traced model": lambda: nn.Sequential(derived(IDIOMS["index"])(), nn.Flatten()),
    "in an untraced model": lambda: nn.DataParallel(derived(IDIOMS["index"])()),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_PARTS)
def test_layers_that_may_run_apart_stay(name):
    """The outputs and gradients are the model's, and the report says what is in the way."""
    model = with_integers(IN_PARTS[name]()).eval()
    images = integers((2, 3, 12, 12))
    expected, before = run(model, images), repr(model)
    fused, report = fusedcnn.fuse(model, report=True)
    assert_equal(run(fused, images), expected)
    assert repr(fused) == before
    assert not any(row.fused for row in report)
    assert any("torch.fx cannot follow its forward" in row.reason for row in report)
    apart = [row.reason for row in report if row.steps]
    assert all("which torch.fx cannot follow, may" in reason for reason in apart), apart


# ---- wholes --------------------------------------------------------------------------------------


class Config:
    """An object that holds no layers, and can be called."""

    def __init__(self):
        self.depth, self.name = [1, 2], "net"

    def __call__(self, images):
        return images


class Whole(Base):
    """Everything that forwards do around a whole call."""

    scale = 1.0

    def __init__(self):
        super().__init__(
            head=nn.Conv2d(4, 4, 1), act=torch.relu, config=Config(), kind=nn.ReLU, seen=None
        )
        self.register_buffer("mean", torch.zeros(1))

    @property
    def twice(self):
        return self.config.depth[1] * self.scale

    @torch.autocast("cpu", enabled=False)
    def run(self, images):
        assert isinstance(self.features, nn.Sequential)
        self.seen = images.shape
        self.count = len(self.features)
        if self.training and self.seen:
            images = images - self.mean
        images = self.config(self.act(self.features(images))) * self.twice
        assert self.kind is nn.ReLU
        return self.head(images) + self.head.out_channels + self.count + self.bias(images)

    @staticmethod
    def bias(images):
        return images.new_zeros(1)


class WholeByMethods(Base):
    def forward(self, images):
        return super().forward(images)

    def run(self, images):
        return sum(self.step(images) for _ in range(2))

    def step(self, images):
        return self.features(images)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (derived("self.features(images)"), (2, 3, 12, 12)),
        (Whole, (2, 3, 12, 12)),
        (WholeByMethods, (2, 3, 12, 12)),
        (lambda: derived("self.features(images)")(features=LeNet()), (2, 1, 28, 28)),
    ],
    ids=["expression", "much around it", "methods", "LeNet"],
)
def test_modules_that_are_called_as_a_whole_are_fused(make, shape):
    model = with_integers(make())
    fused = fusedcnn.fuse(model)
    assert blocks(fused) == 2
    images = integers(shape)
    for training in (True, False):
        assert_equal(run(fused.train(training), images), run(model.train(training), images))
