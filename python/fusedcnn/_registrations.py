"""What torch's tools ask of an operator besides computing it: a decomposition, and its flops.

The decomposition is not entered in torch's own table: with CI=1 in the environment Inductor refuses
an operator that stands there and that it is to keep whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from fusedcnn import _stock
from fusedcnn._chain import chain_op
from fusedcnn._chain import decomposed as chain_decomposed
from fusedcnn._geometry import (
    Geometry,
    code_dtype,
    off,
    padding_of,
    plane_sizes,
    pool_of,
    sums_dtype,
)
from fusedcnn._ops import GRAD_INPUT, GRAD_WEIGHT, bn_forward_op, forward_op


def _decomposed(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: list[int], with_code: bool
) -> tuple[Tensor, Tensor]:
    """The forward operator in stock operations, its code included."""
    g = Geometry(*geometry)
    plane = F.relu(_stock.conv(input, weight, bias, g))
    output, index = torch.ops.aten.max_pool2d_with_indices(plane, *pool_of(g))
    if not with_code:
        return output, output.new_empty(0, dtype=code_dtype(g))
    return output, _code(output, index, plane.shape[-1], g)


def _code(output: Tensor, index: Tensor, conv_w: int, g: Geometry) -> Tensor:
    # From the winner's place in the plane to its place in the window; off where there is no winner
    # above 0, and on where it is NaN.
    rows, cols = (torch.arange(size, device=output.device) for size in output.shape[-2:])
    row = index // conv_w - (rows * g.pool_stride_h - g.pool_padding_h).view(-1, 1)
    col = index % conv_w - (cols * g.pool_stride_w - g.pool_padding_w)
    code = row // g.pool_dilation_h * g.pool_kernel_w + col // g.pool_dilation_w
    dtype = code_dtype(g)
    return torch.where(output <= 0, off(dtype), code).to(dtype)


def _bn_decomposed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    geometry: list[int],
    eps: float,
    with_code: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward operator with a BatchNorm, likewise."""
    g = Geometry(*geometry)
    # The mean takes the bias out again; one that is not finite makes its channel NaN.
    plane = _stock.conv(input, weight, None if bias is None else bias * 0, g)
    wide = plane.detach().to(sums_dtype(plane.dtype))
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    normal = F.relu(F.batch_norm(plane, None, None, bn_weight, bn_bias, training=True, eps=eps))
    output, index = torch.ops.aten.max_pool2d_with_indices(normal, *pool_of(g))
    if not with_code:
        return output, output.new_empty(0, dtype=code_dtype(g)), output.new_empty(0), mean, var
    code = _code(output, index, plane.shape[-1], g)
    index = torch.where(output <= 0, 0, index)  # elsewhere nobody reads the extremum
    extremum = plane.flatten(2).gather(2, index.flatten(2)).view(index.shape)
    return output, code, extremum, mean, var


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """The fused forward operators in stock ones, for programs that leave fusedcnn behind.

    For an exported program that goes to a runtime or converter without fusedcnn's library::

        program = program.run_decompositions(fusedcnn.decompositions())

    `torch.onnx.export` of a module needs no table; of an exported program it needs the line above.
    Winners and gradients are the fused operator's; rounding is that of the stock layers.

    Source: :func:`torch.export.default_decompositions`, which gives torch's own.
    """
    return {forward_op: _decomposed, bn_forward_op: _bn_decomposed, chain_op: chain_decomposed}


# Counted as torch counts its convolutions: multiply-adds as two, as if the backward were dense, so
# that a model's figure is the same fused and unfused. ReLU, pool and BatchNorm count nothing there,
# and what the backward computes again is not counted twice.


def _conv_shapes(input, weight, geometry):
    """Shapes of the padded input and of the convolution's output."""
    g = Geometry(*geometry)
    left, right, top, bottom = padding_of(g)
    padded = [input[-2] + top + bottom, input[-1] + left + right]
    batch = input[0] if len(input) == 4 else 1
    out = plane_sizes(g, padded, weight[-2:])
    return [batch, input[-3], *padded], [batch, weight[0], *out]


@register_flop_formula(torch.ops.fusedcnn.conv_relu_max_pool2d)
def forward_flops(input, weight, bias, geometry, with_code, *, out_shape=None, **_) -> int:
    """Those of the convolution."""
    padded, out = _conv_shapes(input, weight, geometry)
    return conv_flop_count(padded, list(weight), out, transposed=False)


@register_flop_formula(torch.ops.fusedcnn.conv_batch_norm_relu_max_pool2d)
def bn_forward_flops(
    input, weight, bias, bn_weight, bn_bias, geometry, eps, with_code, *, out_shape=None, **_
) -> int:
    """Those of the convolution."""
    return forward_flops(input, weight, bias, geometry, with_code)


@register_flop_formula(torch.ops.fusedcnn.conv_batch_norm_relu_max_pool2d_backward)
def bn_backward_flops(grad_output, input, weight, *others, out_shape=None, **_) -> int:
    """Those of the convolution's backward."""
    geometry, _eps, output_mask = others[-3:]
    return backward_flops(grad_output, input, weight, None, geometry, output_mask)


@register_flop_formula(torch.ops.fusedcnn.conv_relu_max_pool2d_backward)
def backward_flops(
    grad_output, input, weight, code, geometry, output_mask, *, out_shape=None, **_
) -> int:
    """Those of the convolution's backward: each of the two large gradients as much as forward."""
    padded, out = _conv_shapes(input, weight, geometry)
    count = 0
    if output_mask & GRAD_INPUT:
        count += conv_flop_count(out, list(weight), padded, transposed=True)
    if output_mask & GRAD_WEIGHT:
        # The convolution of input with grad_output, images and channels changing places.
        batch, channels = padded[:2]
        grad_weight = [channels, weight[0], *weight[2:]]
        count += conv_flop_count([channels, batch], [out[1], batch, *out[2:]], grad_weight)
    return count
