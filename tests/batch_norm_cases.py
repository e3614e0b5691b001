"""Operands of a block with a BatchNorm, what it is to return, and how far from that it may be.

The gradients are those of the winners that the forward has picked, as in reference.py: given them
each is a plain sum, with one right answer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fusedcnn import conv_batch_norm_relu_max_pool2d
from fusedcnn._derivatives import conv_backward, dense_bn_backward, winners
from fusedcnn._geometry import Geometry, padding_of
from fusedcnn._ops import bn_backward_op, bn_forward_op
from geometries import Block, max_pool2d
from reference import normal_operands
from torch import Tensor

EPS = 1e-5


class Case(NamedTuple):
    """Everything that a forward in training and its backward take; input is [N, C, H, W]."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    grad_output: Tensor

    def map(self, function) -> Case:
        """`function` of each tensor."""
        return Case(*(t if t is None else function(t) for t in self))


def draw(block: Block, dtype: torch.dtype, affine: torch.dtype | None = None) -> Case:
    """Normal floats, and a bn_weight of both signs with a zero among them."""
    operands = normal_operands(block, dtype)
    channels = torch.arange(block.out_channels)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0])[channels % 5]
    bn_weight = (sign * (0.5 + channels.remainder(7) / 8)).to(affine or dtype)
    bn_bias = (channels.remainder(3).sub(1) / 4 + 0.125).to(affine or dtype)
    input, weight, bias, grad_output = operands
    if input.dim() == 3:
        input, grad_output = input[None], grad_output[None]
    return Case(input, weight, bias, bn_weight, bn_bias, grad_output)


def arguments(block: Block) -> dict[str, Any]:
    """What conv_batch_norm_relu_max_pool2d takes of a block."""
    names = ("stride", "padding", "dilation", "groups")
    return dict(zip(names, block.conv_arguments, strict=True)) | block.fused_keywords


def fused(block: Block, *tensors: Tensor | None, **options: Any) -> Tensor:
    """The function with a block's arguments."""
    return conv_batch_norm_relu_max_pool2d(*tensors, **arguments(block), **options)


def stock(block: Block, *tensors: Tensor | None, **options: Any) -> Tensor:
    """The four stock layers."""
    input, weight, bias, *norm = tensors
    plane = F.batch_norm(block.conv(input, weight, bias), *norm, **options)
    return max_pool2d(F.relu(plane), *block.pool_arguments)[0]


def run(block: Block, case: Case) -> tuple[dict[str, Tensor], Tensor]:
    """The operators' results by name, but for the code, which comes second."""
    *tensors, grad_output = case
    geometry = block.pack()
    output, code, extremum, mean, var = bn_forward_op(*tensors, geometry, EPS, True)
    kept = (code, extremum, mean, var)
    grads = bn_backward_op(
        grad_output, case.input, case.weight, case.bn_weight, *kept, geometry, EPS, 7
    )
    names = ("output", "mean", "var", *("grad_input", "grad_weight", "grad_gamma", "grad_beta"))
    return dict(zip(names, (output, mean, var, *grads), strict=True)), code


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(-1, 1, 1)


def expected(
    block: Block, case: Case, code: Tensor, one_by_one: int = 1
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each result in float64, and how far from it a right one may be.

    A sum of K products is allowed an error of 4 eps times the sum of their magnitudes, where adding
    one by one, in blocks or pairwise is expected to be off by a fraction of that. What is computed
    from sums inherits their errors, to first order: of a convolution output y, of mean and var, so
    of x_hat and of gamma / sqrt(var + eps), and from there of everything else. Half types round the
    convolution's outputs, as the stock layers do, and the results.

    Where a variance's squares are taken from one of `one_by_one` elements, 3 standard deviations
    from the mean, and are added one by one, they are 1 + 3**2 times as large as the variance, and
    that many roundings of eps / 2 of the sum or less walk at random: 5 eps sqrt(one_by_one) in all.
    """
    dtype, g = case.input.dtype, Geometry(*block.pack())
    eps = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    rounded = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    input, weight, _, gamma, beta, grad_output = case.map(Tensor.double)
    y, terms = block.conv(input, weight), block.conv(input.abs(), weight.abs())
    off_each = eps * terms + rounded / 2 * y.abs()
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0)
    gamma = torch.ones_like(mean) if gamma is None else gamma
    beta = torch.zeros_like(mean) if beta is None else beta
    count = y.numel() // y.shape[1]
    invstd = (var + EPS).rsqrt()
    scale = gamma.abs() * invstd
    normal = (y - _per_channel(mean)) * _per_channel(invstd)
    plane = normal * _per_channel(gamma) + _per_channel(beta)
    output = max_pool2d(F.relu(plane), *block.pool_arguments)[0]

    off_y = off_each.amax((0, 2, 3))
    off_mean = off_each.mean((0, 2, 3)) + eps * mean.abs()
    spread = (y - _per_channel(mean)).abs()
    off_var = 2 * (spread * off_each).mean((0, 2, 3)) + eps * var + off_mean**2
    if one_by_one > 1:
        off_var = off_var + 5 / 4 * eps * one_by_one**0.5 * var
    off_scale = 0.5 * off_var / (var + EPS) + eps  # relative
    off_normal = invstd * (off_y + off_mean) + normal.abs().amax((0, 2, 3)) * off_scale
    off_output = gamma.abs() * off_normal + eps * beta.abs()

    live, index = winners(code, y.shape[-1], g)
    grad = torch.where(live, grad_output, 0).abs()
    at_winners = torch.zeros_like(y).flatten(2).scatter_add(2, index.flatten(2), grad.flatten(2))
    at_winners = at_winners.view_as(y)
    sum_grad = grad.sum((0, 2, 3))
    sum_normal = (at_winners * normal.abs()).sum((0, 2, 3))
    off_gamma = sum_grad * off_normal + eps * sum_normal
    # Of grad_y = scale * (winners - sum_grad / count - normal * sum_normal / count).
    size = at_winners + _per_channel(sum_grad / count)
    size = size + normal.abs() * _per_channel(sum_normal / count)
    off = size * _per_channel(off_scale + eps) + normal.abs() * _per_channel(off_gamma / count)
    off = (
        off + _per_channel(off_normal * sum_normal / count + eps * sum_grad / count)
    ) + eps * size
    padded = F.pad(input.abs(), padding_of(g))
    off_padded, off_weight, _ = conv_backward(off * _per_channel(scale), padded, weight.abs(), g)
    off_input = F.pad(off_padded, [-p for p in padding_of(g)])

    exact = dense_bn_backward(grad_output, input, weight, gamma, code, g, EPS)
    results = (output, mean, var, *(t.detach() for t in exact))
    allowed = (
        _per_channel(off_output), off_mean, off_var, off_input, off_weight, off_gamma,
        eps * sum_grad,
    )  # fmt: skip
    names = ("output", "mean", "var", *("grad_input", "grad_weight", "grad_gamma", "grad_beta"))
    tiny = torch.finfo(dtype).tiny  # below which a type has fewer digits
    # The statistics are kept in float32.
    last = {name: eps if name in ("mean", "var") else eps + rounded for name in names}
    return {
        name: (result, bound + last[name] * result.nan_to_num(0, 0, 0).abs() + tiny)
        for name, result, bound in zip(names, results, allowed, strict=True)
    }


def too_far(block: Block, case: Case) -> list[str]:
    """Runs the operators; what of their results is further off than it may be."""
    results, code = run(block, case)
    found = []
    right = expected(block, case, code)
    for name, (result, bound) in right.items():
        ours = results[name].double()
        error = torch.where(ours == result, 0, (ours - result).abs())
        excess = (error / bound).amax().item()
        if not excess <= 1:
            found.append(f"{name}: {excess:.3g} times what is allowed")
    if not _winners_win(block, case.map(Tensor.double), code, *right["output"]):
        found.append("winners")
    return found


def _winners_win(block: Block, case: Case, code: Tensor, output: Tensor, bound: Tensor) -> bool:
    """Whether each winner is its window's largest, and "off" means none above 0, up to rounding."""
    plane = block.conv(case.input, case.weight)
    live, index = winners(code, plane.shape[-1], Geometry(*block.pack()))
    plane = F.batch_norm(plane, None, None, case.bn_weight, case.bn_bias, training=True, eps=EPS)
    value = plane.flatten(2).gather(2, index.flatten(2)).view_as(output)
    # Two values, each within `bound` of the exact one, may change places within twice that.
    return bool(torch.where(live, (value - output).abs() <= 2 * bound, output <= bound).all())
