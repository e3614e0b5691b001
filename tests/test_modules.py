"""ConvReLUMaxPool2d as a module: initialisation, state, copies, conversions, options."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from fusedcnn import ConvReLUMaxPool2d
from fusing import assert_equal, integers, run, with_integers
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

pytestmark = pytest.mark.usefixtures("exact")


def small() -> ConvReLUMaxPool2d:
    return with_integers(ConvReLUMaxPool2d(3, 5, 3, padding=1))


def stock_of(m: ConvReLUMaxPool2d) -> nn.Sequential:
    """The stock layers with the module's arguments and Parameters."""
    sizes = m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding, m.dilation, m.groups
    conv = nn.Conv2d(*sizes, m.bias is not None, m.padding_mode, dtype=m.weight.dtype)
    conv.weight, conv.bias = m.weight, m.bias
    pool = m.pool_kernel_size, m.pool_stride, m.pool_padding, m.pool_dilation
    return nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(*pool, ceil_mode=m.ceil_mode))


def assert_agrees(module: ConvReLUMaxPool2d, input: Tensor) -> None:
    """Output and all gradients equal those of the stock layers with the same Parameters."""
    assert_equal(run(module, input), run(stock_of(module), input))


CONV_ARGUMENTS = [
    {"in_channels": 3, "out_channels": 16, "kernel_size": 3, "padding": 1},
    {"in_channels": 4, "out_channels": 6, "kernel_size": (5, 3), "stride": 2, "groups": 2},
    {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "bias": False, "dilation": 2},
    {"in_channels": 2, "out_channels": 4, "kernel_size": 4, "padding": "same"},
    {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "dtype": torch.float64},
]


@pytest.mark.parametrize("arguments", CONV_ARGUMENTS, ids=lambda a: str(a["kernel_size"]))
def test_initialisation_is_conv2ds(arguments):
    """The same values to the bit, from the same random numbers, leaving the same behind."""
    torch.manual_seed(7)
    conv = nn.Conv2d(**arguments)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    module = ConvReLUMaxPool2d(**arguments, pool_kernel_size=3)
    assert torch.equal(torch.get_rng_state(), after)
    assert isinstance(module, nn.Conv2d)
    assert list(module.state_dict()) == list(conv.state_dict())
    for ours, theirs in zip(module.parameters(), conv.parameters(), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    module.reset_parameters()
    conv.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(conv.weight, module.weight)


@pytest.mark.parametrize(
    "options",
    [
        {"pool_kernel_size": 2},
        {"pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1},
        {"pool_kernel_size": (3, 2), "pool_stride": (1, 2), "ceil_mode": True},
        {"pool_kernel_size": 2, "pool_dilation": 2},
        {"stride": 2, "padding": 2, "kernel_size": 5},
        {"padding": "same", "kernel_size": 4},
        {"padding": "valid", "dilation": (2, 1)},
        {"groups": 3, "bias": False},
    ],
    ids=str,
)
def test_agrees_with_the_stock_layers(options):
    options = {"kernel_size": 3, **options}
    module = with_integers(ConvReLUMaxPool2d(3, 6, **options))
    assert_agrees(module, integers((2, 3, 13, 14)))
    assert_agrees(module, integers((3, 13, 14)))


@pytest.mark.parametrize("padding", [0, 1, (2, 1), "same", "valid"], ids=str)
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode, padding):
    """What is not zeros pads the input first, on both sides alike or not."""
    kernel_size = (3, 4) if padding == "same" else 3
    module = ConvReLUMaxPool2d(2, 5, kernel_size, padding=padding, padding_mode=mode)
    assert_agrees(with_integers(module), integers((2, 2, 9, 8)))


# ---- from_modules -------------------------------------------------------------------------------


def test_from_modules_shares_parameters():
    """The very Parameters: training one trains the other, and no random number is drawn."""
    conv = with_integers(nn.Conv2d(4, 6, 3, 2, (2, 1), groups=2)).eval()
    conv.weight.requires_grad_(False)
    before = torch.get_rng_state()
    fused = ConvReLUMaxPool2d.from_modules(conv, nn.MaxPool2d(3, 2, 1, ceil_mode=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert fused.weight is conv.weight
    assert fused.bias is conv.bias
    assert not fused.weight.requires_grad
    assert not fused.training
    assert fused.weight.device == torch.device("cpu")
    conv.weight.requires_grad_()
    assert_agrees(fused, integers((2, 4, 15, 14)))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_from_modules_keeps_every_argument(mode):
    conv = nn.Conv2d(2, 3, (3, 2), padding="same", dilation=(1, 2), bias=False, padding_mode=mode)
    pool = nn.MaxPool2d((2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1))
    fused = ConvReLUMaxPool2d.from_modules(with_integers(conv), pool)
    input = integers((2, 2, 9, 10))
    assert fused.bias is None
    assert torch.equal(fused(input), pool(torch.relu(conv(input))))


class DoublingConv2d(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return 2 * super()._conv_forward(input, weight, bias)


class NegativePool(nn.MaxPool2d):
    def forward(self, input):
        return -super().forward(input)


class NamedConv2d(nn.Conv2d):
    """Nothing but a name."""


def with_forward_replaced() -> nn.Module:
    conv = nn.Conv2d(1, 1, 3)
    conv.forward = torch.zeros_like
    return conv


REFUSED = [
    (nn.Linear(1, 1), None, TypeError, "conv: expected a Conv2d, got Linear"),
    (None, nn.AvgPool2d(2), TypeError, "pool: expected a MaxPool2d, got AvgPool2d"),
    (None, nn.MaxPool2d(2, return_indices=True), ValueError, "return_indices"),
    (
        parametrizations.weight_norm(nn.Conv2d(1, 1, 3)), None,
        ValueError, "conv: expected a plain Parameter weight"),
    (spectral_norm(nn.Conv2d(1, 1, 3)), None, ValueError, "conv: expected a plain Parameter"),
    (nn.LazyConv2d(1, 3), None, ValueError, "conv: expected an initialised weight, got a LazyC"),
    (
        DoublingConv2d(1, 1, 3), None,
        TypeError, r"conv: expected Conv2d's own \w+, got that of a DoublingConv2d"),
    (
        ConvReLUMaxPool2d(1, 1, 3), None,
        TypeError, r"conv: expected Conv2d's own \w+, got that of a ConvReLUMaxPool2d"),
    (with_forward_replaced(), None, TypeError, r"conv: expected Conv2d's own \w+, got .* a Conv2d"),
    (None, NegativePool(2), TypeError, "pool: expected MaxPool2d's own forward, got .* a Negative"),
]  # fmt: skip


@pytest.mark.parametrize(("conv", "pool", "error", "message"), REFUSED)
def test_from_modules_refuses_what_computes_something_else(conv, pool, error, message):
    with pytest.raises(error, match=message):
        ConvReLUMaxPool2d.from_modules(conv or nn.Conv2d(1, 1, 3), pool or nn.MaxPool2d(2))


def test_from_modules_takes_derived_classes_that_compute_the_same():
    lazy = nn.LazyConv2d(3, 3)
    lazy(torch.zeros(1, 2, 5, 5))
    for conv in (NamedConv2d(2, 3, 3), lazy):
        fused = ConvReLUMaxPool2d.from_modules(with_integers(conv), nn.MaxPool2d(2))
        assert_agrees(fused, integers((2, 2, 9, 8)))


# ---- copies, conversions, hooks -----------------------------------------------------------------


def through_torch_save(value, weights_only=False):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


def through_state_dict(module):
    other = ConvReLUMaxPool2d(3, 5, 3, padding=1)
    other.load_state_dict(through_torch_save(module.state_dict(), weights_only=True), strict=True)
    return other


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_torch_save, through_state_dict])
def test_copies(duplicate):
    """Equal in value, apart in memory."""
    module = small()
    twin = duplicate(module)
    input = integers((1, 3, 8, 8))
    expected = module(input)
    assert torch.equal(twin(input), expected)
    assert repr(twin) == repr(module)
    with torch.no_grad():
        twin.weight.zero_()
    assert torch.equal(module(input), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion_of_dtype(dtype):
    """model.half() and its like: the dtype comes out, and the gradients have it."""
    module, input = small(), integers((2, 3, 8, 8))
    expected = module(input)
    module.to(dtype)
    output = module(input.to(dtype))
    assert output.dtype == dtype
    assert torch.equal(output.float(), expected)
    output.sum().backward()
    assert module.weight.grad.dtype == dtype


def test_conversion_of_memory_format():
    """.to(memory_format=torch.channels_last) reaches the weight, the output and the gradients."""
    module = small().to(memory_format=torch.channels_last)
    assert module.weight.is_contiguous(memory_format=torch.channels_last)
    input = integers((2, 3, 8, 8))
    output = module(input)
    assert output.is_contiguous(memory_format=torch.channels_last)
    output.sum().backward()
    assert module.weight.grad.is_contiguous(memory_format=torch.channels_last)
    assert_agrees(module, input)


def test_hooks():
    """Forward, state_dict and load_state_dict hooks run, as on every module."""
    module, seen = small(), []
    module.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    module.register_forward_hook(lambda m, args, output: seen.append("post"))
    module.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    module.register_state_dict_post_hook(lambda m, *rest: seen.append("state_dict"))
    module.register_load_state_dict_pre_hook(lambda m, *rest: seen.append("load"))
    module(integers((1, 3, 8, 8)).requires_grad_()).sum().backward()
    module.load_state_dict(module.state_dict())
    assert seen == ["pre", "post", "backward", "state_dict", "load"]


def test_parametrisation():
    """The weight may be computed, as by weight_norm; it receives its gradient."""
    module = parametrizations.weight_norm(small())
    module(integers((1, 3, 8, 8))).sum().backward()
    original = module.parametrizations.weight.original1
    assert original.grad is not None
    assert original.grad.isfinite().all()


def test_repr_names_all_arguments():
    """Among them the pool's stride, by default its kernel's size."""
    module = ConvReLUMaxPool2d(
        3, 5, 3, padding=1, bias=False, pool_kernel_size=(3, 2), pool_padding=1, ceil_mode=True
    )
    assert repr(module) == (
        "ConvReLUMaxPool2d(3, 5, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False, "
        "pool_kernel_size=(3, 2), pool_stride=(3, 2), pool_padding=1, pool_dilation=1, "
        "ceil_mode=True)"
    )


def test_pool_arguments_are_keywords():
    """So that a Conv2d's positional arguments can never slip into the pool's."""
    with pytest.raises(TypeError):
        ConvReLUMaxPool2d(3, 5, 3, 1, 1, 1, 1, True, "zeros", 2)
