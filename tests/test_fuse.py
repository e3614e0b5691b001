"""fuse and unfuse: what is found, what is left alone and why, and what stays as it was."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys

import fusedcnn
import hypothesis
import pytest
import torch
import torch.nn.functional as F
from fusedcnn import ConvReLUMaxPool2d
from fusedcnn.folding import ConvBatchNormReLUMaxPool2d
from hypothesis import strategies
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm

pytestmark = pytest.mark.usefixtures("exact")


def integers(shape: tuple[int, ...]) -> Tensor:
    """Small integers: all that is computed from them is exact in float32."""
    return torch.randint(-2, 3, shape).float()


def with_integers(model: nn.Module) -> nn.Module:
    """Integers in all parameters, and BatchNorm2d that scales by powers of 2."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(integers(parameter.shape))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0
                if module.running_var is not None:
                    module.running_var.copy_(
                        torch.tensor(4.0) ** integers(module.running_var.shape)
                    )
                    module.running_mean.copy_(integers(module.running_mean.shape))
    return model


def blocks(model: nn.Module) -> int:
    return sum(isinstance(m, ConvReLUMaxPool2d) for m in model.modules())


def run(model: nn.Module, *inputs: Tensor) -> list[Tensor | None]:
    """Output and the gradients of inputs and parameters, dropout by one seed."""
    torch.manual_seed(5)
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = model(*leaves)
    weights = torch.arange(output.numel()).remainder(3).sub(1).view_as(output).float()
    wanted = [*leaves, *(p for p in model.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(output, wanted, weights, allow_unused=True)
    return [output.detach(), *grads]


def assert_equal(ours: list[Tensor | None], theirs: list[Tensor | None]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def assert_fused(model: nn.Module, count: int, *shapes: tuple[int, ...]) -> nn.Module:
    """Fuse; outputs and gradients are equal to the bit, in both modes; and undo it."""
    with_integers(model)
    before, keys = repr(model), list(model.state_dict())
    fused, report = fusedcnn.fuse(model, report=True)
    assert blocks(fused) == count, [str(r) for r in report]
    assert sum(r.fused for r in report) == count
    assert repr(model) == before
    assert list(fused.state_dict()) == keys
    assert isinstance(fused, type(model))
    for ours, theirs in zip(fused.parameters(), model.parameters(), strict=True):
        assert ours is theirs
    inputs = [integers(shape) for shape in shapes]
    modes = [model.training]
    if not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        modes = [True, False]
    for training in modes:
        assert_equal(run(fused.train(training), *inputs), run(model.train(training), *inputs))
    back = fusedcnn.unfuse(fused)
    assert blocks(back) == 0
    assert repr(back) == before
    assert type(back) is type(model)
    assert_equal(run(back, *inputs), run(model, *inputs))
    return fused


# ---- what is found -------------------------------------------------------------------------------


def block(*between: nn.Module, channels: tuple[int, int] = (3, 4)) -> list[nn.Module]:
    return [nn.Conv2d(*channels, 3, padding=1), *between, nn.ReLU(), nn.MaxPool2d(2)]


def test_sequential():
    model = nn.Sequential(*block(), nn.Conv2d(4, 4, 1), nn.ReLU(), *block(channels=(4, 5)))
    fused = assert_fused(model, 2, (2, 3, 8, 8))
    kinds = [type(m) for m in fused]
    middle = [nn.Conv2d, nn.ReLU]
    three = [ConvReLUMaxPool2d, nn.Identity, nn.Identity]
    assert kinds == three + middle + three


def test_nested_sequentials():
    """Also where a chain's parts lie in different ones."""
    conv, relu, pool = block()
    model = nn.Sequential(
        nn.Sequential(nn.Sequential(conv, relu), nn.Sequential(pool)),
        nn.Sequential(nn.Sequential(*block(channels=(4, 2)))),
    )
    assert_fused(model, 2, (1, 3, 9, 8))


def test_every_option_of_the_layers():
    model = nn.Sequential(
        nn.Conv2d(4, 6, (3, 2), 2, (2, 1), (1, 2), 2, False, "reflect"),
        nn.ReLU(inplace=True),
        nn.MaxPool2d((3, 2), (1, 2), (1, 0), (2, 1), ceil_mode=True),
    )
    assert_fused(model, 1, (2, 4, 17, 16))


def test_relu_in_front_of_everything_else_is_found_alone():
    """No pool, no ReLU, another pool, something in between: no chains, no rows in the report."""
    for layers in (
        [nn.Conv2d(3, 4, 3), nn.ReLU()],
        [nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)],
        [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AvgPool2d(2)],
        [nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.MaxPool2d(2)],
        [nn.Conv2d(3, 4, 3), nn.Dropout(), nn.ReLU(), nn.MaxPool2d(2)],
        [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.MaxPool2d(2)],
        [nn.ReLU(), nn.MaxPool2d(2)],
        [nn.Linear(3, 4)],
    ):
        model = nn.Sequential(*layers).eval()
        fused, report = fusedcnn.fuse(model, report=True)
        assert report == []
        assert repr(fused) == repr(model)


def test_pool_before_relu():
    assert_fused(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()), 1, (2, 3, 8, 8)
    )


def test_pool_before_relu_at_ties():
    """Equal maxima, zeros and NaN: both orders send the gradient to the same element."""
    conv = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(conv.weight)
    windows = torch.tensor(
        [[1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0],
         [0.0, -1.0, 0.0, -2.0], [float("nan"), 3.0, 1.0, 1.0], [2.0, 3.0, 3.0, 1.0]]
    )  # fmt: skip
    images = windows.view(6, 1, 2, 2)
    results = []
    for order in ([nn.ReLU(), nn.MaxPool2d(2)], [nn.MaxPool2d(2), nn.ReLU()]):
        stock = nn.Sequential(conv, *order)
        for model in (stock, fusedcnn.fuse(stock)):
            leaf = images.clone().requires_grad_()
            output = model(leaf)
            output.backward(torch.ones_like(output))
            results.append(torch.cat([output.detach().flatten(), leaf.grad.flatten()]))
        assert blocks(fusedcnn.fuse(stock)) == 1
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0, equal_nan=True)


RELUS = {
    "F.relu": F.relu,
    "F.relu inplace": lambda x: F.relu(x, inplace=True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": lambda x: x.relu_(),
    "nn.functional as keyword": lambda x: F.relu(input=x),
}
POOLS = {
    "F.max_pool2d": lambda x: F.max_pool2d(x, 2),
    "all arguments": lambda x: F.max_pool2d(x, (3, 2), (2, 1), (1, 0), 1, True),
    "keywords": lambda x: F.max_pool2d(input=x, kernel_size=3, stride=2, padding=1),
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, 2),
    "torch.max_pool2d with stride": lambda x: torch.max_pool2d(x, 3, [1, 2]),
}


class Functional(nn.Module):
    def __init__(self, relu, pool):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu, self.pool = relu, pool

    def forward(self, images):
        return self.pool(self.relu(self.conv(images))).flatten(1) * 2


@pytest.mark.parametrize("relu", RELUS)
@pytest.mark.parametrize("pool", POOLS)
def test_function_calls(relu, pool):
    fused = assert_fused(Functional(RELUS[relu], POOLS[pool]), 1, (2, 3, 9, 8))
    assert isinstance(fused, Functional)


class LeNet(nn.Module):
    """As written in a hundred tutorials: one pool for both blocks, and dropout as a function."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(400, 20)
        self.fc2 = nn.Linear(20, 10)

    def forward(self, images):
        x = self.pool(F.relu(self.conv1(images)))
        x = self.pool(torch.relu(self.conv2(x)))
        x = F.dropout(F.relu(self.fc1(torch.flatten(x, 1))), 0.5, self.training)
        return self.fc2(x)


def test_lenet():
    """Dropout in training and not in evaluation, by the mode at the time of the call."""
    fused = assert_fused(LeNet(), 2, (3, 1, 28, 28))
    images = integers((3, 1, 28, 28))
    assert not torch.equal(fused.train()(images), fused(images))
    assert torch.equal(fused.eval()(images), fused(images))


class Attributes(nn.Module):
    """Modules in attributes, one ReLU for all, a ModuleList, and a branch by mode."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3)])
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, images):
        for conv in self.convs:
            images = self.relu(conv(images))
            if conv is not self.convs[1]:
                images = self.pool(images)
        return images + 1 if self.training else images


def test_attributes_and_a_shared_relu():
    """One of the ReLU's calls stays, so that forward is rewritten to leave out the others."""
    fused = assert_fused(Attributes(), 2, (1, 3, 26, 26))
    assert isinstance(fused.relu, nn.ReLU)
    assert isinstance(fused.pool, nn.Identity)


class Unit(nn.Module):
    def __init__(self, *channels):
        super().__init__()
        self.conv = nn.Conv2d(*channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels[1])

    def forward(self, images):
        return F.relu(self.bn(self.conv(images)), inplace=True)


def test_across_module_boundaries():
    """As in GoogLeNet: normalisation and ReLU in a unit, the pool in its parent."""
    model = nn.Sequential(Unit(3, 4), nn.MaxPool2d(2), Unit(4, 4), Unit(4, 2), nn.MaxPool2d(2))
    fused = assert_fused(model.eval(), 2, (2, 3, 8, 8))
    assert type(fused[2]) is Unit


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pool_first", [True, False])
def test_batch_norm_is_folded(affine, bias, pool_first):
    """Convolution, normalisation: all parameters keep their keys and receive their gradients."""
    end = [nn.MaxPool2d(2), nn.ReLU()] if pool_first else [nn.ReLU(), nn.MaxPool2d(2)]
    conv = nn.Conv2d(3, 4, 3, padding=1, bias=bias, padding_mode="circular")
    model = nn.Sequential(conv, nn.BatchNorm2d(4, affine=affine), *end).eval()
    fused = assert_fused(model, 1, (2, 3, 8, 8))
    assert isinstance(fused[0], ConvBatchNormReLUMaxPool2d)
    with pytest.raises(ValueError, match="4D"):
        fused(integers((3, 8, 8)))


def test_folded_batch_norm_goes_on_training():
    """One optimizer made before, statistics included; then evaluated by the new values."""
    stock = nn.Sequential(*block(nn.BatchNorm2d(4)), nn.Flatten(), nn.Linear(64, 3)).double().eval()
    results = []
    images, labels = torch.randn(8, 3, 8, 8).double(), torch.randint(3, (8,))
    for fusing in (False, True):
        model = copy.deepcopy(stock)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if fusing:
            model = fusedcnn.fuse(model)
            assert blocks(model) == 1
        model.train()
        for _ in range(3):
            fusedcnn.train_step(model, F.cross_entropy, optimizer, images, labels)
        model.eval()
        results.append([*model.state_dict().values(), model(images).detach()])
    # Three steps of sums of at most 8 * 64 float64 terms of order 1.
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    reasons = fusedcnn.build_info()["stock_calls"]
    assert reasons["BatchNorm2d in training mode"] >= 3


def test_training_continues_with_the_same_optimizer():
    """The parameters are the ones that Adam knows; steps before and after the fusing."""
    results = []
    for fusing in (False, True):
        torch.manual_seed(1)
        model = fusedcnn.SimpleCNN()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
        fusedcnn.train_step(model, F.cross_entropy, optimizer, images, labels)
        if fusing:
            model = fusedcnn.fuse(model)
            assert blocks(model) == 2
        for _ in range(3):
            fusedcnn.train_step(model, F.cross_entropy, optimizer, images, labels)
        results.append(model.state_dict())
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        # Adam turns a gradient's rounding, some 1e-6 of it, into as much of a step of 1e-3, and
        # where a gradient is itself rounding, into a whole step: three of them.
        assert (results[1][name] - expected).abs().max() <= 3e-3
        assert (results[1][name] - expected).abs().mean() <= 3e-6


def test_copies_and_pickles_of_a_rewritten_forward():
    model = with_integers(LeNet()).eval()
    fused = fusedcnn.fuse(model)
    images = integers((2, 1, 28, 28))
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(twin(images), model(images))
        assert blocks(twin) == 2
        assert isinstance(twin, LeNet)
        with torch.no_grad():
            twin.conv1.weight.zero_()
        assert not torch.equal(twin(images), fused(images))
        assert repr(fusedcnn.unfuse(twin)) == repr(model)


def test_copies_of_a_folded_batch_norm():
    """The copy folds its own normalisation, not the original's."""
    model = with_integers(nn.Sequential(*block(nn.BatchNorm2d(4)))).eval()
    fused = fusedcnn.fuse(model)
    images = integers((2, 3, 8, 8))
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(twin(images), model(images))
        twin[1].bias.data += 1
        assert not torch.equal(twin(images), model(images))
    assert torch.equal(fused(images), model(images))


def test_inplace():
    model = with_integers(LeNet()).eval()
    images = integers((2, 1, 28, 28))
    expected = model(images)
    assert fusedcnn.fuse(model, inplace=True) is model
    assert blocks(model) == 2
    assert torch.equal(model(images), expected)
    assert fusedcnn.unfuse(model, inplace=True) is model
    assert type(model) is LeNet
    assert blocks(model) == 0
    assert torch.equal(model(images), expected)


def test_fusing_again_changes_nothing():
    fused = fusedcnn.fuse(LeNet())
    again, report = fusedcnn.fuse(fused, report=True)
    assert report == []
    assert repr(again) == repr(fused)
    assert repr(fusedcnn.unfuse(again)) == repr(LeNet())


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
    "norm without statistics": (
        lambda: nn.Sequential(*block(nn.BatchNorm2d(4, track_running_stats=False))).eval(),
        "keeps no running statistics"),
    "norm in training": (lambda: nn.Sequential(*block(nn.BatchNorm2d(4))), "call eval() first"),
    "other norm": (lambda: nn.Sequential(*block(nn.SyncBatchNorm(4))).eval(), "a SyncBatchNorm"),
    "empty windows": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2, 1, 1, 3), nn.ReLU()),
        "may be empty"),
}  # fmt: skip


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_refuses_with_a_reason(case, inplace):
    """One row in the report, that says why; and the model is as it was."""
    make, expected = REFUSED[case]
    model = make()
    before, modules = repr(model), list(model.modules())
    attributes = [dict(vars(m)) for m in modules]
    fused, report = fusedcnn.fuse(model, inplace=inplace, report=True)
    reasons = [r.reason for r in report]
    assert reasons
    assert all(expected in reason for reason in reasons), reasons
    assert not any(r.fused for r in report)
    assert repr(model) == repr(fused) == before
    assert (fused is model) == inplace
    assert list(map(id, model.modules())) == list(map(id, modules))
    for module, values in zip(modules, attributes, strict=True):
        assert vars(module) == values
        assert not vars(module).keys() - values.keys()


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


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "data parallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("inplace", [False, True])
def test_wrapped_models(wrapper, inplace):
    """What wraps a model cannot be traced; the model inside is fused."""
    model = WRAPPERS[wrapper](with_integers(LeNet())).eval()
    images = integers((2, 1, 28, 28))
    expected = model(images)
    fused = fusedcnn.fuse(model, inplace=inplace)
    assert blocks(fused) == 2
    assert torch.equal(fused(images), expected)
    assert blocks(fusedcnn.unfuse(fused)) == 0


def test_graph_modules():
    """Modules in them are replaced; calls in their own forward are left alone."""
    model = with_integers(nn.Sequential(*block(channels=(1, 4)))).eval()
    traced = torch.fx.symbolic_trace(model)
    fused = fusedcnn.fuse(traced)
    assert blocks(fused) == 1
    images = integers((2, 1, 8, 8))
    assert torch.equal(fused(images), model(images))
    _, report = fusedcnn.fuse(torch.fx.symbolic_trace(LeNet()), report=True)
    assert [r.fused for r in report] == [False, False]
    assert all("GraphModule" in r.reason for r in report)


@hypothesis.given(strategies.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_random_models(data):
    """Layers in any order and nesting, some of them twice: equal to the bit, fused or not."""
    seed = data.draw(strategies.integers(0, 2**16))
    torch.manual_seed(seed)
    makers = {
        "conv": lambda: nn.Conv2d(2, 2, 3, padding=1, bias=seed % 2 == 0),
        "relu": nn.ReLU,
        "relu_": lambda: nn.ReLU(inplace=True),
        "pool": lambda: nn.MaxPool2d(3, 1, 1),
        "half": lambda: nn.MaxPool2d(2),
        "norm": lambda: nn.BatchNorm2d(2),
        "identity": nn.Identity,
        "dropout": nn.Dropout,
    }
    kinds = strategies.sampled_from(["conv", "relu", "pool", *makers])
    names = data.draw(strategies.lists(kinds, max_size=12))
    hypothesis.assume(names.count("half") <= 3 and names.count("conv") <= 5)
    layers = []
    for name in names:
        old = [layer for layer in layers if isinstance(layer, (nn.ReLU, nn.MaxPool2d))]
        if old and name in ("relu", "pool") and data.draw(strategies.booleans()):
            layers.append(old[-1])  # the very module once more
        else:
            layers.append(makers[name]())
    cuts = sorted(data.draw(strategies.lists(strategies.integers(0, len(layers)), max_size=3)))
    parts = [layers[a:b] for a, b in itertools.pairwise([0, *cuts, len(layers)])]
    model = nn.Sequential(*(nn.Sequential(*part) for part in parts))
    # float64 and weights of at most 1: five layers of integers times powers of 4 stay exact.
    model = with_integers(model).double().eval()
    images = integers((2, 2, 8, 8)).double()
    fused, report = fusedcnn.fuse(model, report=True)
    assert blocks(fused) == sum(r.fused for r in report)
    hypothesis.event(f"{blocks(fused)} blocks")
    assert torch.equal(fused(images.clone()), model(images.clone()))
    assert repr(fusedcnn.unfuse(fused)) == repr(model)
    assert list(fused.state_dict()) == list(model.state_dict())


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


# ---- unfuse --------------------------------------------------------------------------------------


def test_unfuse_the_simple_cnn():
    """A model that was written fused: the stock layers stand where Identity stood."""
    fused = fusedcnn.FusedSimpleCNN().eval()
    stock = fusedcnn.unfuse(fused)
    reference = fusedcnn.SimpleCNN().eval()
    assert repr(stock.features) == repr(reference.features)
    assert list(stock.state_dict()) == list(fused.state_dict())
    reference.load_state_dict(stock.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(stock(images), reference(images))
    assert blocks(fusedcnn.fuse(stock)) == 2
    assert blocks(fused) == 2


def test_unfuse_blocks_without_identities():
    """They call the stock functions under the same keys."""
    fused = with_integers(nn.Sequential(ConvReLUMaxPool2d(3, 4, 3), nn.Flatten()))
    stock = fusedcnn.unfuse(fused)
    assert type(stock[0]).__name__ == "StockConvReLUMaxPool2d"
    assert type(fused[0]) is ConvReLUMaxPool2d
    assert list(stock.state_dict()) == list(fused.state_dict())
    images = integers((2, 3, 8, 8))
    assert_equal(run(stock, images), run(fused, images))
    assert not any(
        "fusedcnn" in str(n.target) for n in torch.export.export(stock, (images,)).graph.nodes
    )
    alone = fusedcnn.unfuse(with_integers(ConvReLUMaxPool2d(3, 4, 3)))
    assert type(alone).__name__ == "StockConvReLUMaxPool2d"


def test_unfuse_refuses_hooks():
    fused = fusedcnn.fuse(nn.Sequential(*block()))
    fused[0].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"no hooks on fused blocks, got some on '0'"):
        fusedcnn.unfuse(fused, inplace=True)
    assert blocks(fused) == 1
