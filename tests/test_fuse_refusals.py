"""What fuse leaves alone, why, and that nothing has changed then; bad input."""

from __future__ import annotations

import copy
import pickle
import sys

import fusedcnn
import pytest
import torch
import torch.nn.functional as F
from fusing import (
    LeNet,
    assert_equal,
    assert_fused,
    assert_left_alone,
    block,
    blocks,
    integers,
    run,
    with_integers,
)
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("exact")


# ---- what is left alone, and why -----------------------------------------------------------------


class Twice(nn.Module):
    """The value named by `where` has a second use."""

    def __init__(self, where):
        super().__init__()
        self.conv, self.relu, self.pool = block()
        self.where = where

    def forward(self, images):
        conv = self.conv(images)
        relu = self.relu(conv)
        other = {"conv": conv, "relu": relu}[self.where]
        return self.pool(relu).sum() + other.sum()


class Keeping(nn.Module):
    """The value in between is no result, but put somewhere."""

    def __init__(self, keep):
        super().__init__()
        self.conv, self.relu, self.pool = block()
        self.taps, self.keep = {"all": []}, keep

    def forward(self, images):
        images = self.relu(self.conv(images))
        self.keep(self, images)
        return self.pool(images)


class Indices(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images):
        pooled, index = F.max_pool2d(F.relu(self.conv(images)), 2, return_indices=True)
        return pooled + index


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images):
        images = F.max_pool2d(F.relu(self.conv(images)), 2)
        return F.max_pool2d(F.relu(self.conv(images)), 2)


class TiedWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.tied = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.tied.weight = self.conv.weight

    def forward(self, images):
        return self.tied(F.max_pool2d(F.relu(self.conv(images)), 2))


class ModeDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.pool = block()

    def forward(self, images):
        out = self.relu(self.conv(images))
        return out if self.training else self.pool(out)


class PoolByMode(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, images):
        return F.max_pool2d(F.relu(self.conv(images)), 2 if self.training else 3)


class PoolBySize(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, images):
        return F.max_pool2d(F.relu(self.conv(images)), images.shape[-1] // 4)


class FunctionalConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 3, 3, 3))

    def forward(self, images):
        return F.max_pool2d(F.relu(F.conv2d(images, self.weight)), 2)


class OptionalArgument(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, images, scale=None):
        out = F.max_pool2d(F.relu(self.conv(images)), 2)
        return out if scale is None else out * scale


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 3, 3), 0

    def forward(self, images):
        self.calls += 1
        return F.max_pool2d(F.relu(self.conv(images)), 2)


class FrozenNoise(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, images):
        return F.max_pool2d(F.relu(self.conv(images)), 2) + torch.randn(3, 1, 1)


class Surrounded(nn.Module):
    """Function calls in a context, none of which a graph of torch.fx holds."""

    def __init__(self, context):
        super().__init__()
        self.conv, self.context = nn.Conv2d(3, 3, 3), context

    def forward(self, images):
        with self.context():
            return F.max_pool2d(F.relu(self.conv(images)), 2)


class Decorated(Surrounded):
    @torch.no_grad()
    def forward(self, images):
        return F.max_pool2d(F.relu(self.conv(images)), 2)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)

    def forward(self, images):
        images = checkpoint(self.first, images, use_reentrant=False)
        return F.max_pool2d(F.relu(self.conv(images)), 2)


class SwitchedInBetween(nn.Module):
    """Modules, which could be replaced; but the gradient stops behind the convolution."""

    def __init__(self, context):
        super().__init__()
        self.conv, self.relu, self.pool = block()
        self.context = context

    def forward(self, images):
        images = self.conv(images)
        with self.context():
            return self.pool(self.relu(images))


class Depending(nn.Module):
    def __init__(self, condition):
        super().__init__()
        self.conv, self.drop, self.condition = nn.Conv2d(3, 3, 3), nn.Dropout(), condition

    def forward(self, images):
        out = F.max_pool2d(F.relu(self.conv(images)), 2)
        return out + 1 if self.condition(self) else out


def autocast_off():
    return torch.autocast("cpu", enabled=False)


def autocast_on():
    return torch.autocast("cpu", torch.bfloat16)


class MyConv(nn.Conv2d):
    def forward(self, input):
        return -super().forward(input)


def changed(layer: int, change) -> nn.Module:
    """A block of which one layer was changed in place, or replaced."""
    layers = block()
    result = change(layers[layer])
    layers[layer] = result if isinstance(result, nn.Module) else layers[layer]
    return nn.Sequential(*layers)


def hooked(layer: int, method: str) -> nn.Module:
    return changed(layer, lambda m: getattr(m, method)(lambda *args: None))


def inside(outer: nn.Module) -> nn.Module:
    """A hook on a container that the value in between leaves."""
    conv, relu, pool = block()
    outer.extend([conv, relu])
    outer.register_forward_hook(lambda *args: None)
    return nn.Sequential(outer, pool)


def shared_module() -> nn.Module:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    return nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2), conv, nn.ReLU(), nn.MaxPool2d(2))


REFUSED = {
    "conv used elsewhere": (lambda: Twice("conv"), "'conv' is used in 2 places"),
    "relu used elsewhere": (lambda: Twice("relu"), "'relu' is used in 2 places"),
    "relu kept": (lambda: Keeping(lambda self, x: setattr(self, "tap", x)), "'relu' is kept by"),
    "relu in a list": (lambda: Keeping(lambda self, x: self.taps["all"].append(x)), "is kept by"),
    "size of relu": (lambda: Keeping(lambda self, x: setattr(self, "tap", x.shape)), "is kept by"),
    "relu in a function": (
        lambda: Keeping(lambda self, x: setattr(self, "tap", lambda: x)), "is kept by"),
    "returns indices": (
        lambda: changed(2, lambda m: setattr(m, "return_indices", True)), "returns indices"),
    "function returns indices": (Indices, "returns indices"),
    "hook on conv": (lambda: hooked(0, "register_forward_hook"), "hooks on '0'"),
    "hook on relu": (lambda: hooked(1, "register_forward_pre_hook"), "hooks on '1'"),
    "hook on pool": (lambda: hooked(2, "register_full_backward_hook"), "hooks on '2'"),
    "state_dict hook": (lambda: hooked(0, "register_state_dict_post_hook"), "hooks on '0'"),
    "hook on a container left": (lambda: inside(nn.Sequential()), "hooks on '0', through"),
    "called twice": (CalledTwice, "called 2 times"),
    "one module twice": (shared_module, "called 2 times"),
    "tied weights": (TiedWeights, "shared with 'tied'"),
    "weight_norm": (lambda: changed(0, parametrizations.weight_norm), "'0' is parametrised"),
    "old spectral_norm": (lambda: changed(0, spectral_norm), "hooks on '0'"),
    "pruned": (lambda: changed(0, lambda m: prune.l1_unstructured(m, "weight", 0.5)), "hooks"),
    "derived conv": (lambda: changed(0, lambda m: MyConv(3, 4, 3)), "is a MyConv"),
    "lazy conv": (lambda: changed(0, lambda m: nn.LazyConv2d(4, 3)), "is a LazyConv2d"),
    "forward on the instance": (
        lambda: changed(0, lambda m: setattr(m, "forward", torch.neg)), "replaced on the instance"),
    "chain in one mode only": (ModeDependent, "not followed by both in training mode"),
    "pool by mode": (PoolByMode, "pooled differently"),
    "pool by size": (PoolBySize, "computed in forward"),
    "functional conv": (FunctionalConv, "no Conv2d to replace"),
    "optional argument": (OptionalArgument, "optional arguments (scale)"),
    "forward with a side effect": (Counting, "sets attributes"),
    "forward that makes tensors": (FrozenNoise, "would freeze"),
    "forward under no_grad": (lambda: Surrounded(torch.no_grad), "switches gradients"),
    "forward under enable_grad": (lambda: Surrounded(torch.enable_grad), "switches gradients"),
    "forward under inference_mode": (
        lambda: Surrounded(torch.inference_mode), "switches gradients"),
    "forward under autocast": (lambda: Surrounded(autocast_on), "switches gradients, autocast"),
    "forward without autocast": (lambda: Surrounded(autocast_off), "switches gradients, autocast"),
    "decorated forward": (lambda: Decorated(None), "switches gradients"),
    "forward that checkpoints": (Checkpointed, "switches gradients, autocast or checkpointing"),
    "no_grad in between": (lambda: SwitchedInBetween(torch.no_grad), "switched in between"),
    "autocast in between": (lambda: SwitchedInBetween(autocast_off), "switched in between"),
    "forward that asks for gradients": (
        lambda: Depending(lambda self: torch.is_grad_enabled()), "depends on gradients"),
    "forward that asks for autocast": (
        lambda: Depending(lambda self: torch.is_autocast_enabled("cpu")), "depends on gradients"),
    "forward that asks for a mode": (
        lambda: Depending(lambda self: self.drop.training), "another module's mode"),
    "norm without statistics": (
        lambda: nn.Sequential(*block(nn.BatchNorm2d(4, track_running_stats=False))).eval(),
        "keeps no running statistics"),
    "norm in training": (lambda: nn.Sequential(*block(nn.BatchNorm2d(4))), "call eval() first"),
    "other norm": (
        lambda: nn.Sequential(*block(nn.SyncBatchNorm(4))).eval(),
        "a SyncBatchNorm, and may not compute what BatchNorm2d does",
    ),
    "empty windows": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, 1, 1, 3), nn.ReLU()),
        "may be empty"),
}  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_refuses_with_a_reason(case, inplace):
    """Rows in the report that say why; and the model is as it was."""
    make, expected = REFUSED[case]
    assert_left_alone(make(), expected, inplace)


class Untraceable(nn.Module):
    """Control flow by value, which torch.fx cannot follow; and Sequentials inside."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(*block())
        self.conv, self.relu, self.pool = block(channels=(4, 4))
        self.tail = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), self.relu, self.pool)

    def forward(self, images):
        images = self.features(images)
        if images.sum() > 0:
            images = images + 1
        return self.tail(self.pool(self.relu(self.conv(images))))


def test_sequentials_in_what_cannot_be_traced():
    """Their chains are fused; forward, and what it may call itself, is left alone."""
    model = with_integers(Untraceable())
    fused, report = fusedcnn.fuse(model, report=True)
    assert blocks(fused) == 2
    assert isinstance(fused.relu, nn.ReLU)
    assert isinstance(fused.pool, nn.MaxPool2d)
    assert isinstance(fused.tail[1], nn.Identity)
    (row,) = [r for r in report if not r.fused]
    assert row.name == ""
    assert "torch.fx cannot follow its forward" in row.reason
    images = integers((2, 3, 16, 16))
    assert_equal(run(fused, images), run(model, images))
    wrapped = nn.Sequential(model, nn.Flatten())
    assert blocks(fusedcnn.fuse(wrapped)) == 2


class Indexing(nn.Module):
    """Takes a Sequential apart and keeps what lies between its layers."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(*block(), *block(channels=(4, 4)))

    def forward(self, images):
        kept = 0
        for i, layer in enumerate(self.features):
            images = layer(images)
            if i == 1:
                kept = images.sum()
        return images + kept


def test_values_kept_by_a_forward_that_takes_a_sequential_apart():
    fused, report = fusedcnn.fuse(Indexing(), report=True)
    assert [r.fused for r in report] == [False, True]
    assert blocks(fused) == 1
    assert_fused(Indexing(), 1, (2, 3, 16, 16))


def test_rewritten_forwards_guard_what_was_assumed():
    """What torch.fx has decided cannot change unnoticed."""

    class Flagged(LeNet):
        doubled = False

        def __init__(self):
            super().__init__()
            self.doubled = True

        def forward(self, images):
            images = super().forward(images)
            return images * 2 if self.doubled else images

    fused = fusedcnn.fuse(Flagged())
    assert blocks(fused) == 2
    with pytest.raises(RuntimeError, match=r"doubled.*unfuse"):
        fused.doubled = False
    fused.eval().train()
    with pytest.raises(TypeError, match="images: expected a Tensor, got None"):
        fused(None)
    back = fusedcnn.unfuse(fused)
    back.doubled = False


def test_contexts_around_modules_stay():
    """Where modules alone are replaced, forward is the model's own, contexts included."""

    class InContext(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*block())

        def forward(self, images):
            with torch.no_grad():
                return self.layers(images)

    assert blocks(fused := fusedcnn.fuse(InContext())) == 1
    assert not fused(integers((1, 3, 8, 8))).requires_grad


@pytest.mark.parametrize("make", [lambda: FrozenNoise(), lambda: LeNet()])
@pytest.mark.parametrize("grad", [True, False])
def test_fuse_leaves_random_numbers_and_modes(make, grad):
    model = make()
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=not grad):
        state = torch.get_rng_state()
        fusedcnn.fuse(model)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.is_grad_enabled() == grad
        assert torch.is_autocast_enabled("cpu") != grad
        assert not torch.is_autocast_enabled("cuda")


class Scaled(nn.Module):
    """Reads a private number, a list, a class's default and a function, and not ``epoch``."""

    shift = 1.0

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self._scale, self.scales, self.last, self.epoch = 2.0, [3.0], torch.neg, 0

    def forward(self, images):
        out = F.max_pool2d(F.relu(self.conv(images)), 2)
        return self.last(out * self._scale * self.scales[0] + self.shift)


@pytest.mark.parametrize("way", ["as it is", "copied", "pickled"])
def test_rewritten_forwards_guard_what_they_read(way):
    """All of it, and nothing else."""
    fused = fusedcnn.fuse(Scaled())
    assert blocks(fused) == 1
    fused = {"copied": copy.deepcopy, "pickled": lambda m: pickle.loads(pickle.dumps(m))}.get(
        way, lambda m: m
    )(fused)
    for name, value in {"_scale": 4.0, "scales": [4.0], "shift": 2.0, "last": torch.abs}.items():
        with pytest.raises(RuntimeError, match=rf"^{name}: .*unfuse"):
            setattr(fused, name, value)
    fused.epoch = 1
    fused.new = 1
    fused.conv.weight = nn.Parameter(torch.zeros(4, 3, 3, 3))
    fused.conv.bias = None
    assert torch.equal(fused(torch.ones(1, 3, 4, 4)), torch.full((1, 4, 1, 1), -1.0))


# ---- bad input -----------------------------------------------------------------------------------


def test_bad_input():
    with pytest.raises(TypeError, match=r"model: fuse expected a torch.nn.Module, got str"):
        fusedcnn.fuse("model")
    with pytest.raises(TypeError, match=r"model: unfuse expected a torch.nn.Module, got type"):
        fusedcnn.unfuse(nn.Conv2d)
    with pytest.raises(TypeError, match="inplace: expected a bool, got 1"):
        fusedcnn.fuse(nn.ReLU(), inplace=1)
    with pytest.raises(TypeError, match="report: expected a bool, got 'yes'"):
        fusedcnn.fuse(nn.ReLU(), report="yes")
    with torch.no_grad():  # deprecated, and met in what others have saved
        traced = torch.jit.trace(nn.Sequential(*block()), torch.zeros(1, 3, 8, 8))
    with pytest.raises(TypeError, match="model: fuse expected a module whose forward is Python"):
        fusedcnn.fuse(traced)
    model = nn.Sequential(*block())
    model.lock = (i for i in range(3))
    with pytest.raises(TypeError, match=r"model: expected one that copy.deepcopy can copy"):
        fusedcnn.fuse(model, inplace=True)
    assert blocks(model) == 0


@pytest.mark.parametrize("changes", range(6))
def test_a_failure_halfway_leaves_the_model_as_it_was(changes, monkeypatch):
    """An error after some of the changes undoes those."""
    model = nn.Sequential(LeNet(), nn.Sequential(*block(nn.BatchNorm2d(4)))).eval()
    before, modules = repr(model), list(model.modules())
    types = [type(m) for m in modules]
    left = [changes]

    def failing(edit):
        def replacement(*args):
            left[0] -= 1
            return edit(*args) if left[0] >= 0 else 1 / 0

        return replacement

    edits = sys.modules["fusedcnn.fuse"]._Edits
    monkeypatch.setattr(edits, "set_child", failing(edits.set_child))
    monkeypatch.setattr(edits, "set_class", failing(edits.set_class))
    with pytest.raises(ZeroDivisionError):
        fusedcnn.fuse(model, inplace=True)
    assert repr(model) == before
    assert list(map(id, model.modules())) == list(map(id, modules))
    assert [type(m) for m in modules] == types
    monkeypatch.undo()
    assert blocks(fusedcnn.fuse(model, inplace=True)) == 3
