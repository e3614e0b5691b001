"""A folded BatchNorm2d in every state that it may be brought into: what stock does, errors too."""

from __future__ import annotations

import copy

import fusedcnn
import pytest
import torch
from fusedcnn.folding import ConvBatchNormReLUMaxPool2d
from fusing import block
from torch import nn


def both(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A model and its fused copy, which share no tensors."""
    norm = nn.BatchNorm2d(4)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2)
    stock = nn.Sequential(*block(norm)).eval().to(dtype)
    fused = fusedcnn.fuse(copy.deepcopy(stock))
    assert isinstance(fused[0], ConvBatchNormReLUMaxPool2d)
    return stock, fused


def setting(name, value):
    return lambda norm: setattr(norm, name, value)


def of(name, function):
    return lambda norm: setattr(norm, name, function(getattr(norm, name)))


def without_statistics(norm):
    norm.track_running_stats = False
    norm.running_mean = norm.running_var = None


STATES = {
    "as it was": lambda norm: None,
    "not tracked": setting("track_running_stats", False),
    "not tracked, no statistics": without_statistics,
    "no mean": setting("running_mean", None),
    "no variance": setting("running_var", None),
    "no count": setting("num_batches_tracked", None),
    "no weight": setting("weight", None),
    "no bias": setting("bias", None),
    "other mean": setting("running_mean", torch.linspace(-1, 1, 4).double()),
    "mean of the same type": of("running_mean", lambda t: t * 2 + 1),
    "mean as one number": setting("running_mean", torch.zeros(1)),
    "mean as a row": of("running_mean", lambda t: t.view(1, 4)),
    "too long a variance": of("running_var", lambda t: t.repeat(2)),
    "statistics in float16": lambda norm: (
        of("running_mean", torch.Tensor.half)(norm), of("running_var", torch.Tensor.half)(norm)),
    "mean in float16": of("running_mean", torch.Tensor.half),
    "integer variance": of("running_var", torch.Tensor.long),
    "norm in float32": lambda norm: norm.float(),
    "norm in bfloat16": lambda norm: norm.bfloat16(),
    "one weight for all": setting("weight", nn.Parameter(torch.ones(1))),
    "mean that learns": of("running_mean", torch.Tensor.requires_grad_),
    "no eps": setting("eps", 0.0),
    "large eps": setting("eps", 3.0),
    "negative eps": setting("eps", -1e-3),
    "no momentum": setting("momentum", None),
    "large momentum": setting("momentum", 0.9),
}  # fmt: skip


def outcome(module, images):
    """Outputs, gradients and statistics; or the class and the text of the error."""
    norm = module[1]
    images = images.clone().requires_grad_()
    parameters = [images, *module.parameters()]
    try:
        output = module(images)
        loss = (output.double() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    except Exception as error:
        return type(error), str(error)
    return [output, *gradients, norm.running_mean, norm.running_var, norm.num_batches_tracked]


# float64: sums of at most 512 terms of order 1. bfloat16, outputs alone: 28 products of at most 4
# times 1/5 in absolute value, scaled by at most 3; either the factors are rounded before the sum or
# the sum is after it, to 2**-9 each.
TOLERANCES = {torch.float64: 1e-12, torch.bfloat16: 28 * 4 / 5 * 3 * 2 * 2.0**-9}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("state", STATES)
def test_follows_the_stock_layer(state, dtype):
    """Brought into a state after fusing, in evaluation mode, then training, then evaluation."""
    stock, fused = both(dtype)
    images = torch.randn(2, 3, 8, 8, dtype=dtype)
    for module in (stock, fused):
        STATES[state](module[1])
    for training in (False, True, False):
        theirs, ours = (outcome(m.train(training), images) for m in (stock, fused))
        if isinstance(theirs, tuple):
            assert ours[0] is theirs[0], ours[1]
            # The stock layer counts a batch that it then refuses.
            stock[1].num_batches_tracked = copy.copy(fused[1].num_batches_tracked)
            continue
        compared = slice(None) if dtype == torch.float64 else slice(1)
        for one, other in zip(ours[compared], theirs[compared], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("shape", [(3, 8, 8), (8, 8), (1, 1, 3, 8, 8), (2, 5, 8, 8)])
def test_inputs_of_other_ranks(shape):
    stock, fused = both(torch.float32)
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        stock(torch.ones(shape))
    with pytest.raises(theirs.type):
        fused(torch.ones(shape))


def test_a_bias_that_conv2d_refuses():
    for module in both(torch.float32):
        module[0].bias = nn.Parameter(torch.ones(1))
        with pytest.raises(RuntimeError, match="bias"):
            module(torch.ones(1, 3, 8, 8))


def test_statistics_given_back():
    """As test-time adaptation takes them away and restores them."""
    fused, images = both(torch.float64)[1], torch.randn(2, 3, 8, 8).double()
    expected, kept = fused(images), fused[1].running_mean
    fused[1].running_mean = None
    with pytest.raises(RuntimeError, match="running_mean"):
        fused(images)
    fused[1].running_mean = kept
    assert torch.equal(fused(images), expected)
