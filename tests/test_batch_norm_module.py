"""ConvBatchNormReLUMaxPool2d: the four stock layers in lock-step, and what is done to modules."""

from __future__ import annotations

import copy
import pickle

import fusedcnn
import pytest
import torch
import torch.nn.functional as F
from checks import assert_equal
from fusedcnn import ConvBatchNormReLUMaxPool2d
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, update_bn

CONV = {
    "plain": {"padding": 1},
    "strided": {"stride": 2, "padding": (2, 1), "kernel_size": 5},
    "grouped": {"groups": 3, "bias": False, "dilation": 2},
    "reflecting": {"padding": 1, "padding_mode": "reflect"},
    "same": {"padding": "same", "padding_mode": "circular"},
}
NORM = {
    "default": {},
    "cumulative": {"momentum": None, "eps": 1e-3},
    "quick": {"momentum": 0.9},
    "not affine": {"affine": False},
    "untracked": {"track_running_stats": False},
    "bare": {"affine": False, "track_running_stats": False, "momentum": None},
}
POOL = {"pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1, "ceil_mode": True}


def pair(conv="plain", norm="default", **options) -> tuple[nn.Module, nn.Module]:
    """A block and its stock layers, of the same initial values."""
    conv = {"kernel_size": 3} | CONV[conv]
    torch.manual_seed(1)
    block = ConvBatchNormReLUMaxPool2d(3, 6, **conv, **NORM[norm], **POOL, **options)
    torch.manual_seed(1)
    stock = nn.Sequential(
        nn.Conv2d(3, 6, **conv, **options),
        nn.BatchNorm2d(6, **NORM[norm], **options),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    )
    return block, stock


def same_state(block: nn.Module, stock: nn.Module, tolerance: float) -> None:
    """Parameters and buffers, under their keys."""
    ours = block.state_dict()
    theirs = {
        key.replace("0.", "").replace("1.", "batch_norm."): value
        for key, value in stock.state_dict().items()
    }
    assert list(ours) == list(theirs)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_the_same_initial_values():
    same_state(*pair(), 0)


@pytest.mark.parametrize("norm", NORM)
@pytest.mark.parametrize("conv", CONV)
def test_trains_as_stock(conv, norm):
    """Losses, running statistics and parameters of ten steps; then evaluation."""
    block, stock = pair(conv, norm, dtype=torch.float64)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (block, stock)]
    for _ in range(10):
        images = torch.randn(4, 3, 11, 12, dtype=torch.float64)
        losses = []
        for module, optimizer in zip((block, stock), optimizers, strict=True):
            optimizer.zero_grad()
            output = module(images)
            losses.append((output * torch.linspace(-1, 1, output.numel()).view_as(output)).mean())
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
        same_state(block, stock, 1e-9)
    torch.testing.assert_close(block.eval()(images), stock.eval()(images), rtol=1e-9, atol=1e-9)


def test_a_norm_frozen_by_its_own_mode():
    """The convolution trains; the statistics stay, and normalise."""
    block, stock = pair(dtype=torch.float64)
    images = torch.randn(4, 3, 11, 12, dtype=torch.float64)
    block(images), stock(images)
    for norm in (block.batch_norm, stock[1]):
        norm.eval()
    torch.testing.assert_close(block(images), stock(images), rtol=1e-12, atol=1e-12)
    same_state(block, stock, 1e-12)
    assert block.training
    assert block.batch_norm.num_batches_tracked == 1


def test_from_modules_shares_everything():
    _, (conv, norm, _, pool) = pair()
    norm.eval()
    block = ConvBatchNormReLUMaxPool2d.from_modules(conv, norm, pool)
    assert block.weight is conv.weight
    assert block.bias is conv.bias
    assert block.batch_norm is norm
    assert not norm.training
    assert block.training
    block.train()(torch.randn(2, 3, 8, 8))
    assert norm.num_batches_tracked == 1


class Derived(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("norm", "error", "message"),
    [
        (nn.SyncBatchNorm(6), TypeError, "norm: expected a BatchNorm2d, got SyncBatchNorm"),
        (nn.BatchNorm1d(6), TypeError, "norm: expected a BatchNorm2d, got BatchNorm1d"),
        (Derived(6), TypeError, "norm: expected BatchNorm2d's own forward"),
        (nn.BatchNorm2d(5), ValueError, "norm: expected 6 channels like conv's output, got 5"),
    ],
)
def test_from_modules_refuses(norm, error, message):
    _, (conv, _, _, pool) = pair()
    with pytest.raises(error, match=message):
        ConvBatchNormReLUMaxPool2d.from_modules(conv, norm, pool)


@pytest.mark.parametrize("shape", [(3, 8, 8), (8, 8), (1, 1, 3, 8, 8), (2, 5, 8, 8)])
def test_inputs_of_other_ranks(shape):
    block, stock = pair()
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        stock(torch.ones(shape))
    with pytest.raises(theirs.type):
        block(torch.ones(shape))


# ---- what others do to modules -------------------------------------------------------------------


def doubled(norm: nn.Module) -> None:
    norm.register_forward_hook(lambda module, inputs, output: output * 2)


def twice_as_heavy(norm: nn.Module) -> None:
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(norm, "weight", Twice())


@pytest.mark.parametrize("change", [doubled, twice_as_heavy])
def test_a_norm_that_works_otherwise_is_called(change):
    """By stock layers, with a reason."""
    block, stock = pair(dtype=torch.float64)
    change(block.batch_norm)
    change(stock[1])
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(block(images), stock(images), rtol=1e-12, atol=1e-12)
    reason = "a normalisation that is no plain BatchNorm2d, or has hooks"
    assert fusedcnn.build_info()["stock_calls"][reason] >= 1


def test_convert_sync_batchnorm():
    """The child is replaced, and from then on called."""
    block = nn.SyncBatchNorm.convert_sync_batchnorm(pair()[0])
    assert type(block.batch_norm) is nn.SyncBatchNorm
    images = torch.randn(2, 3, 9, 9)
    stock = pair()[1]
    torch.testing.assert_close(block.eval()(images), stock.eval()(images))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stand_alone(duplicate):
    block, _ = pair()
    copied = duplicate(block)
    images = torch.randn(2, 3, 9, 9)
    assert torch.equal(copied(images), block(images))
    copied(images)
    assert (block.batch_norm.num_batches_tracked, copied.batch_norm.num_batches_tracked) == (1, 2)


def test_averaging_and_new_statistics():
    """AveragedModel, then update_bn, which takes momentum away for a while."""
    block, stock = pair(dtype=torch.float64)
    data = [torch.randn(4, 3, 9, 9, dtype=torch.float64) for _ in range(3)]
    averaged = []
    for module in (block, stock):
        average = AveragedModel(module)
        for images in data:
            module(images).sum().backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= 0.01 * parameter.grad
            average.update_parameters(module)
        update_bn(data, average)
        averaged.append(average.module)
    same_state(*averaged, 1e-9)
    assert averaged[0].batch_norm.num_batches_tracked == 3
    assert averaged[0].batch_norm.momentum == 0.1


def test_buffers_in_half_and_back():
    block, _ = pair()
    images = torch.randn(2, 3, 9, 9)
    expected = block(images)
    output = block.bfloat16()(images.bfloat16())
    assert output.dtype == block.batch_norm.running_var.dtype == torch.bfloat16
    # Normalised values of at most 4, computed from operands of 2**-9 relative error each.
    assert (output - expected).abs().max() <= 4 * 3 * 27**0.5 * 2.0**-9


def test_unfuse_gives_stock_layers():
    """A block that was written, not fused: its keys have no other place."""
    block, stock = pair(dtype=torch.float64)
    unfused = fusedcnn.unfuse(nn.Sequential(block))[0]
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    before = fusedcnn.build_info()["stock_calls"]
    assert_equal(unfused(images), stock(images))
    assert fusedcnn.build_info()["stock_calls"] == before
    assert list(unfused.state_dict()) == list(block.state_dict())
    assert unfused.weight is block.weight
    assert type(fusedcnn.unfuse(block)) is type(unfused)


def test_autocast():
    """As F.conv2d and F.batch_norm: operands in bfloat16, parameters and statistics in float32."""
    block, stock = pair()
    images = torch.randn(8, 3, 16, 16)
    results = []
    for module in (block, stock):
        for training in (True, False):
            module.train(training)
            with torch.autocast("cpu", torch.bfloat16):
                output = module(images)
            assert output.dtype == torch.bfloat16
            results.append(output.float())
            if training:
                output.float().square().mean().backward()
    assert block.weight.grad.dtype == block.batch_norm.weight.grad.dtype == torch.float32
    assert block.batch_norm.running_mean.dtype == torch.float32
    # Both round each operand and each convolution output to 2**-9 of itself; 28 terms of size 1/5.
    for ours, theirs in zip(results[:2], results[2:], strict=True):
        assert (ours - theirs).abs().max() <= 2 * 2.0**-9 * 28 / 5 * 4
    # Sums of squares of 2 * 6 * 81 outputs whose relative errors are those.
    ours, theirs = (m.weight.grad for m in (block, stock[0]))
    assert F.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.99
