"""fuse and unfuse: what is found, what it becomes, and the way back."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle

import fusedcnn
import hypothesis
import pytest
import torch
import torch.nn.functional as F
from fusedcnn import ConvReLUMaxPool2d
from fusedcnn.folding import ConvBatchNormReLUMaxPool2d
from fusing import (
    LeNet,
    assert_equal,
    assert_fused,
    block,
    blocks,
    integers,
    net,
    run,
    with_integers,
)
from hypothesis import strategies
from torch import nn
from torch.nn.utils import parametrize

pytestmark = pytest.mark.usefixtures("exact")


# ---- what is found -------------------------------------------------------------------------------


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


class Unit(nn.Module):
    """As in GoogLeNet: normalisation and ReLU in a unit, the pool in its parent."""

    def __init__(self, *channels):
        super().__init__()
        self.conv = nn.Conv2d(*channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels[1])

    def forward(self, images):
        return F.relu(self.bn(self.conv(images)), inplace=True)


def functions(relu, pool) -> nn.Module:
    return net(lambda self, images: pool(relu(self.conv(images))).flatten(1) * 2)


RELUS = {
    "F.relu inplace": lambda x: F.relu(x, inplace=True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": lambda x: x.relu_(),
    "F.relu by keyword": lambda x: F.relu(input=x),
}
POOLS = {
    "F.max_pool2d": lambda x: F.max_pool2d(x, 2),
    "all arguments": lambda x: F.max_pool2d(x, (3, 2), (2, 1), (1, 0), 1, True),
    "keywords": lambda x: F.max_pool2d(input=x, kernel_size=3, stride=2, padding=1),
    "torch.max_pool2d": lambda x: torch.max_pool2d(x, 2),
    "torch.max_pool2d with stride": lambda x: torch.max_pool2d(x, 3, [1, 2]),
}
# What is made, the blocks found in it, the input's shape.
FOUND = {
    "parts in different Sequentials": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()),
                          nn.Sequential(nn.MaxPool2d(2))),
            nn.Sequential(nn.Sequential(*block(channels=(4, 2))))),
        2, (1, 3, 12, 10)),
    "every option of the layers": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, (3, 2), 2, (2, 1), (1, 2), 2, False, "reflect"),
            nn.ReLU(inplace=True),
            nn.MaxPool2d((3, 2), (1, 2), (1, 0), (2, 1), ceil_mode=True)),
        1, (2, 4, 17, 16)),
    "pool before ReLU": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()),
        1, (2, 3, 8, 8)),
    "pool, Identity, ReLU": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Identity(), nn.ReLU()),
        1, (2, 3, 8, 8)),
    **{name: (functools.partial(functions, relu, POOLS["F.max_pool2d"]), 1, (2, 3, 9, 8))
       for name, relu in RELUS.items()},
    **{name: (functools.partial(functions, F.relu, pool), 1, (2, 3, 9, 8))
       for name, pool in POOLS.items()},
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_finds(case):
    make, count, shape = FOUND[case]
    assert_fused(make(), count, shape)


def test_sequential():
    model = nn.Sequential(*block(), nn.Conv2d(4, 4, 1), nn.ReLU(), *block(channels=(4, 5)))
    fused = assert_fused(model, 2, (2, 3, 8, 8))
    three = [ConvReLUMaxPool2d, nn.Identity, nn.Identity]
    assert [type(m) for m in fused] == [*three, nn.Conv2d, nn.ReLU, *three]


def test_lenet():
    """Dropout in training and not in evaluation, by the mode at the time of the call."""
    fused = assert_fused(LeNet(), 2, (3, 1, 28, 28))
    images = integers((3, 1, 28, 28))
    assert not torch.equal(fused.train()(images), fused(images))
    assert torch.equal(fused.eval()(images), fused(images))


def test_attributes_and_a_shared_relu():
    """One of the ReLU's calls stays, so that forward is rewritten to leave out the others."""
    fused = assert_fused(Attributes(), 2, (1, 3, 26, 26))
    assert isinstance(fused.relu, nn.ReLU)
    assert isinstance(fused.pool, nn.Identity)


def test_across_module_boundaries():
    """A unit without a pool behind it keeps its class."""
    model = nn.Sequential(Unit(3, 4), nn.MaxPool2d(2), Unit(4, 4), Unit(4, 2), nn.MaxPool2d(2))
    assert type(assert_fused(model.eval(), 2, (2, 3, 8, 8))[2]) is Unit


@pytest.mark.filterwarnings("ignore:fuse has replaced nothing")
@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 4, 3), nn.ReLU()],
        [nn.Conv2d(3, 4, 3), nn.AvgPool2d(2)],
        [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)],
        [nn.ReLU(), nn.MaxPool2d(2)],
        [nn.Linear(3, 4)],
    ],
)
def test_what_is_not_near_a_chain_is_not_reported(layers):
    model = nn.Sequential(*layers).eval()
    fused, report = fusedcnn.fuse(model, report=True)
    assert report == []
    assert repr(fused) == repr(model)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_folded_in_float32(dtype):
    """The folded bias is rounded once, as the stock layer's result is."""
    model = nn.Sequential(nn.Conv2d(1, 64, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(1))
    conv, norm = model[:2]
    for tensor, low in ((conv.bias, 1), (norm.weight, 1), (norm.bias, 4)):
        nn.init.uniform_(tensor, low, low + 1)
    norm.running_mean.uniform_(0, 1)
    norm.running_var.uniform_(0.5, 2)
    model.eval().to(dtype)
    scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    exact = norm.bias.double() + (conv.bias.double() - norm.running_mean.double()) * scale
    # The output for black images. Half a unit in the last place; float32's own error is far less.
    folded = fusedcnn.fuse(model)(torch.zeros(1, 1, 1, 1, dtype=dtype)).flatten()
    assert ((folded - exact).abs() / exact <= torch.finfo(dtype).eps / 2 * 1.001).all()


def with_norm() -> nn.Module:
    return nn.Sequential(*block(nn.BatchNorm2d(4)), nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize(
    ("make", "size", "count", "tolerance"),
    # float64: three steps of sums of at most 8 * 64 terms of order 1; as in test_training.py.
    [(with_norm, 8, 1, 1e-12), (functools.partial(fusedcnn.SimpleCNN, 3), 32, 2, 1e-10)],
    ids=["folded", "SimpleCNN"],
)
def test_training_goes_on_with_the_same_optimizer(make, size, count, tolerance):
    """Its momentum and the batches' statistics included; then evaluated by the new values."""
    stock = make().double()
    results = []
    before = fusedcnn.build_info()["stock_calls"]
    images, labels = torch.randn(8, 3, size, size).double(), torch.randint(3, (8,))
    for fusing in (False, True):
        model = copy.deepcopy(stock)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(1)
        fusedcnn.train_step(model, F.cross_entropy, optimizer, images, labels)
        model.eval()
        if fusing:
            model = fusedcnn.fuse(model)
            assert blocks(model) == count
        model.train()
        for _ in range(3):
            fusedcnn.train_step(model, F.cross_entropy, optimizer, images, labels)
        model.eval()
        results.append([*model.state_dict().values(), model(images).detach()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert fusedcnn.build_info()["stock_calls"] == before


DUPLICATED = {
    "rewritten": (LeNet, (2, 1, 28, 28), lambda model: model.conv1.weight),
    "folded": (
        lambda: nn.Sequential(*block(nn.BatchNorm2d(4))), (2, 3, 8, 8), lambda model: model[1].bias
    ),
}  # fmt: skip


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("case", DUPLICATED)
def test_copies_and_pickles(case, duplicate):
    """They compute by their own parameters: of a folded normalisation, too."""
    make, shape, parameter = DUPLICATED[case]
    model, images = with_integers(make()).eval(), integers(shape)
    fused = fusedcnn.fuse(model)
    twin = duplicate(fused)
    assert torch.equal(twin(images), model(images))
    assert blocks(twin) == blocks(fused) > 0
    assert isinstance(twin, type(model))
    parameter(twin).data += 1
    assert not torch.equal(twin(images), model(images))
    assert torch.equal(fused(images), model(images))
    assert repr(fusedcnn.unfuse(twin)) == repr(model)


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
    with pytest.warns(UserWarning, match="nothing in FusedLeNet:\nits blocks are fused already"):
        again, report = fusedcnn.fuse(fused, report=True)
    assert report == []
    assert repr(again) == repr(fused)
    assert repr(fusedcnn.unfuse(again)) == repr(LeNet())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        torch.optim.swa_utils.AveragedModel,
        nn.DataParallel,
    ],
    ids=["compiled", "averaged", "data parallel"],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_wrapped_models(wrap, inplace):
    """What wraps a model cannot be traced; the model inside is fused."""
    model = wrap(with_integers(LeNet())).eval()
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
        old = [m for m in layers if isinstance(m, nn.ReLU) or getattr(m, "stride", 0) == 1]
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


@pytest.mark.parametrize("place", [0, 1])
def test_unfuse_refuses_hooks(place):
    fused = fusedcnn.fuse(nn.Sequential(*block()))
    fused[place].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=rf"no hooks on fused blocks, got some on '{place}'"):
        fusedcnn.unfuse(fused, inplace=True)
    assert blocks(fused) == 1


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


class MyBlock(ConvReLUMaxPool2d):
    pass


@pytest.mark.parametrize("part", ["block", "norm", "rewritten", "own"])
def test_unfuse_refuses_derived_classes(part):
    """Taken for what it is not, such a part would stay, and compute ReLU and pool twice."""
    if part == "own":
        fused, path = nn.Sequential(MyBlock(3, 4, 3)), "'0'"
    elif part == "rewritten":
        model = LeNet()
        model.scale = nn.Parameter(torch.ones(1))
        fused, path = fusedcnn.fuse(model), "the model"
        parametrize.register_parametrization(fused, "scale", Doubled())
    else:
        fused = fusedcnn.fuse(nn.Sequential(*block(nn.BatchNorm2d(4))).eval())
        index = {"block": 0, "norm": 1}[part]
        parametrize.register_parametrization(fused[index], "weight", Doubled())
        path = f"'{index}'"
    before = repr(fused)
    with pytest.raises(ValueError, match=rf"model: expected fused parts .*, got \w+ at {path}"):
        fusedcnn.unfuse(fused, inplace=True)
    assert repr(fused) == before


def test_unfuse_keeps_one_module_one():
    """One convolution in two places, called from one."""
    model = net(lambda self, images: self.layers(images))
    model.layers = nn.Sequential(model.conv, model.relu, model.pool)
    back = fusedcnn.unfuse(fusedcnn.fuse(model))
    assert type(back.conv) is nn.Conv2d
    assert back.conv is back.layers[0]
    assert blocks(fusedcnn.fuse(back)) == 1


def test_attributes_of_a_convolution_stay():
    model = nn.Sequential(*block())
    model[0].tag = "stem"
    fused = fusedcnn.fuse(model)
    assert fused[0].tag == "stem"
    fused[0].note = "seen"
    back = fusedcnn.unfuse(fused)
    assert (back[0].tag, back[0].note) == ("stem", "seen")
    assert vars(back[0]).keys() - {"note"} == vars(model[0]).keys()
