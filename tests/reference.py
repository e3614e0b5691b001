"""What the right answer is, and how far from it a kernel may be.

Two kinds of data, drawn per block:

* Integers, small enough that every product and every sum is exact in the tested dtype. Whatever
  the order of summation, a right kernel then gives the exact result, so the tests ask for equality;
  and small integers tie all the time, so they test the tie rule too.
* Normal floats, compared with the stock layers run in float64. The rule: the largest error is at
  most a factor times the stock layers' own largest error in the tested dtype, on the same tensors,
  plus a floor (see `_bound`). The factor is the kernel's ``error`` in build_info: 2, or 4 for
  F(4x4, 3x3), whose transforms round as well. The stock layers' error in a half type is that of
  their float32 results rounded once.

The backward passes get the stock layers' winners as their code. In floats another winner than
float64's may be a legitimate choice of rounding between two nearly equal elements; given the
winners, all three gradients are plain sums, with one right answer each. That a forward kernel's
winners are the right ones is tested apart: exactly on integers, and on floats by demanding that
each is within the forward's tolerance of the best element of its window.
"""

from __future__ import annotations

import functools
import math
import zlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from geometries import Block, by_name, max_pool2d, pair
from torch import Tensor

INPUT, WEIGHT, BIAS = 1, 2, 4  # bits of the backward operator's output_mask
GRADS = ("grad_input", "grad_weight", "grad_bias")

# Integers up to this magnitude are exact: 2 ** (bits of the significand).
_EXACT = {
    torch.bfloat16: 2**8,
    torch.float16: 2**11,
    torch.float32: 2**24,
    torch.float64: 2**53,
}


class Operands(NamedTuple):
    """Everything that a forward and a backward take."""

    input: Tensor  # [N, C, H, W] or [C, H, W]
    weight: Tensor  # [OC, C / groups, KH, KW]
    bias: Tensor | None  # [OC]
    grad_output: Tensor  # [N, OC, OH, OW] or [OC, OH, OW]

    def map(self, function) -> Operands:
        """`function` of each tensor."""
        return Operands(*(t if t is None else function(t) for t in self))


class Result(NamedTuple):
    """Everything that a forward and a backward return."""

    output: Tensor
    code: Tensor
    grad_input: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


class Bound(NamedTuple):
    """Reference of one result, and the errors that the tolerance rule is made of."""

    reference: Tensor  # float64
    stock_error: float  # largest error of the stock layers
    floor: float  # see `_bound`

    def allowed(self, factor: int) -> float:
        """The largest error that a kernel with this factor may have."""
        return factor * self.stock_error + self.floor


def _generator(block: Block) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(block.name.encode()))


def _shapes(block: Block) -> tuple[tuple[int, ...], ...]:
    """Shapes of the convolution's output and of the pooled output."""
    plane = block.conv(
        torch.empty(block.input, device="meta"), torch.empty(block.weight, device="meta"), None
    )
    return tuple(plane.shape), tuple(F.max_pool2d(plane, *block.pool_arguments).shape)


def integer_operands(block: Block, dtype: torch.dtype) -> Operands:
    """Small integers; `exact_case` verifies that all results are exact."""
    generator = _generator(block)
    largest = 1 if dtype == torch.bfloat16 else 2

    def draw(shape, low=-largest, high=largest):
        return torch.randint(low, high + 1, shape, generator=generator).to(dtype)

    return Operands(
        draw(block.input),
        draw(block.weight),
        draw((block.out_channels,), -2, 1) if block.bias else None,
        draw(_shapes(block)[1]),
    )


def normal_operands(block: Block, dtype: torch.dtype) -> Operands:
    """Normal floats; the weight scaled so that outputs are of the input's size."""
    generator = _generator(block)

    def draw(shape, scale=1.0):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    return Operands(
        draw(block.input),
        draw(block.weight, 1 / math.sqrt(math.prod(block.weight[1:]))),
        draw((block.out_channels,)) if block.bias else None,
        draw(_shapes(block)[1]),
    )


# ---- winners ------------------------------------------------------------------------------------


def encode(block: Block, pooled: Tensor, element: Tensor) -> Tensor:
    """The code (csrc/core/geometry.h) of windows in which `element` won."""
    wide = math.prod(pair(block.pool)) > 255
    return torch.where(pooled <= 0, -1, element).to(torch.int32 if wide else torch.uint8)


def decode(block: Block, code: Tensor, plane_w: int) -> tuple[Tensor, Tensor]:
    """Where gradient flows, and the winner's index into its plane (0 where none flows)."""
    stride = pair(block.pool if block.pool_stride is None else block.pool_stride)
    padding, dilation = pair(block.pool_padding), pair(block.pool_dilation)
    kernel_w = pair(block.pool)[1]
    live = code != (-1 if code.dtype == torch.int32 else 255)
    element = torch.where(live, code, 0).long()
    # Where each window starts; may be negative.
    rows = torch.arange(code.shape[-2], device=code.device).view(-1, 1) * stride[0] - padding[0]
    cols = torch.arange(code.shape[-1], device=code.device) * stride[1] - padding[1]
    index = (rows + element // kernel_w * dilation[0]) * plane_w
    index = index + cols + element % kernel_w * dilation[1]
    return live, torch.where(live, index, 0)


def _plane_gradient(block: Block, code: Tensor, grad_output: Tensor, shape) -> Tensor:
    """Gradient at the convolution's output: grad_output added up at its winners."""
    live, index = decode(block, code, shape[-1])
    flat = grad_output.new_zeros(*shape[:-2], shape[-2] * shape[-1])
    flat.scatter_add_(-1, index.flatten(-2), torch.where(live, grad_output, 0).flatten(-2))
    return flat.view(shape)


def _gradients(block: Block, operands: Operands, plane_gradient: Tensor) -> tuple[Tensor, ...]:
    """Input, weight and bias gradients of the convolution alone."""
    input, weight = (t.detach().requires_grad_() for t in operands[:2])
    plane = block.conv(input, weight, None)
    grads = torch.autograd.grad(plane, (input, weight), plane_gradient)
    others = [d for d in range(plane.dim()) if d != plane.dim() - 3]
    return *grads, plane_gradient.sum(others)


def gradients_of_winners(
    block: Block, operands: Operands, code: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """The stock convolution's gradients, given the winners that a forward picked."""
    wide = operands.map(lambda t: t.to(dtype))
    shape = _shapes(block)[0]
    return _gradients(block, wide, _plane_gradient(block, code, wide.grad_output, shape))


# ---- stock layers and reference -----------------------------------------------------------------


def stock_result(block: Block, operands: Operands) -> Result:
    """Forward, winners and gradients of the stock layers in the operands' dtype.

    Half types are computed in float32 and rounded once: the stock convolutions of their own are
    wrong in some geometries and crash in others (test_stock_faults.py).
    """
    dtype = operands.input.dtype
    operands = operands.map(lambda t: t.to(torch.promote_types(dtype, torch.float32)))
    input, weight, bias = (None if t is None else t.detach().requires_grad_() for t in operands[:3])
    plane = block.conv(input, weight, bias)
    pooled, element = max_pool2d(F.relu(plane), *block.pool_arguments)
    code = encode(block, pooled, element)
    wanted = [t for t in (input, weight, bias) if t is not None]
    grads = torch.autograd.grad(pooled, wanted, operands.grad_output)
    if bias is None:  # the operator computes it when asked: the sum over the live outputs
        plane_gradient = _plane_gradient(block, code, operands.grad_output, plane.shape)
        grads = *grads, _gradients(block, operands, plane_gradient)[2]
    return Result(pooled.detach().to(dtype), code, *(grad.to(dtype) for grad in grads))


def _magnitude(value: Tensor) -> float:
    """The largest magnitude; a window wholly in padding, whose output is -inf, has none."""
    return torch.where(value == -math.inf, 0, value).abs().max().item()


def largest_error(result: Tensor, reference: Tensor) -> float:
    """The largest distance of a result from its reference; equal infinities have none."""
    result = result.double()
    return torch.where(result == reference, 0, (result - reference).abs()).max().item()


@functools.lru_cache(maxsize=8)
def exact_case(name: str, dtype: torch.dtype) -> tuple[Operands, Result]:
    """Integer operands and their exact results in `dtype`."""
    block = by_name(name)
    operands = integer_operands(block, dtype)
    result = stock_result(block, operands.map(Tensor.double))
    for field, value in result._asdict().items():
        assert _magnitude(value) <= _EXACT[dtype] or field == "code", f"{field} is not exact"
    exact = {k: v if k == "code" else v.to(dtype) for k, v in result._asdict().items()}
    return operands, Result(**exact)


class FloatCase(NamedTuple):
    """Normal operands, the stock layers' winners, and the bound of each result."""

    operands: Operands
    code: Tensor
    plane: Tensor  # float64: the convolution's output
    output: Bound
    grad_input: Bound
    grad_weight: Bound
    grad_bias: Bound


# From this many results on, the largest error of any implementation is near its typical value: that
# all of n normal errors stay below half of sqrt(2 ln n) deviations, where their maximum is to be
# expected, has a probability of 1e-28 at n = 1000 (and of 0.001 at n = 32).
_MANY = 1000


def _bound(reference: Tensor, stock: Tensor, terms: int, spread: float) -> Bound:
    """The tolerance rule, for results that are sums of `terms` products.

    The floor has two parts. One is the rounding of the largest result to its dtype, which nobody is
    spared. The other is there because the stock layers' error can be next to nothing by luck where
    results are few: it is what one right summation is expected to be off by. Adding K products of
    random sign one by one, where all together have the root of the sum of squares `spread`, rounds
    the k-th partial sum, of size spread * sqrt(k / K), by up to eps / 2 of it, evenly distributed:
    a variance of (eps / 2)^2 / 3 * spread^2 * k / K, over all k a deviation of
    eps * spread * sqrt(K / 24). Half types accumulate in float32.

    In float64 the reference is no better than what is tested, so there is no error of the stock
    layers to compare with: both sides are such sums, and 6 deviations part them at most.
    """
    dtype = stock.dtype
    accumulate = dtype if dtype == torch.float64 else torch.float32
    deviation = torch.finfo(accumulate).eps * spread * math.sqrt(terms / 24)
    rounding = torch.finfo(dtype).eps / 2 * _magnitude(reference)
    if dtype == torch.float64:
        return Bound(reference, 0.0, 6 * deviation + 2 * rounding)
    error = largest_error(stock, reference)
    few = reference.numel() < _MANY
    return Bound(reference, error, rounding + few * deviation)


def _spread(block: Block, operands: Operands, code: Tensor) -> tuple[float, ...]:
    """Largest root of the sum of squares of a result's terms: output and the three gradients."""
    squares = operands.map(Tensor.square)
    plane = block.conv(*squares[:3])
    gradient = _plane_gradient(block, code, squares.grad_output, plane.shape)
    results = (plane, *_gradients(block, squares, gradient))
    return tuple(math.sqrt(t.max().item()) for t in results)


@functools.lru_cache(maxsize=8)
def float_case(name: str, dtype: torch.dtype) -> FloatCase:
    """Normal operands of a block, with what a kernel may return for them."""
    block = by_name(name)
    operands = normal_operands(block, dtype)
    stock = stock_result(block, operands)
    wide = operands.map(Tensor.double)
    plane = block.conv(*wide[:3])
    output = max_pool2d(F.relu(plane), *block.pool_arguments)[0]
    gradients = gradients_of_winners(block, operands, stock.code)
    # How many terms each sum has; where no gradient flows, a term is zero and rounds nothing.
    taps = math.prod(block.weight[2:])
    pixels = output.numel() // block.out_channels
    per_group = block.out_channels // block.groups
    terms = (taps * block.weight[1] + 1, taps * per_group, pixels, pixels)
    spread = _spread(block, wide, stock.code)
    references = (output, *gradients)
    results = (stock.output, stock.grad_input, stock.grad_weight, stock.grad_bias)
    bounds = map(_bound, references, results, terms, spread)
    return FloatCase(operands, stock.code, plane, *bounds)


# ---- layouts ------------------------------------------------------------------------------------

LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed")


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values, otherwise laid out in memory; vectors only know "sliced"."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "channels_last" and tensor.dim() == 3:
        return tensor.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if layout == "sliced":  # every second element of a larger tensor, past its beginning
        larger = torch.full([2 * size + 1 for size in tensor.shape], 7, dtype=tensor.dtype)
        view = larger[tuple(slice(1, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    return tensor.contiguous()
