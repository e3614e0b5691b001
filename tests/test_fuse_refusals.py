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
    by_functions,
    integers,
    net,
    run,
    with_integers,
)
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("exact")


# ---- what is left alone, and why -----------------------------------------------------------------


def keeping(keep) -> nn.Module:
    """The value in between is no result, but put somewhere."""

    def forward(self, images):
        images = self.relu(self.conv(images))
        keep(self, images)
        return self.pool(images)

    return net(forward, taps={"all": []})


def with_indices(self, images):
    pooled, index = F.max_pool2d(F.relu(self.conv(images)), 2, return_indices=True)
    return pooled + index


def counting(self, images):
    self.calls += 1
    return by_functions(self, images)


def tied_weights() -> nn.Module:
    tied = nn.Conv2d(3, 3, 3)
    model = net(lambda self, images: self.tied(by_functions(self, images)), tied=tied)
    tied.weight = model.conv.weight
    return model


def surrounded(context) -> nn.Module:
    """Function calls in a context, none of which a graph of torch.fx holds."""

    def forward(self, images):
        with context():
            return by_functions(self, images)

    return net(forward)


def switched_in_between(context) -> nn.Module:
    """Modules, which could be replaced; but the gradient stops behind the convolution."""

    def forward(self, images):
        images = self.conv(images)
        with context():
            return self.pool(self.relu(images))

    return net(forward)


def depending(condition) -> nn.Module:
    return net(lambda self, x: by_functions(self, x) + condition(self), drop=nn.Dropout())


def noisy() -> nn.Module:
    return net(lambda self, images: by_functions(self, images) + torch.randn(3, 1, 1))


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


def left_container() -> nn.Module:
    """A hook on a container that the value in between leaves."""
    conv, relu, pool = block()
    outer = nn.Sequential(conv, relu)
    outer.register_forward_hook(lambda *args: None)
    return nn.Sequential(outer, pool)


def shared_module() -> nn.Module:
    layers = block(channels=(3, 3))
    return nn.Sequential(*layers, layers[0], nn.ReLU(), nn.MaxPool2d(2))


REFUSED = {
    "conv used elsewhere": (
        lambda: net(lambda self, x: self.pool(self.relu(y := self.conv(x))).sum() + y.sum()),
        "'conv' is used in 2 places"),
    "relu used elsewhere": (
        lambda: net(lambda self, x: self.pool(y := self.relu(self.conv(x))).sum() + y.sum()),
        "'relu' is used in 2 places"),
    "relu kept": (lambda: keeping(lambda self, x: setattr(self, "tap", x)), "'relu' is kept by"),
    "relu in a list": (lambda: keeping(lambda self, x: self.taps["all"].append(x)), "is kept by"),
    "size of relu": (lambda: keeping(lambda self, x: setattr(self, "tap", x.shape)), "is kept by"),
    "relu in a function": (
        lambda: keeping(lambda self, x: setattr(self, "tap", lambda: x)), "is kept by"),
    "returns indices": (
        lambda: changed(2, lambda m: setattr(m, "return_indices", True)), "returns indices"),
    "function returns indices": (lambda: net(with_indices), "returns indices"),
    "hook on conv": (lambda: hooked(0, "register_forward_hook"), "hooks on '0'"),
    "hook on relu": (lambda: hooked(1, "register_forward_pre_hook"), "hooks on '1'"),
    "hook on pool": (lambda: hooked(2, "register_full_backward_hook"), "hooks on '2'"),
    "state_dict hook": (lambda: hooked(0, "register_state_dict_post_hook"), "hooks on '0'"),
    "hook on a container left": (left_container, "hooks on '0', through"),
    "called twice": (
        lambda: net(lambda self, x: by_functions(self, by_functions(self, x))), "called 2 times"),
    "one module twice": (shared_module, "called 2 times"),
    "tied weights": (tied_weights, "shared with 'tied'"),
    "weight_norm": (lambda: changed(0, parametrizations.weight_norm), "'0' is parametrised"),
    "old spectral_norm": (lambda: changed(0, spectral_norm), "hooks on '0'"),
    "pruned": (lambda: changed(0, lambda m: prune.l1_unstructured(m, "weight", 0.5)), "hooks"),
    "derived conv": (lambda: changed(0, lambda m: MyConv(3, 4, 3)), "is a MyConv"),
    "lazy conv": (lambda: changed(0, lambda m: nn.LazyConv2d(4, 3)), "is a LazyConv2d"),
    "forward on the instance": (
        lambda: changed(0, lambda m: setattr(m, "forward", torch.neg)), "replaced on the instance"),
    "chain in one mode only": (
        lambda: net(lambda self, x: (lambda y: y if self.training else self.pool(y))(
            self.relu(self.conv(x)))),
        "not followed by both in training mode"),
    "pool by mode": (
        lambda: net(lambda self, x: F.max_pool2d(F.relu(self.conv(x)), 2 + self.training)),
        "pooled differently"),
    "pool by size": (
        lambda: net(lambda self, x: F.max_pool2d(F.relu(self.conv(x)), x.shape[-1] // 4)),
        "computed in forward"),
    "functional conv": (
        lambda: net(lambda self, x: F.max_pool2d(F.relu(F.conv2d(x, self.conv.weight)), 2)),
        "no Conv2d to replace"),
    "optional argument": (
        lambda: net(lambda self, x, scale=None: by_functions(self, x if scale is None else scale)),
        "optional arguments (scale)"),
    "forward with a side effect": (lambda: net(counting, calls=0), "sets attributes"),
    "forward that makes tensors": (noisy, "would freeze"),
    "forward under no_grad": (lambda: surrounded(torch.no_grad), "switches gradients"),
    "forward under enable_grad": (lambda: surrounded(torch.enable_grad), "switches gradients"),
    "forward under inference_mode": (
        lambda: surrounded(torch.inference_mode), "switches gradients"),
    "forward under autocast": (lambda: surrounded(autocast_on), "switches gradients, autocast"),
    "forward without autocast": (lambda: surrounded(autocast_off), "switches gradients, autocast"),
    "decorated forward": (lambda: net(torch.no_grad()(by_functions)), "switches gradients"),
    "forward that checkpoints": (
        lambda: net(
            lambda self, x: by_functions(self, checkpoint(self.first, x, use_reentrant=False)),
            first=nn.Conv2d(3, 3, 3)),
        "switches gradients, autocast or checkpointing"),
    "no_grad in between": (lambda: switched_in_between(torch.no_grad), "switched in between"),
    "autocast in between": (lambda: switched_in_between(autocast_off), "switched in between"),
    "forward that asks for gradients": (
        lambda: depending(lambda self: torch.is_grad_enabled()), "depends on gradients"),
    "forward that asks for autocast": (
        lambda: depending(lambda self: torch.is_autocast_enabled("cpu")), "depends on gradients"),
    "forward that asks for a mode": (
        lambda: depending(lambda self: self.drop.training), "another module's mode"),
    "other norm": (
        lambda: nn.Sequential(*block(nn.SyncBatchNorm(4))).eval(),
        "a SyncBatchNorm, and may not compute what BatchNorm2d does"),
    "other norm in training": (
        lambda: nn.Sequential(*block(nn.SyncBatchNorm(4))), "a SyncBatchNorm, and may not"),
    "empty windows": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, 1, 1, 3), nn.ReLU()),
        "may be empty"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_with_a_reason(case):
    """Rows in the report that say why; and the model is as it was."""
    make, expected = REFUSED[case]
    assert_left_alone(make(), expected, inplace=True)


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
    assert blocks(fusedcnn.fuse(nn.Sequential(model, nn.Flatten()))) == 2


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
    _, report = fusedcnn.fuse(Indexing(), report=True)
    assert [r.fused for r in report] == [False, True]
    assert_fused(Indexing(), 1, (2, 3, 16, 16))


def test_contexts_around_modules_stay():
    """Where modules alone are replaced, forward is the model's own, contexts included."""

    def forward(self, images):
        with torch.no_grad():
            return self.pool(self.relu(self.conv(images)))

    assert blocks(fused := fusedcnn.fuse(net(forward))) == 1
    assert not fused(integers((1, 3, 8, 8))).requires_grad


@pytest.mark.parametrize("make", [noisy, LeNet])
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


# ---- what a rewritten forward guards -------------------------------------------------------------


class Scaled(nn.Module):
    """Reads a flag, a private number, a list, a class's default and a function; not ``epoch``."""

    shift = 1.0
    doubled = False

    def __init__(self):
        super().__init__()
        self.conv, self.doubled = nn.Conv2d(3, 4, 3), True
        self._scale, self.scales, self.last, self.epoch = 2.0, [3.0], torch.neg, 0

    def forward(self, images):
        out = self.last(by_functions(self, images) * self._scale * self.scales[0] + self.shift)
        return out * 2 if self.doubled else out


WAYS = {
    "as it is": lambda model: model,
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("way", WAYS)
def test_rewritten_forwards_guard_what_they_read(way):
    """All of it, and nothing else: what torch.fx has decided cannot change unnoticed."""
    fused = WAYS[way](fusedcnn.fuse(Scaled()))
    assert blocks(fused) == 1
    read = {"_scale": 4.0, "scales": [4.0], "shift": 2.0, "last": torch.abs, "doubled": False}
    for name, value in read.items():
        with pytest.raises(RuntimeError, match=rf"^{name}: .*unfuse"):
            setattr(fused, name, value)
    fused.epoch = fused.new = 1
    fused.eval().train()
    fused.conv.weight = nn.Parameter(torch.zeros(4, 3, 3, 3))
    fused.conv.bias = None
    assert torch.equal(fused(torch.ones(1, 3, 4, 4)), torch.full((1, 4, 1, 1), -2.0))
    with pytest.raises(TypeError, match="images: expected a Tensor, got None"):
        fused(None)
    fusedcnn.unfuse(fused).doubled = False


# ---- bad input -----------------------------------------------------------------------------------


def scripted() -> nn.Module:
    with torch.no_grad():  # deprecated, and met in what others have saved
        return torch.jit.trace(nn.Sequential(*block()), torch.zeros(1, 3, 8, 8))


BAD_INPUT = {
    "no module": (
        lambda: fusedcnn.fuse("model"),
        "model: fuse expected a torch.nn.Module, got str",
    ),
    "a class": (lambda: fusedcnn.unfuse(nn.Conv2d), "model: unfuse expected a torch.nn.Mod.* type"),
    "inplace": (lambda: fusedcnn.fuse(nn.ReLU(), inplace=1), "inplace: expected a bool, got 1"),
    "report": (
        lambda: fusedcnn.fuse(nn.ReLU(), report="yes"),
        "report: expected a bool, got 'yes'",
    ),
    "TorchScript": (lambda: fusedcnn.fuse(scripted()), "model: fuse expected .* forward is Python"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case):
    call, message = BAD_INPUT[case]
    with pytest.raises(TypeError, match=message):
        call()


def test_a_model_that_cannot_be_copied_stays_as_it_was():
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
