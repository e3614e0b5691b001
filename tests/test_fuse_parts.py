"""fuse, and forwards that take a Sequential apart: its layers stay, whatever the idiom."""

from __future__ import annotations

import functools
import types

import fusedcnn
import pytest
import torch
from fusing import LeNet, assert_equal, block, blocks, integers, run, with_integers
from torch import nn
from torch.utils.checkpoint import checkpoint_sequential

pytestmark = [
    pytest.mark.usefixtures("exact"),
    pytest.mark.filterwarnings("ignore:fuse has replaced nothing"),
]


class Base(nn.Module):
    """Two chains in a Sequential, and a forward that torch.fx cannot follow."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(*block(), *block(channels=(4, 4)))

    def forward(self, images):
        if images.sum() > 1e30:
            images = images + 1
        return self.run(images)

    def run(self, images):
        raise NotImplementedError


def by_value(images):
    """Not followed by torch.fx; 0 but for huge images."""
    return 1 if images.sum() > 1e30 else 0


def first_two(layers, images):
    return layers[1](layers[0](images))


def outer_two(model, images):
    return first_two(model.features, images)


# ---- parts ---------------------------------------------------------------------------------------


class Sliced(nn.Module):
    """Nothing else that torch.fx could not follow."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(*block(), *block(channels=(4, 4)))

    def forward(self, images):
        low = self.features[:2](images)
        return low.mean() + self.features[2:](low)


class SlicedInBase(Base):
    def run(self, images):
        return self.features[:2](images)


class Indexed(Base):
    def run(self, images):
        return self.features[1](self.features[0](images))


class IndexedByName(Base):
    def run(self, images):
        return getattr(self.features, "1")(getattr(self.features, "0")(images))


class Iterated(Base):
    def run(self, images):
        kept = []
        for layer in self.features:
            images = layer(images)
            kept.append(images.mean())
        return torch.stack(kept)


class Enumerated(Base):
    def run(self, images):
        for i, layer in enumerate(self.features):
            images = layer(images)
            if i == 1:
                break
        return images


class Listed(Base):
    def run(self, images):
        layers = list(self.features)
        return layers[1](layers[0](images))


class Unpacked(Base):
    def run(self, images):
        conv, relu, *_ = self.features
        return relu(conv(images))


class Named(Base):
    def run(self, images):
        layers = self.features
        return layers[1](layers[0](images))


class NamedByWalrus(Base):
    def run(self, images):
        return (layers := self.features)[1](layers[0](images))


class Children(Base):
    def run(self, images):
        for _, layer in zip(range(2), self.features.children(), strict=False):
            images = layer(images)
        return images


class NamedChildren(Base):
    def run(self, images):
        for name, layer in self.features.named_children():
            images = layer(images)
            if name == "1":
                break
        return images


class OwnChildren(Base):
    def run(self, images):
        return first_two(next(iter(self.children())), images)


class Modules(Base):
    def run(self, images):
        relu = next(m for m in self.modules() if isinstance(m, nn.ReLU))
        conv = next(m for m in self.modules() if isinstance(m, nn.Conv2d))
        return relu(conv(images))


class Table(Base):
    def run(self, images):
        return first_two(list(self._modules["features"]._modules.values()), images)


class Attributes(Base):
    def run(self, images):
        return first_two(self.__dict__["_modules"]["features"], images)


class ByGetattr(Base):
    def run(self, images):
        return first_two(getattr(self, "features"), images)  # noqa: B009


class ByVars(Base):
    def run(self, images):
        me = locals()["self"]
        return first_two(me.features, images)


class BySubmodule(Base):
    def run(self, images):
        return self.get_submodule("features.1")(self.get_submodule("features.0")(images))


class ForwardAlone(Base):
    """Past __call__ of the Sequential: also a use that is no call of it."""

    def run(self, images):
        return nn.Sequential.forward(self.features[:2], images)


class Handed(Base):
    def run(self, images):
        return first_two(self.features, images)


class HandedWhole(Base):
    def run(self, images):
        return outer_two(self, images)


class HandedByKeyword(Base):
    def run(self, images):
        return first_two(layers=self.features, images=images)


class Runner(nn.Module):
    def forward(self, layers, images):
        return first_two(layers, images)


class HandedToAModule(Base):
    def __init__(self):
        super().__init__()
        self.runner = Runner()

    def run(self, images):
        return self.runner(self.features, images)


class Checkpointed(Base):
    def run(self, images):
        return checkpoint_sequential(self.features, 4, images, use_reentrant=False)


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


class Super(Indexed):
    def run(self, images):
        return super().run(images) + 1


class OldSuper(Indexed):
    def run(self, images):
        return super(OldSuper, self).run(images) + 1  # noqa: UP008


class SuperChildren(Base):
    def run(self, images):
        return first_two(next(iter(super().children())), images)


class NestedFunction(Base):
    def run(self, images):
        def layer(i):
            return self.features[i]

        return layer(1)(layer(0)(images))


class OnSelf(nn.Sequential):
    def forward(self, images):
        if by_value(images):
            return images
        return first_two(self, images)


class Grandchild(Base):
    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.features = self.features
        del self.features

    def run(self, images):
        return first_two(self.inner.features, images)


class BesideItself(Base):
    """A unit that is called, and of which a layer is called."""

    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu, self.pool = block()

        def forward(self, images):
            return self.pool(self.relu(self.conv(images)))

    def __init__(self):
        super().__init__()
        self.unit = self.Unit()
        del self.features

    def run(self, images):
        return self.unit(images).mean() + self.unit.conv(images)


class ListOfLayers(Base):
    """Held beside the children."""

    def __init__(self):
        super().__init__()
        self.taps = [self.features[0], self.features[1]]

    def run(self, images):
        return first_two(self.taps, images)


class ObjectOfLayers(Base):
    def __init__(self):
        super().__init__()
        self.taps = types.SimpleNamespace(deep={"layers": (self.features,)})

    def run(self, images):
        return first_two(self.taps.deep["layers"][0], images)


class ListWithALayer(Base):
    """Objects that hold more than what they list, and objects without __dict__."""

    class Tagged(list):
        pass

    def __init__(self):
        super().__init__()
        self.taps = self.Tagged()
        self.taps.layers = self.features

    def run(self, images):
        return first_two(self.taps.layers, images)


class PartialOfLayers(Base):
    def __init__(self):
        super().__init__()
        self.tap = functools.partial(first_two, self.features)

    def run(self, images):
        return self.tap(images)


class FunctionOfLayers(Base):
    def __init__(self):
        super().__init__()
        self.tap = lambda images: first_two(self.features, images)

    def run(self, images):
        return self.tap(images)


class DefaultOfAFunction(Base):
    def __init__(self):
        super().__init__()
        self.tap = lambda images, layers=self.features: first_two(layers, images)

    def run(self, images):
        return self.tap(images)


class MethodList(Base):
    def __init__(self):
        super().__init__()
        self.steps = [self.features.__getitem__]

    def run(self, images):
        return self.steps[0](slice(2))(images)


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


class InAModuleList(Base):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([self.features[:3], self.features[3:]])
        del self.features

    def run(self, images):
        return self.stages[:1][0][:2](images)


class SharedByTwo(Base):
    """A Sequential in two places, taken apart in one of them."""

    class Whole(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, images):
            return self.layers(images)

    def __init__(self):
        super().__init__()
        self.whole = self.Whole(self.features)

    def run(self, images):
        return self.whole(images).mean() + first_two(self.features, images)


class NotChildrenButFollowed(nn.Module):
    """torch.fx could follow this one, and would be told of other layers than those called."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*block(nn.BatchNorm2d(4)))
        self.held = tuple(self.layers)

    def forward(self, images):
        for layer in self.held:
            images = layer(images)
        return images


class HeldConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.pool = block()
        self.table = {"conv": self.conv}

    def forward(self, images):
        return self.pool(self.relu(self.table["conv"](images)))


IN_PARTS = [
    Sliced, SlicedInBase, Indexed, IndexedByName, Iterated, Enumerated, Listed, Unpacked, Named,
    NamedByWalrus, Children, NamedChildren, OwnChildren, Modules, Table, Attributes, ByGetattr,
    ByVars, BySubmodule, ForwardAlone, Handed, HandedWhole, HandedByKeyword, HandedToAModule,
    Checkpointed, Helper, Property, Super, OldSuper, SuperChildren, NestedFunction, Grandchild,
    BesideItself, ListOfLayers, ObjectOfLayers,
    ListWithALayer, PartialOfLayers, FunctionOfLayers, DefaultOfAFunction, MethodList,
    Decorated, OverriddenGetattr, InAModuleList, SharedByTwo, NotChildrenButFollowed,
    HeldConvolution,
]  # fmt: skip
MAKERS = {cls.__name__: cls for cls in IN_PARTS} | {
    "OnSelf": lambda: OnSelf(*block()),
    "in a traced model": lambda: nn.Sequential(Indexed(), nn.Flatten()),
    "in an untraced model": lambda: nn.DataParallel(Indexed()),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_layers_that_may_run_apart_stay(name, inplace):
    """The outputs and gradients are the model's, and the report says what is in the way."""
    model = with_integers(MAKERS[name]()).eval()
    images = integers((2, 3, 12, 12))
    expected, before = run(model, images), repr(model)
    fused, report = fusedcnn.fuse(model, inplace=inplace, report=True)
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
        super().__init__()
        self.head = nn.Conv2d(4, 4, 1)
        self.act, self.config = torch.relu, Config()
        self.kind = nn.ReLU
        self.register_buffer("mean", torch.zeros(1))
        self.seen = None

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
    def run(self, images):
        return sum(self.step(images) for _ in range(2))

    def step(self, images):
        return self.features(images)


class WholeUnit(Base):
    def __init__(self):
        super().__init__()
        self.unit = LeNet()
        del self.features

    def run(self, images):
        return self.unit(images)


@pytest.mark.parametrize(
    ("cls", "count", "channels", "size"),
    [(Whole, 2, 3, 12), (WholeByMethods, 2, 3, 12), (WholeUnit, 2, 1, 28)],
)
def test_modules_that_are_called_as_a_whole_are_fused(cls, count, channels, size):
    model = with_integers(cls())
    fused = fusedcnn.fuse(model)
    assert blocks(fused) == count
    images = integers((2, channels, size, size))
    for training in (True, False):
        assert_equal(run(fused.train(training), images), run(model.train(training), images))
