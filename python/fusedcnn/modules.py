"""The fused block as a module: a Conv2d with pooling arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fusedcnn import _stock
from fusedcnn._geometry import Geometry, pack_geometry
from fusedcnn.functional import conv_relu_max_pool2d
from fusedcnn.tools import KnownByItsType

POOL_ARGUMENTS = (
    "pool_kernel_size", "pool_stride", "pool_padding", "pool_dilation", "ceil_mode",
)  # fmt: skip


def conv_arguments(conv: nn.Conv2d) -> tuple[Any, ...]:
    """Those that make a convolution like this one."""
    return (
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
        conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode,
    )  # fmt: skip


class ConvReLUMaxPool2d(KnownByItsType, nn.Conv2d):
    """Conv2d, ReLU and MaxPool2d in one module, computed in one pass.

    Equivalent to::

        nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation,
                                groups, bias, padding_mode),
                      nn.ReLU(),
                      nn.MaxPool2d(pool_kernel_size, pool_stride, pool_padding, pool_dilation,
                                   ceil_mode=ceil_mode))

    It is a :class:`torch.nn.Conv2d`: the same parameters under the same names, the same
    initialisation from the same random numbers, so its ``state_dict`` is the convolution's.

    The arguments are those of :class:`torch.nn.Conv2d`, and with ``pool_`` in front of their names
    those of :class:`torch.nn.MaxPool2d`; ``pool_stride`` is by default ``pool_kernel_size``. Other
    padding modes than ``"zeros"`` pad the input in a step of its own.

    Raises:
        ValueError: what :class:`torch.nn.Conv2d` refuses.
        RuntimeError: in ``forward``, sizes that do not go together; see
            :func:`fusedcnn.conv_relu_max_pool2d`.
    """

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
            padding_mode, device=device, dtype=dtype,
        )  # fmt: skip
        self.pool_kernel_size = pool_kernel_size
        self.pool_stride = pool_kernel_size if pool_stride is None else pool_stride
        self.pool_padding = pool_padding
        self.pool_dilation = pool_dilation
        self.ceil_mode = ceil_mode

    @classmethod
    def from_modules(cls, conv: nn.Conv2d, pool: nn.MaxPool2d) -> ConvReLUMaxPool2d:
        """Fuse ``pool(relu(conv(x)))``; the new module shares conv's Parameters.

        Args:
            conv: a Conv2d with plain parameters; its hooks are not carried over.
            pool: a MaxPool2d that does not return indices.

        Raises:
            TypeError: not a Conv2d or not a MaxPool2d, or one whose forward is not theirs (of a
                derived class, another fused block included, or set on the instance).
            ValueError: conv's weight or bias is no Parameter of its own (it is parametrised, or
                weight_norm or pruning computes it) or not initialised yet (LazyConv2d); or the pool
                returns indices, which the fused block does not compute.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv: expected a Conv2d, got {type(conv).__name__}")
        if not isinstance(pool, nn.MaxPool2d):
            raise TypeError(f"pool: expected a MaxPool2d, got {type(pool).__name__}")
        check_computes("conv", conv, nn.Conv2d, "forward", "_conv_forward")
        check_computes("pool", pool, nn.MaxPool2d, "forward")
        for name in ("weight", "bias"):
            parameter = conv._parameters.get(name, conv)
            if parameter is conv:
                raise ValueError(f"conv: expected a plain Parameter {name}, got a computed one")
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(
                    f"conv: expected an initialised {name}, got a {type(conv).__name__} that has "
                    "not run yet"
                )
        if pool.return_indices:
            raise ValueError("pool: expected return_indices=False, got True")
        pooling = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
        pooling = dict(zip(POOL_ARGUMENTS, pooling, strict=True))
        # On meta: the parameters are replaced, and no random numbers are drawn.
        fused = cls(*conv_arguments(conv), **pooling, device="meta")
        fused.weight = conv.weight
        fused.bias = conv.bias
        return fused.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return the pooled output [N, OC, OH, OW] (or [OC, OH, OW])."""
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return conv_relu_max_pool2d(
            input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups,
            pool_kernel_size=self.pool_kernel_size, pool_stride=self.pool_stride,
            pool_padding=self.pool_padding, pool_dilation=self.pool_dilation,
            ceil_mode=self.ceil_mode,
        )  # fmt: skip

    def _stock_forward(
        self, input: Tensor, norm: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """The block from stock layers, with a normalisation behind the convolution if given."""
        plane = self._conv_forward(input, self.weight, self.bias)
        pool = {name: getattr(self, name) for name in POOL_ARGUMENTS}
        geometry = Geometry(*pack_geometry(self.kernel_size, **pool))
        return _stock.relu_max_pool(plane if norm is None else norm(plane), geometry)

    def extra_repr(self) -> str:
        """Conv2d's line with the pool's arguments behind it."""
        pool = (f"{name}={getattr(self, name)}" for name in POOL_ARGUMENTS)
        return ", ".join((super().extra_repr(), *pool))


def check_computes(argument: str, module: nn.Module, base: type[nn.Module], *names: str) -> None:
    """Refuse a module that is a ``base`` by class, but need not compute what that does."""
    for name in names:
        if name in vars(module) or getattr(type(module), name) is not getattr(base, name):
            raise TypeError(
                f"{argument}: expected {base.__name__}'s own {name}, got that of a "
                f"{type(module).__name__}, which may compute something else"
            )
