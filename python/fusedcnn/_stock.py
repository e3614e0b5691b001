"""The stock layers, which compute what no kernel covers, and a count of the calls that they did."""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fusedcnn._geometry import Geometry, padding_of, pool_of
from fusedcnn._log import logger

calls: Counter[str] = Counter()  # by reason


def note(reason: str) -> None:
    """Count a call that the stock layers compute; logs each reason once.

    Not while a graph is captured: torch.compile would break it at the log line.
    """
    if torch.compiler.is_compiling():
        return
    calls[reason] += 1
    if calls[reason] == 1:  # once each: a training loop would repeat it at every step
        logger.debug("computed by the stock layers: %s", reason)


def conv(input: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    """The convolution."""
    padding = (g.padding_top, g.padding_left)
    if padding != (g.padding_bottom, g.padding_right):
        input = F.pad(input, padding_of(g))
        padding = (0, 0)
    strides, dilations = (g.stride_h, g.stride_w), (g.dilation_h, g.dilation_w)
    return F.conv2d(input, weight, bias, strides, padding, dilations, g.groups)


def relu_max_pool(plane: Tensor, g: Geometry) -> Tensor:
    """ReLU and pool of a convolution's output."""
    plane = F.relu(plane)
    padded = (g.pool_padding_h and g.pool_dilation_h > 1) or (
        g.pool_padding_w and g.pool_dilation_w > 1
    )
    return _pool_over_padding(plane, g) if padded else F.max_pool2d(plane, *pool_of(g))


@fx.wrap  # which cannot trace a question about sizes
def _pool_over_padding(plane: Tensor, g: Geometry) -> Tensor:
    """The pool where its windows may lie wholly in padding.

    Where dilation takes a window from the padding before the plane past its end, the window is the
    axis's only one, and all results are -inf. The stock pool gives it an index outside of the
    plane, where its backward would write: no gradient may reach it.
    """
    empty = any(
        dilation > 1 and -padding % dilation >= size
        for size, padding, dilation in (
            (plane.shape[-2], g.pool_padding_h, g.pool_dilation_h),
            (plane.shape[-1], g.pool_padding_w, g.pool_dilation_w),
        )
    )
    if not empty:
        return F.max_pool2d(plane, *pool_of(g))
    pooled = F.max_pool2d(plane.detach(), *pool_of(g))
    # The sum is never taken; through it the plane's gradient is zero instead of missing.
    return torch.where(pooled == -torch.inf, pooled, plane.sum())


def layers(input: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    """Convolution, ReLU and pool: the meaning of the operator in plain torch."""
    return relu_max_pool(conv(input, weight, bias, g), g)
