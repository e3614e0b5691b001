"""ConvReLUMaxPool2d as a module: initialisation, state, copies, conversions, options."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from fusedcnn import ConvReLUMaxPool2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm

pytestmark = pytest.mark.usefixtures("exact")


def integers(shape: tuple[int, ...]) -> Tensor:
    """Small integers: all that is computed from them is exact in float32."""
    return torch.randint(-2, 3, shape).float()


def with_integer_parameters(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(integers(parameter.shape))
    return module


def small() -> ConvReLUMaxPool2d:
    return with_integer_parameters(ConvReLUMaxPool2d(3, 5, 3, padding=1))


def stock_of(module: ConvReLUMaxPool2d) -> nn.Sequential:
    """The stock layers with the module's arguments and Parameters."""
    conv = nn.Conv2d(
        module.in_channels,
        module.out_channels,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        module.bias is not None,
        module.padding_mode,
        dtype=module.weight.dtype,
    )
    conv.weight, conv.bias = module.weight, module.bias
    pool = nn.MaxPool2d(
        module.pool_kernel_size,
        module.pool_stride,
        module.pool_padding,
        module.pool_dilation,
        ceil_mode=module.ceil_mode,
    )
    return nn.Sequential(conv, nn.ReLU(), pool)


def assert_agrees(module: ConvReLUMaxPool2d, input: Tensor) -> None:
    """Output and all gradients equal those of the stock layers with the same Parameters."""
    results = []
    for function in (module, stock_of(module)):
        leaf = input.detach().requires_grad_()
        module.zero_grad()
        output = function(leaf)
        output.backward(torch.arange(output.numel()).remainder(5).sub(2).view_as(output).float())
        results.append([output.detach(), leaf.grad, *(p.grad for p in module.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


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
    module = with_integer_parameters(ConvReLUMaxPool2d(3, 6, **options))
    assert_agrees(module, integers((2, 3, 13, 14)))
    assert_agrees(module, integers((3, 13, 14)))


@pytest.mark.parametrize("padding", [0, 1, (2, 1), "same", "valid"], ids=str)
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode, padding):
    """What is not zeros pads the input first, on both sides alike or not."""
    kernel_size = (3, 4) if padding == "same" else 3
    module = ConvReLUMaxPool2d(2, 5, kernel_size, padding=padding, padding_mode=mode)
    assert_agrees(with_integer_parameters(module), integers((2, 2, 9, 8)))


def test_default_pool_stride_is_its_kernel_size():
    assert ConvReLUMaxPool2d(1, 1, 3, pool_kernel_size=(3, 2)).pool_stride == (3, 2)


# ---- from_modules -------------------------------------------------------------------------------


def test_from_modules_shares_parameters():
    """The very Parameters: training one trains the other, and no random number is drawn."""
    conv = with_integer_parameters(nn.Conv2d(4, 6, 3, 2, (2, 1), groups=2)).eval()
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
    fused = ConvReLUMaxPool2d.from_modules(with_integer_parameters(conv), pool)
    input = integers((2, 2, 9, 10))
    assert fused.bias is None
    assert torch.equal(fused(input), pool(torch.relu(conv(input))))


def test_from_modules_refuses():
    conv, pool = nn.Conv2d(1, 1, 3), nn.MaxPool2d(2)
    with pytest.raises(TypeError, match="conv: expected a Conv2d, got Linear"):
        ConvReLUMaxPool2d.from_modules(nn.Linear(1, 1), pool)
    with pytest.raises(TypeError, match="pool: expected a MaxPool2d, got AvgPool2d"):
        ConvReLUMaxPool2d.from_modules(conv, nn.AvgPool2d(2))
    with pytest.raises(ValueError, match="return_indices"):
        ConvReLUMaxPool2d.from_modules(conv, nn.MaxPool2d(2, return_indices=True))
    for computed in (parametrizations.weight_norm(conv), spectral_norm(nn.Conv2d(1, 1, 3))):
        with pytest.raises(ValueError, match="conv: expected a plain Parameter weight"):
            ConvReLUMaxPool2d.from_modules(computed, pool)
    with pytest.raises(ValueError, match="conv: expected an initialised weight, got a LazyConv2d"):
        ConvReLUMaxPool2d.from_modules(nn.LazyConv2d(1, 3), pool)


class DoublingConv2d(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return 2 * super()._conv_forward(input, weight, bias)


class NegativePool(nn.MaxPool2d):
    def forward(self, input):
        return -super().forward(input)


class NamedConv2d(nn.Conv2d):
    """Nothing but a name."""


def test_from_modules_refuses_what_computes_something_else():
    conv, pool = nn.Conv2d(1, 1, 3), nn.MaxPool2d(2)
    replaced = nn.Conv2d(1, 1, 3)
    replaced.forward = torch.zeros_like
    for other in (DoublingConv2d(1, 1, 3), ConvReLUMaxPool2d(1, 1, 3), replaced):
        message = rf"conv: expected Conv2d's own \w+, got that of a {type(other).__name__}"
        with pytest.raises(TypeError, match=message):
            ConvReLUMaxPool2d.from_modules(other, pool)
    with pytest.raises(
        TypeError, match="pool: expected MaxPool2d's own forward, got that of a Neg"
    ):
        ConvReLUMaxPool2d.from_modules(conv, NegativePool(2))
    named = with_integer_parameters(NamedConv2d(2, 3, 3))
    assert_agrees(ConvReLUMaxPool2d.from_modules(named, pool), integers((2, 2, 9, 8)))
    lazy = nn.LazyConv2d(3, 3)
    lazy(torch.zeros(1, 2, 5, 5))
    assert ConvReLUMaxPool2d.from_modules(lazy, pool).in_channels == 2


# ---- copies, conversions, hooks -----------------------------------------------------------------


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_state_dict(module):
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other = ConvReLUMaxPool2d(3, 5, 3, padding=1)
    other.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    return other


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, through_pickle, through_torch_save, through_state_dict]
)
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
    module = with_integer_parameters(ConvReLUMaxPool2d(3, 5, 3, padding=1))
    input = integers((2, 3, 8, 8))
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
    module.zero_grad()
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
    module = nn.utils.parametrizations.weight_norm(small())
    module(integers((1, 3, 8, 8))).sum().backward()
    original = module.parametrizations.weight.original1
    assert original.grad is not None
    assert original.grad.isfinite().all()


def test_repr_names_all_arguments():
    module = ConvReLUMaxPool2d(
        3, 5, 3, padding=1, bias=False, pool_kernel_size=3, pool_stride=2, ceil_mode=True
    )
    text = repr(module)
    assert text.startswith("ConvReLUMaxPool2d(3, 5, kernel_size=(3, 3), stride=(1, 1)")
    for part in ("padding=(1, 1)", "bias=False", "pool_kernel_size=3", "pool_stride=2",
                 "pool_padding=0", "pool_dilation=1", "ceil_mode=True"):  # fmt: skip
        assert part in text


def test_meta_device():
    """Built without memory, then materialised; on meta it still computes shapes."""
    module = ConvReLUMaxPool2d(3, 5, 3, padding=1, device="meta")
    assert module(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 5, 4, 4)
    module.to_empty(device="cpu").load_state_dict(small().state_dict())
    assert_agrees(module, integers((1, 3, 8, 8)))


def test_pool_arguments_are_keywords():
    """So that a Conv2d's positional arguments can never slip into the pool's."""
    with pytest.raises(TypeError):
        ConvReLUMaxPool2d(3, 5, 3, 1, 1, 1, 1, True, "zeros", 2)
