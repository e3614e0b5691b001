"""The operators of the block with a BatchNorm, in plain torch: what they are to return."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from fusedcnn import _stock
from fusedcnn._derivatives import winners, conv_backward
from fusedcnn._geometry import Geometry, padding_of, pool_of, sums_dtype
from fusedcnn._ops import GRAD_BATCH_NORM, GRAD_INPUT, GRAD_WEIGHT
from fusedcnn._registrations import _code
from torch import Tensor


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    geometry: list[int],
    eps: float,
    with_code: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """conv_batch_norm_relu_max_pool2d, computed in float32 or float64."""
    g = Geometry(*geometry)
    dtype, wide = input.dtype, sums_dtype(input.dtype)
    plane = _stock.conv(input.to(wide), weight.to(wide), None, g)
    if bias is not None:
        plane = plane + (bias.to(wide) * 0).view(-1, 1, 1)
    gamma = torch.ones(plane.shape[1]) if bn_weight is None else bn_weight
    gamma = gamma.to(wide)
    beta = torch.zeros_like(gamma) if bn_bias is None else bn_bias.to(wide)
    var, mean = torch.var_mean(plane, (0, 2, 3), correction=0)
    signed = plane * gamma.sign().view(-1, 1, 1)
    pooled, index = torch.ops.aten.max_pool2d_with_indices(signed, *pool_of(g))
    index = torch.where(pooled == -torch.inf, 0, index)  # a window without elements
    extremum = plane.flatten(2).gather(2, index.flatten(2)).view(index.shape).to(dtype)
    scale = (gamma / (var + eps).sqrt()).view(-1, 1, 1)
    output = F.relu((extremum.to(wide) - mean.view(-1, 1, 1)) * scale + beta.view(-1, 1, 1))
    output = torch.where(pooled == -torch.inf, pooled, output).to(dtype)
    code = _code(output, index, plane.shape[-1], g)
    like = torch.channels_last if _is_channels_last(input) else torch.contiguous_format
    output, code, extremum = (t.contiguous(memory_format=like) for t in (output, code, extremum))
    if not with_code:
        code, extremum = code.new_empty(0), extremum.new_empty(0)
    return output, code, extremum, mean, var


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    code: Tensor,
    extremum: Tensor,
    mean: Tensor,
    var: Tensor,
    geometry: list[int],
    eps: float,
    output_mask: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """conv_batch_norm_relu_max_pool2d_backward, by the formulas of its derivation."""
    g = Geometry(*geometry)
    dtype, wide = input.dtype, sums_dtype(input.dtype)
    y = _stock.conv(input.to(wide), weight.to(wide), None, g)
    live, index = winners(code, y.shape[-1], g)
    grad = torch.where(live, grad_output.to(wide), 0)
    invstd = (var + eps).rsqrt()
    normal = (extremum.to(wide) - mean.view(-1, 1, 1)) * invstd.view(-1, 1, 1)
    grad_bn_bias = grad.sum((0, 2, 3))
    grad_bn_weight = torch.where(live, grad * normal, 0).sum((0, 2, 3))
    scale = invstd if bn_weight is None else bn_weight.to(wide) * invstd
    grad_y = torch.zeros_like(y).flatten(2).scatter_add(2, index.flatten(2), grad.flatten(2))
    count = y.numel() // y.shape[1]
    grad_y = grad_y.view_as(y) - (grad_bn_bias / count).view(-1, 1, 1)
    slope = (grad_bn_weight * invstd / count).view(-1, 1, 1)
    grad_y = (grad_y - (y - mean.view(-1, 1, 1)) * slope) * scale.view(-1, 1, 1)
    padded = F.pad(input.to(wide), padding_of(g))
    grad_padded, grad_weight, _ = conv_backward(grad_y, padded, weight.to(wide), g)
    grad_input = F.pad(grad_padded, [-p for p in padding_of(g)])
    affine = wide if bn_weight is None else bn_weight.dtype
    none = input.new_empty(0)
    batch_norm = output_mask & GRAD_BATCH_NORM
    return (
        grad_input.to(dtype) if output_mask & GRAD_INPUT else none,
        grad_weight.to(dtype) if output_mask & GRAD_WEIGHT else none,
        grad_bn_weight.to(affine) if batch_norm else none.to(affine),
        grad_bn_bias.to(affine) if batch_norm else none.to(affine),
    )


def _is_channels_last(input: Tensor) -> bool:
    return torch._prims_common.suggest_memory_format(input) == torch.channels_last
