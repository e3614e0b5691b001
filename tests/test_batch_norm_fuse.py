"""fuse with a BatchNorm2d in the chain: one model throughout train() and eval()."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle

import fusedcnn
import pytest
import torch
import torch.nn.functional as F
from fusedcnn import ConvBatchNormReLUMaxPool2d
from fusedcnn.folding import FoldedBatchNorm2d
from fusing import block
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn


class Net(nn.Module):
    """A pool before ReLU, a function call, a norm without statistics and a plain block."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, 2, 2, bias=False)
        self.norm = nn.BatchNorm2d(8, momentum=None)
        self.deep = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8, track_running_stats=False),
            nn.MaxPool2d(3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3),
            nn.BatchNorm2d(12, affine=False, momentum=0.3),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.plain = nn.Sequential(nn.Conv2d(12, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        images = F.max_pool2d(F.relu(self.norm(self.stem(images))), 2)
        return self.head(self.plain(self.deep(images)).flatten(1))


def batch():
    return torch.randn(4, 3, 64, 64, dtype=torch.float64), torch.randint(5, (4,))


def train(model, steps: int, optimizer) -> None:
    torch.manual_seed(7)
    for _ in range(steps):
        fusedcnn.train_step(model, F.cross_entropy, optimizer, *batch())


def same(ours: nn.Module, theirs: nn.Module, tolerance: float = 1e-9) -> None:
    """The state, keys and their order included, and the outputs in evaluation mode."""
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(
            value, theirs.state_dict()[key], rtol=tolerance, atol=tolerance, msg=key
        )
    images, _ = batch()
    modes = ours.training, theirs.training
    outputs = [m.eval()(images).detach() for m in (ours, theirs)]
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
    for module, mode in zip((ours, theirs), modes, strict=True):
        module.train(mode)


@pytest.mark.parametrize("training", [True, False])
def test_one_model_throughout_train_and_eval(training):
    """Fused in either mode; trained, evaluated, trained on; then unfused and trained on."""
    stock = Net().double().train(training)
    model = copy.deepcopy(stock)
    parameters = list(model.parameters())
    buffers = [*model.buffers()]
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (stock, model)]
    fused = fusedcnn.fuse(model, inplace=True)
    assert sum(isinstance(m, ConvBatchNormReLUMaxPool2d) for m in fused.modules()) == 3
    assert sum(isinstance(m, fusedcnn.ConvReLUMaxPool2d) for m in fused.modules()) == 4
    assert all(p is q for p, q in zip(parameters, fused.parameters(), strict=True))
    assert all(p is q for p, q in zip(buffers, fused.buffers(), strict=True))
    before = fusedcnn.build_info()["stock_calls"]
    for _ in range(2):
        for module, optimizer in zip((stock, fused), optimizers, strict=True):
            train(module.train(), 3, optimizer)
        same(fused, stock)
    assert fusedcnn.build_info()["stock_calls"] == before
    back = fusedcnn.unfuse(fused)
    assert not any(isinstance(m, fusedcnn.ConvReLUMaxPool2d) for m in back.modules())
    assert all(p is q for p, q in zip(parameters, back.parameters(), strict=True))
    for module, optimizer in zip((stock, back), optimizers, strict=True):
        train(module.train(), 2, optimizer)
    same(back, stock)


def test_states_go_both_ways():
    stock, fused = Net().double(), fusedcnn.fuse(Net().double())
    train(stock, 2, torch.optim.SGD(stock.parameters(), 0.1))
    fused.load_state_dict(stock.state_dict())
    same(fused, stock)
    train(fused, 2, torch.optim.SGD(fused.parameters(), 0.1))
    stock.load_state_dict(fused.state_dict())
    same(fused, stock)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_train_on_their_own(duplicate):
    stock = Net().double()
    fused = fusedcnn.fuse(copy.deepcopy(stock))
    copied = duplicate(fused)
    train(copied, 2, torch.optim.SGD(copied.parameters(), 0.1))
    same(fused, stock)
    train(stock, 2, torch.optim.SGD(stock.parameters(), 0.1))
    same(copied, stock)


@pytest.mark.parametrize("index", [0, 1])
def test_the_modes_of_convolution_and_norm(index):
    """The norm's own mode decides, as where a network's statistics are frozen."""
    stock = nn.Sequential(*block(nn.BatchNorm2d(4))).double()
    fused = fusedcnn.fuse(copy.deepcopy(stock))
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    outputs = []
    for model in (fused, stock):
        model(images)
        model[index].eval()
        outputs.append(model(images))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fused.state_dict(), stock.state_dict(), rtol=1e-12, atol=1e-12)
    assert fused[1].num_batches_tracked == 1 + (index == 0)


def test_averaging_and_new_statistics():
    stock = Net().double()
    averaged = []
    for model in (fusedcnn.fuse(copy.deepcopy(stock)), stock):
        average = AveragedModel(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(2):
            train(model, 1, optimizer)
            average.update_parameters(model)
        torch.manual_seed(3)
        update_bn([batch()[0] for _ in range(3)], average)
        averaged.append(average.module)
    same(*averaged)


def test_autocast():
    """Close to the stock layers in the same surroundings, and trained without an error."""
    stock = Net()
    fused = fusedcnn.fuse(copy.deepcopy(stock))
    images = torch.randn(16, 3, 64, 64)
    outputs = []
    for model in (fused, stock):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(images)
            F.cross_entropy(output.float(), torch.arange(16) % 5).backward()
        outputs.append(output.detach().float())
    # Four layers that round to 2**-9 of values of order 1.
    assert (outputs[0] - outputs[1]).abs().mean() <= 4 * 2.0**-9 * outputs[1].abs().mean() * 4
    assert fused.stem.weight.grad.dtype == fused.norm.running_mean.dtype == torch.float32


def test_conversion_to_sync_batch_norm():
    """Before fuse the norms are left alone; after it nothing may be put in their places."""
    model = Net()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    fused, report = fusedcnn.fuse(converted, report=True)
    assert sum(row.fused for row in report) == 1  # the plain block
    assert sum("SyncBatchNorm" in row.reason for row in report) == 3
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in fused.modules()) == 3
    fused = fusedcnn.fuse(model)
    with pytest.raises(RuntimeError, match=r"SyncBatchNorm.*unfuse first"):
        nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert sum(isinstance(m, FoldedBatchNorm2d) for m in fused.modules()) == 3


def test_compiled_as_a_whole():
    """Fullgraph; running statistics in step with eager's."""
    torch._dynamo.reset()
    stock = nn.Sequential(*block(nn.BatchNorm2d(4)), nn.Flatten(), nn.Linear(64, 5)).double()
    fused = fusedcnn.fuse(copy.deepcopy(stock))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for model, module in ((compiled, fused), (stock, stock)):
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        torch.manual_seed(2)
        for _ in range(3):
            images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
            loss = F.cross_entropy(model(images), torch.arange(4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(fused.state_dict(), stock.state_dict(), rtol=1e-10, atol=1e-10)


def test_functional_call():
    """Parameters and buffers in other hands: those are read, and updated."""
    model = fusedcnn.fuse(nn.Sequential(*block(nn.BatchNorm2d(4))).double())
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    state["1.weight"] = state["1.weight"] * 2
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    expected = model(images)
    output = torch.func.functional_call(model, state, (images,))
    torch.testing.assert_close(output, 2 * expected, rtol=1e-12, atol=1e-12)
    assert state["1.num_batches_tracked"] == model[1].num_batches_tracked == 1
    assert torch.equal(state["1.running_mean"], model[1].running_mean)


def cifar_net(channels: int = 16) -> nn.Sequential:
    """Three blocks with BatchNorm2d, and a linear layer."""
    widths = (3, channels, 2 * channels, 2 * channels)
    pairs = itertools.pairwise(widths)
    blocks = (layer for c in pairs for layer in block(nn.BatchNorm2d(c[1]), channels=c))
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(2 * channels * 16, 10))


def learnable(images: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten smooth patterns in noise, as images and labels."""
    generator = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.randn(10, 3, 4, 4, generator=generator), 32, mode="bilinear")
    generator.manual_seed(seed)
    labels = torch.randint(10, (images,), generator=generator)
    noise = torch.randn(images, 3, 32, 32, generator=generator)
    return patterns[labels] * 0.35 + noise, labels


def accuracy_after_training(model: nn.Module, seed: int) -> float:
    torch.manual_seed(seed)
    images, labels = learnable(1024, 100 + seed)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(2):
        for rows in torch.randperm(1024).split(64):
            fusedcnn.train_step(model, F.cross_entropy, optimizer, images[rows], labels[rows])
    images, labels = learnable(1000, 1)
    with torch.no_grad():
        return (model.eval()(images).argmax(1) == labels).double().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_learns_as_well_as_stock(seed):
    """Test accuracy of a small net in float32, where rounding parts the two runs."""
    torch.manual_seed(seed)
    stock = cifar_net()
    make = functools.partial(copy.deepcopy, stock)
    ours, theirs = (accuracy_after_training(m, seed) for m in (fusedcnn.fuse(make()), make()))
    assert min(ours, theirs) > 0.5
    # Two independent estimates from 1000 images: 4 deviations of sqrt(2 * p * (1 - p) / 1000).
    assert abs(ours - theirs) <= 4 * (2 * theirs * (1 - theirs) / 1000 + 1e-6) ** 0.5
