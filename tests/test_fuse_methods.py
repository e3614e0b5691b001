"""fuse, and the methods that forward calls: what they compute when called by themselves."""

from __future__ import annotations

import copy
import pickle
import warnings

import fusedcnn
import pytest
import torch
import torch.nn.functional as F
from fusing import Net, block, blocks
from torch import nn

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Modules(Net):
    """A method that runs the whole chain of modules."""

    def features(self, input):
        return self.pool(self.relu(self.conv(input)))

    def forward(self, input):
        return self.features(input).mean((2, 3))


class Functions(Modules):
    """A method whose functions stay in it when forward is rewritten."""

    def features(self, input):
        return F.max_pool2d(F.relu(self.conv(input)), 2)

    def mean(self, input):
        return self.features(input).mean()


class BeforeThePool(Net):
    """A method that runs a part of the chain."""

    def features(self, input):
        return self.relu(self.conv(input))

    def forward(self, input):
        return self.pool(self.features(input))


class BehindTheConvolution(Net):
    """A method that runs the modules that would be nn.Identity."""

    def reduce(self, input):
        return self.pool(self.relu(input))

    def forward(self, input):
        return self.reduce(self.conv(input))


class FunctionsBehind(BehindTheConvolution):
    """A method of nothing but functions, which mean the same to whoever calls it."""

    def reduce(self, input):
        return F.max_pool2d(F.relu(input), 2)


class Another(Net):
    """A method of a module inside that is no forward, with a function that stays in it."""

    def __init__(self):
        super().__init__(inner=Functions())

    def forward(self, input):
        return self.inner.features(input)


class ConvReLU(Net):
    def forward(self, input):
        return F.relu(self.conv(input))


class OfTheParent(Modules):
    """Methods around a child's forward: what they call is the rewritten forward."""

    def __init__(self):
        super().__init__(block=ConvReLU())

    def features(self, input):
        return self.pool(self.block(input))


def fused(cls):
    """A model, it fused with the same outputs, and the report's reason for its one chain."""
    model = cls().eval()
    other, report = fusedcnn.fuse(model, report=True)
    torch.testing.assert_close(other(IMAGES), model(IMAGES))
    (row,) = [row for row in report if row.steps]
    return model, other, row.reason


@pytest.mark.parametrize(
    ("cls", "method"),
    [(Modules, "features"), (OfTheParent, "features"), (FunctionsBehind, "reduce")],
)
def test_methods_that_still_compute_the_same(cls, method):
    model, other, reason = fused(cls)
    assert not reason
    assert blocks(other) == 1
    torch.testing.assert_close(getattr(other, method)(IMAGES), getattr(model, method)(IMAGES))


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (BeforeThePool, "'features' of the model can be called by itself, and runs only a part"),
        (BehindTheConvolution, "'reduce' of the model can be called by itself, and runs only"),
        (Another, "'features' of 'inner' can be called by itself, and relu cannot go there"),
    ],
)
def test_chains_that_methods_share(cls, reason):
    _, other, given = fused(cls)
    assert given.startswith(reason)
    assert blocks(other) == 0


def test_a_method_that_would_pool_twice_is_an_error():
    model, other, reason = fused(Functions)
    assert not reason
    for fused_model in (other, copy.deepcopy(other)):
        for method in (fused_model.features, fused_model.mean):
            with pytest.raises(RuntimeError, match=r"features: expected .* call fusedcnn\.unfuse"):
                method(IMAGES)
    again = fusedcnn.unfuse(other)
    torch.testing.assert_close(again.features(IMAGES), model.features(IMAGES))


# ---- methods that forward does not call ----------------------------------------------------------


class Unseen(Net):
    """Each method but the last ones runs a part of what is fused."""

    def __init__(self):
        super().__init__(features=nn.Sequential(*block(channels=(3, 3))))

    def forward(self, input):
        return self.pool(self.relu(self.conv(self.features(input))))

    def direct(self, input):
        return self.relu(self.conv(self.whole(input)))

    def sliced(self, input):
        return self.features[:2](input)

    def indexed(self, input):
        conv, relu = self.features[0], self.features[1]
        return relu(conv(input))

    def iterated(self, input):
        for layer in list(self.features)[:2]:
            input = layer(input)
        return input

    def walked(self, input):
        for layer in list(self.modules())[1:3]:
            input = layer(input)
        return input

    def handed(self, input):
        return first_two(self.features, input)

    def whole(self, input):
        return self.features(input)

    def initialise(self, scale):
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.constant_(module.weight, scale)
                module.reset_parameters()
        self.apply(lambda m: None)
        return len(self.features)


def first_two(layers, input):
    return layers[1](layers[0](input))


PARTS = ["direct", "sliced", "indexed", "iterated", "walked", "handed"]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("method", PARTS)
def test_methods_that_forward_does_not_call_warn(method, inplace):
    """Also of a copy; and no more after unfuse, where they are right."""
    model = Unseen().eval()
    expected = getattr(model, method)(IMAGES)
    other = fusedcnn.fuse(model, inplace=inplace)
    assert blocks(other) == 2
    for twin in (other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        with pytest.warns(UserWarning, match=rf"Unseen\.{method} .* call fusedcnn\.unfuse") as seen:
            getattr(twin, method)(IMAGES)
        assert seen[0].filename == __file__
    back = fusedcnn.unfuse(other)
    assert vars(back).keys() == vars(Unseen()).keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(getattr(back, method)(IMAGES), expected)


def test_methods_that_run_no_part_do_not_warn():
    model = Unseen().eval()
    fused = fusedcnn.fuse(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(fused.whole(IMAGES), model.whole(IMAGES))
        fused.initialise(1.0)
        fused(IMAGES)
    assert vars(fused).keys() - vars(model).keys() == set(PARTS)
