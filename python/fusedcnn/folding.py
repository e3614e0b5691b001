"""The fused block with a BatchNorm2d between convolution and ReLU, folded into the convolution."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from fusedcnn import _stock
from fusedcnn.modules import ConvReLUMaxPool2d
from fusedcnn.tools import FoldedByItsType


class FoldedBatchNorm2d(FoldedByItsType, nn.BatchNorm2d):
    """A BatchNorm2d that a :class:`ConvBatchNormReLUMaxPool2d` computes: it passes its input on.

    It keeps its parameters, statistics and place, and with them its ``state_dict`` keys.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the input, which is normalised already."""
        return input


class ConvBatchNormReLUMaxPool2d(ConvReLUMaxPool2d):
    """Conv2d, BatchNorm2d, ReLU and MaxPool2d, in one pass in evaluation mode.

    Equivalent to::

        nn.Sequential(conv, batch_norm, nn.ReLU(), pool)

    In evaluation mode the normalisation is folded into weight and bias at every call, from the
    current parameters and statistics: nothing goes stale, and gradients reach the convolution's and
    the normalisation's own parameters. Where it normalises by the batch, in training mode or for
    want of running statistics, and where its tensors do not go together, the stock layers compute
    the block, update the statistics or raise; ``build_info()["stock_calls"]`` and a debug line say
    so.

    Made by :func:`fusedcnn.fuse`; ``batch_norm`` is not a child of this module but stays where it
    stood, as a :class:`FoldedBatchNorm2d`.
    """

    def set_batch_norm(self, norm: nn.BatchNorm2d) -> None:
        """Fold ``norm``, without making it a child: its keys are those of where it stands."""
        vars(self)["batch_norm"] = norm

    def forward(self, input: Tensor) -> Tensor:
        """Return the pooled output [N, OC, OH, OW]."""
        norm = self.batch_norm
        reason = _why_stock(self, norm, input)
        if reason is not None:
            _stock.note(reason)
            return self._stock_forward(input, functools.partial(nn.BatchNorm2d.forward, norm))
        dtype = self.weight.dtype
        # Half types are folded in float32 and rounded once, as BatchNorm2d computes in float32.
        wide = torch.promote_types(dtype, torch.float32)
        scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.to(wide)
        bias = -norm.running_mean.to(wide) * scale
        if norm.bias is not None:
            bias = bias + norm.bias.to(wide)
        if self.bias is not None:
            bias = bias + self.bias.to(wide) * scale
        weight = self.weight.to(wide) * scale.view(-1, 1, 1, 1)
        return self._block_forward(input, weight.to(dtype), bias.to(dtype))


def _why_stock(conv: nn.Conv2d, norm: nn.BatchNorm2d, input: Tensor) -> str | None:
    """Why stock layers compute this call: by the batch's statistics, or to raise their errors."""
    if norm.training:
        return "BatchNorm2d in training mode"
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        return "BatchNorm2d without running statistics"
    type_of_sums = torch.promote_types(conv.weight.dtype, torch.float32)
    fits = (
        input.dim() == 4
        and norm.eps > 0
        and mean.dtype in (conv.weight.dtype, type_of_sums)
        and all(
            tensor is None or (tensor.dtype == dtype and tensor.shape == conv.weight.shape[:1])
            for tensor, dtype in (
                (mean, mean.dtype),
                (var, mean.dtype),
                (norm.weight, mean.dtype),
                (norm.bias, mean.dtype),
                (conv.bias, conv.weight.dtype),
            )
        )
        and not (mean.requires_grad or var.requires_grad)
    )
    return None if fits else "BatchNorm2d with tensors that do not go together"
