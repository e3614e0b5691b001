"""Does a device compute what the stock layers do? Every kernel, on problems with known answers.

Operands are small integers: all sums are exact in every type and order, and so are the answers,
which the stock layers give in float64 on the CPU. A right kernel returns them to the last bit;
small integers also tie all the time, and a number among them is NaN. Only a BatchNorm's results
have a tolerance. :mod:`fusedcnn._first_use` says when this runs and what follows from it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedcnn import _stock
from fusedcnn._derivatives import dense_backward
from fusedcnn._geometry import Geometry, off, pack_geometry, sums_dtype
from fusedcnn._ops import (
    GRAD_BIAS,
    GRAD_INPUT,
    GRAD_WEIGHT,
    backward_op,
    bn_backward_op,
    bn_forward_op,
    forward_op,
)
from fusedcnn._registrations import _bn_decomposed, _decomposed

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
BATCH_NORM = "batch_norm"  # the key of the kernels that selection does not choose
_EPS = 1e-5


class Kernel(NamedTuple):
    """A kernel that selection can choose."""

    pass_name: str
    name: str
    tf32: bool = False  # takes float32 only where tf32 is allowed

    @property
    def key(self) -> str:
        """What findings are filed under."""
        return f"{self.pass_name} {self.name}"


class InconclusiveError(Exception):
    """The check could not be made: too little memory, say. Nothing is wrong with a kernel."""


class LostError(Exception):
    """A kernel's fault has left the process without a device. The message is its key."""


# Runs a with block in which this thread's calls use this kernel alone: trial(name, allow_tf32).
Trial = Callable[[str, bool], contextlib.AbstractContextManager]


class _Block(NamedTuple):
    """A 3x3 convolution with a padding of 1 under a pool."""

    input: tuple[int, int, int, int]
    out_channels: int
    stride: int = 1
    pool: int = 2
    pool_stride: int = 2
    pool_padding: int = 0
    ceil_mode: bool = False

    @property
    def geometry(self) -> tuple[int, ...]:
        return pack_geometry(
            (3, 3), self.stride, 1, 1, 1,
            self.pool, self.pool_stride, self.pool_padding, 1, self.ceil_mode,
        )  # fmt: skip


# What specialised kernels take. Between them these meet each of their tiles, full ones and such
# with a tail in every direction, one slice of channels and several.
_SPECIALISED = (
    _Block((2, 3, 12, 12), 16),
    _Block((2, 16, 16, 16), 32),
    _Block((1, 5, 9, 31), 17, ceil_mode=True),
    _Block((1, 18, 19, 33), 33, ceil_mode=True),
)
# What the kernels around the stock convolution meet: full vectors of channels; windows that
# overlap, hang over the edge, or have more elements than a byte can count. The stride keeps
# algorithms away that round integers: Winograd's and Fourier's.
_AROUND_STOCK = (
    _Block((2, 3, 33, 35), 16, stride=2),
    _Block((2, 3, 33, 35), 5, stride=2, pool=3, pool_padding=1, ceil_mode=True),
    _Block((2, 3, 33, 35), 5, stride=2, pool=16, pool_stride=1),
)


class _Case(NamedTuple):
    """Operands and answers of a block, float64 on the CPU."""

    block: _Block
    input: Tensor
    weight: Tensor
    bias: Tensor
    grad_output: Tensor
    nan_input: Tensor  # what output and code are of; the gradients are of finite operands
    nan_bias: Tensor
    output: Tensor
    code: Tensor
    grads: tuple[Tensor, ...]  # of input, weight and bias


def _integers(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=generator, dtype=torch.float64, device="cpu")


@functools.cache
@torch.no_grad()
def _case(block: _Block) -> _Case:
    generator = torch.Generator("cpu").manual_seed(1)  # leaves the process's own alone
    channels, geometry = block.out_channels, block.geometry
    input = _integers(generator, *block.input)
    weight = _integers(generator, channels, block.input[1], 3, 3)
    bias = _integers(generator, channels)
    nan_input, nan_bias = input.clone(), bias.clone()
    if block in _SPECIALISED:
        nan_input[-1, 0, 2, 3] = torch.nan
    else:  # the stock convolution may multiply a pixel by zeros of its own
        nan_bias[-1] = torch.nan
    output, code = _decomposed(nan_input, weight, nan_bias, list(geometry), True)
    grad_output = _integers(generator, *output.shape)
    grads = dense_backward(grad_output, input, weight, code, Geometry(*geometry))
    return _Case(
        block, input, weight, bias, grad_output, nan_input, nan_bias, output, code, grads
    )  # fmt: skip


class _NormCase(NamedTuple):
    """The same with a BatchNorm."""

    block: _Block
    operands: tuple[Tensor, ...]  # input, weight, bias, and the normalisation's two
    grad_output: Tensor
    results: tuple[Tensor, ...]  # output, code, extremum, mean and var
    grads: tuple[Tensor, ...]


@functools.cache
@torch.no_grad()
def _norm_case(block: _Block) -> _NormCase:
    input, weight, bias, grad_output = _case(block)[1:5]
    channel = torch.arange(block.out_channels, dtype=torch.float64, device="cpu")
    # Of both signs, and zero: there all elements of a window tie.
    bn_weight = (channel % 4 - 1) / 2
    bn_bias = (channel % 3 - 1) / 4 + 0.125
    operands = (input, weight, bias, bn_weight, bn_bias)
    results = _bn_decomposed(*operands, list(block.geometry), _EPS, True)
    with torch.enable_grad():
        leaves = [t.clone().requires_grad_() for t in (input, weight, bn_weight, bn_bias)]
        g = Geometry(*block.geometry)
        plane = _stock.conv(*leaves[:2], None, g)
        plane = F.batch_norm(plane, None, None, *leaves[2:], training=True, eps=_EPS)
        # Of a scalar: torch compares a gradient's shape by modules that take long to import.
        loss = (_stock.relu_max_pool(plane, g) * grad_output).sum()
        grads = torch.autograd.grad(loss, leaves)
    return _NormCase(block, operands, grad_output, results, grads)


def forget_cases() -> None:
    """Free what the check computes with."""
    _case.cache_clear()
    _norm_case.cache_clear()


def _equal(result: Tensor, expected: Tensor) -> bool:
    result, expected = result.cpu(), expected.to(result.dtype)
    return bool(((result == expected) | (result.isnan() & expected.isnan())).all())


def _near(result: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Within the roundings of a few hundred terms of type `dtype`, next to the largest result.

    float32 operands of the stock convolution may be rounded to tf32's ten bits.
    """
    tf32 = dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"
    eps = 2.0**-10 if tf32 else torch.finfo(dtype).eps
    few = dtype.itemsize == 2 or tf32
    allowed = (4 if few else 256) * eps * expected.abs().amax()
    error = (result.cpu().double() - expected).abs()
    return bool((error <= allowed).all())


def check(kernel: Kernel, device: torch.device, trial: Trial) -> str | None:
    """What is wrong with a kernel on a device, or None; waits for each of its results.

    Raises:
        InconclusiveError: the kernel cannot be checked, or covers nothing of this on the device.
        LostError: it cannot, and nothing can any more.
    """
    blocks = _AROUND_STOCK if kernel.name == "library" else _SPECIALISED
    checks = [functools.partial(_wrong_results, kernel.pass_name, _case(b)) for b in blocks]
    return _check(kernel.key, checks, device, lambda: trial(kernel.name, kernel.tf32))


def check_batch_norm(device: torch.device) -> str | None:
    """The same for the kernels of a BatchNorm, which stand around the stock convolution."""
    checks = [functools.partial(_wrong_norm_results, _norm_case(block)) for block in _AROUND_STOCK]
    return _check(BATCH_NORM, checks, device, contextlib.nullcontext)


def _check(
    key: str,
    checks: list[Callable[[torch.device, torch.dtype, torch.memory_format], Iterator[str]]],
    device: torch.device,
    context: Callable[[], contextlib.AbstractContextManager],
) -> str | None:
    ran = False
    for wrong_results in checks:
        for dtype in DTYPES:
            for layout in LAYOUTS:
                try:
                    with torch.no_grad(), context():
                        wrong = next(wrong_results(device, dtype, layout), None)
                except RuntimeError as error:
                    if not _is_fault(error):
                        continue
                    _synchronize(key, device)
                    return f"{_what(dtype, layout)}: {_one_line(error)}"
                ran = True
                if wrong is not None:
                    return f"{wrong} in {_what(dtype, layout)}"
    if not ran:
        raise InconclusiveError("it covers no problem of the check on this GPU")
    return None


def _what(dtype: torch.dtype, layout: torch.memory_format) -> str:
    kind = "channels_last" if layout == torch.channels_last else "contiguous"
    return f"{str(dtype).removeprefix('torch.')}, {kind}"


def _one_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].removeprefix("fusedcnn: ")


def _is_fault(error: RuntimeError) -> bool:
    """Whether it is the kernel's, not that the kernel or the stock convolution serves no such call.

    Raises:
        InconclusiveError: it says nothing of either.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "captur" in text:
        raise InconclusiveError(_one_line(error)) from error
    return "CUDA kernel " in text or "CUDA error" in text


def _synchronize(key: str, device: torch.device) -> None:
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise LostError(key) from error


def _wrong_results(
    pass_name: str,
    case: _Case,
    device: torch.device,
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> Iterator[str]:
    """Names of the results of a pass that differ from the answers."""

    def put(tensor: Tensor) -> Tensor:
        kind = tensor.dtype if tensor is case.code else dtype
        return tensor.to(device, kind).contiguous(memory_format=layout)

    geometry, weight = case.block.geometry, case.weight.to(device, dtype)
    if pass_name == "forward":
        bias = case.nan_bias.to(device, dtype)
        results = forward_op(put(case.nan_input), weight, bias, geometry, True)
        pairs = zip(("output", "code"), results, (case.output, case.code), strict=True)
    else:
        mask = GRAD_INPUT if pass_name == "grad_input" else GRAD_WEIGHT | GRAD_BIAS
        operands = put(case.grad_output), put(case.input), weight, put(case.code)
        grads = backward_op(*operands, geometry, mask)
        names = ("grad_input", "grad_weight", "grad_bias")
        wanted = slice(0, 1) if mask == GRAD_INPUT else slice(1, 3)
        pairs = zip(names[wanted], grads[wanted], case.grads[wanted], strict=True)
    return (
        f"{name} of {_shapes(case.block)}"
        for name, result, expected in pairs
        if not _equal(result, expected)
    )


def _wrong_norm_results(
    case: _NormCase, device: torch.device, dtype: torch.dtype, layout: torch.memory_format
) -> Iterator[str]:
    def put(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype).contiguous(memory_format=layout)

    input, weight, bias, bn_weight, bn_bias = case.operands
    input, weight, bias = put(input), weight.to(device, dtype), bias.to(device, dtype)
    norm = [t.to(device, sums_dtype(dtype)) for t in (bn_weight, bn_bias)]
    geometry = case.block.geometry
    results = bn_forward_op(input, weight, bias, *norm, geometry, _EPS, True)
    output, code, extremum, mean, var = results
    grads = bn_backward_op(
        put(case.grad_output), input, weight, norm[0], *results[1:], geometry, _EPS, 7
    )
    live = case.results[1] != off(case.results[1].dtype)  # elsewhere nobody reads the extremum
    right = {
        "output": _near(output, case.results[0], dtype),
        "code": _equal(code, case.results[1]),
        "extremum": _equal(extremum.cpu()[live], case.results[2][live]),
        "mean": _near(mean, case.results[3], mean.dtype),
        "var": _near(var, case.results[4], var.dtype),
    }
    names = ("grad_input", "grad_weight", "grad_bn_weight", "grad_bn_bias")
    for name, result, expected in zip(names, grads, case.grads, strict=True):
        right[name] = _near(result, expected, dtype)
    return (f"{name} of {_shapes(case.block)}" for name, good in right.items() if not good)


def _shapes(block: _Block) -> str:
    return f"{list(block.input)} to {block.out_channels} channels"
