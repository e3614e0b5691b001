"""The block with a BatchNorm2d between convolution and ReLU, as a module."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from fusedcnn import _stock
from fusedcnn.batch_norm import conv_batch_norm_relu_max_pool2d
from fusedcnn.modules import ConvReLUMaxPool2d, check_computes
from fusedcnn.tools import FoldedByItsType


class FoldedBatchNorm2d(FoldedByItsType, nn.BatchNorm2d):
    """A BatchNorm2d that a :class:`ConvBatchNormReLUMaxPool2d` computes: it passes its input on.

    It keeps its parameters, statistics and place, and with them its ``state_dict`` keys.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the input, which is normalised already."""
        return input


class ConvBatchNormReLUMaxPool2d(ConvReLUMaxPool2d):
    """Conv2d, BatchNorm2d, ReLU and MaxPool2d in one module, computed in one pass.

    Equivalent to::

        nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation,
                                groups, bias, padding_mode),
                      nn.BatchNorm2d(out_channels, eps, momentum, affine, track_running_stats),
                      nn.ReLU(),
                      nn.MaxPool2d(pool_kernel_size, pool_stride, pool_padding, pool_dilation,
                                   ceil_mode=ceil_mode))

    in training mode, with its running statistics, and in evaluation mode, where the normalisation
    is folded into weight and bias at every call: nothing goes stale, and gradients reach the
    convolution's and the normalisation's own parameters. ``batch_norm``'s mode decides, so that
    ``block.batch_norm.eval()`` freezes its statistics alone.

    It is a :class:`torch.nn.Conv2d` with a :class:`torch.nn.BatchNorm2d` as its child
    ``batch_norm``: ``weight``, ``bias``, ``batch_norm.weight``, ``batch_norm.running_mean`` and so
    on are the keys of its ``state_dict``, and the initial values are theirs. Hooks on
    ``batch_norm``, or a module of another class in its place (a SyncBatchNorm, say), are honoured:
    stock layers then compute the block. In a model that :func:`fusedcnn.fuse` has changed
    ``batch_norm`` is no child, but stays where it stood, as a :class:`FoldedBatchNorm2d`.

    The arguments are those of :class:`torch.nn.Conv2d` and :class:`torch.nn.BatchNorm2d`, and with
    ``pool_`` in front of their names those of :class:`torch.nn.MaxPool2d`; ``pool_stride`` is by
    default ``pool_kernel_size``.

    Raises:
        ValueError: what :class:`torch.nn.Conv2d` refuses; in ``forward``, an input that is not
            [N, C, H, W], and what :func:`fusedcnn.conv_batch_norm_relu_max_pool2d` raises.
        RuntimeError: in ``forward``, see there.
    """

    batch_norm: nn.Module

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        pool_kernel_size: int | tuple[int, int] = 2,
        pool_stride: int | tuple[int, int] | None = None,
        pool_padding: int | tuple[int, int] = 0,
        pool_dilation: int | tuple[int, int] = 1,
        ceil_mode: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, pool_kernel_size=pool_kernel_size, pool_stride=pool_stride,
            pool_padding=pool_padding, pool_dilation=pool_dilation, ceil_mode=ceil_mode,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.batch_norm = nn.BatchNorm2d(
            out_channels, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )

    @classmethod
    def from_modules(
        cls, conv: nn.Conv2d, norm: nn.BatchNorm2d, pool: nn.MaxPool2d
    ) -> ConvBatchNormReLUMaxPool2d:
        """Fuse ``pool(relu(norm(conv(x))))``; the new module shares conv's Parameters.

        Args:
            conv: as in :meth:`ConvReLUMaxPool2d.from_modules`.
            norm: a BatchNorm2d of conv's channels; it becomes ``batch_norm``, in its mode.
            pool: a MaxPool2d that does not return indices.

        Raises:
            TypeError: not of these classes, or one whose forward is not theirs.
            ValueError: what :meth:`ConvReLUMaxPool2d.from_modules` refuses, or a norm of another
                number of channels.
        """
        if not isinstance(norm, nn.BatchNorm2d):
            raise TypeError(f"norm: expected a BatchNorm2d, got {type(norm).__name__}")
        check_computes("norm", norm, nn.BatchNorm2d, "forward")
        fused = super().from_modules(conv, pool)
        if norm.num_features != conv.out_channels:
            raise ValueError(
                f"norm: expected {conv.out_channels} channels like conv's output, got "
                f"{norm.num_features}"
            )
        fused.batch_norm = norm
        return fused

    def leave_batch_norm(self) -> None:
        """Make ``batch_norm`` no child: its keys are those of where it stands."""
        vars(self)["batch_norm"] = self._modules.pop("batch_norm")

    def forward(self, input: Tensor) -> Tensor:
        """Return the pooled output [N, OC, OH, OW]."""
        norm = self.batch_norm
        if not isinstance(norm, FoldedBatchNorm2d) and _works_otherwise(norm):
            _stock.note("a normalisation that is no plain BatchNorm2d, or has hooks")
            return self._stock_forward(input, norm)
        if isinstance(input, fx.Proxy):
            raise fx.proxy.TraceError(
                f"{type(self).__name__}: torch.fx would fix the mode of its normalisation; make it "
                "a leaf (Tracer.is_leaf_module), or call fusedcnn.unfuse first"
            )
        if input.dim() == 3:
            raise ValueError("input: expected 4D input, [N, C, H, W] (got 3D input)")
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        # As nn.BatchNorm2d decides, but for the count of batches, which waits for the result.
        count = norm.num_batches_tracked if norm.training and norm.track_running_stats else None
        momentum = norm.momentum
        if momentum is None:
            momentum = 0.0 if count is None else 1.0 / float(count + 1)
        mean, var = norm.running_mean, norm.running_var
        by_the_batch = norm.training or (mean is None and var is None)
        if norm.training and not norm.track_running_stats:
            mean = var = None
        output = conv_batch_norm_relu_max_pool2d(
            input, self.weight, self.bias, mean, var, norm.weight, norm.bias,
            self.stride, padding, self.dilation, self.groups,
            training=by_the_batch, momentum=momentum, eps=norm.eps,
            pool_kernel_size=self.pool_kernel_size, pool_stride=self.pool_stride,
            pool_padding=self.pool_padding, pool_dilation=self.pool_dilation,
            ceil_mode=self.ceil_mode,
        )  # fmt: skip
        if count is not None:
            count.add_(1)
        return output


def _works_otherwise(norm: nn.Module) -> bool:
    own = vars(norm)
    return bool(
        type(norm) is not nn.BatchNorm2d
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )
