"""The operators' packed ``geometry``: its fields, and how the block's arguments become them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

_INT64_MAX = 2**63 - 1
# Windows up to this many elements have one-byte codes, as in csrc/core/geometry.h.
_LARGEST_BYTE_WINDOW = 255


class Geometry(NamedTuple):
    """Fields of the operators' packed ``geometry``, in order."""

    stride_h: int
    stride_w: int
    padding_top: int
    padding_bottom: int
    padding_left: int
    padding_right: int
    dilation_h: int
    dilation_w: int
    groups: int
    pool_kernel_h: int
    pool_kernel_w: int
    pool_stride_h: int
    pool_stride_w: int
    pool_padding_h: int
    pool_padding_w: int
    pool_dilation_h: int
    pool_dilation_w: int
    ceil_mode: int


# Of a packed geometry: top, bottom, left, right.
PADDING = slice(Geometry._fields.index("padding_top"), Geometry._fields.index("dilation_h"))


def padding_of(g: Geometry) -> list[int]:
    """What F.pad takes to pad the input."""
    return [g.padding_left, g.padding_right, g.padding_top, g.padding_bottom]


def pool_of(g: Geometry) -> tuple[Any, ...]:
    """What follows the input in F.max_pool2d."""
    return (
        [g.pool_kernel_h, g.pool_kernel_w],
        [g.pool_stride_h, g.pool_stride_w],
        [g.pool_padding_h, g.pool_padding_w],
        [g.pool_dilation_h, g.pool_dilation_w],
        bool(g.ceil_mode),
    )


def plane_sizes(g: Geometry, padded: Sequence[int], kernel: Sequence[int]) -> list[int]:
    """(H, W) of the convolution's output, of an input of (H, W) with its padding."""
    dilations, strides = (g.dilation_h, g.dilation_w), (g.stride_h, g.stride_w)
    axes = zip(padded, kernel, dilations, strides, strict=True)
    return [(size - dilation * (k - 1) - 1) // stride + 1 for size, k, dilation, stride in axes]


def code_dtype(g: Geometry) -> torch.dtype:
    """What codes are stored in."""
    wide = g.pool_kernel_h * g.pool_kernel_w > _LARGEST_BYTE_WINDOW
    return torch.int32 if wide else torch.uint8


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """What statistics are computed in: half types in float32."""
    return torch.promote_types(dtype, torch.float32)


def off(dtype: torch.dtype) -> int:
    """The code of a window whose gradient ReLU stops."""
    return -1 if dtype == torch.int32 else 255


def _integers(argument: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Two integers from one or two, with torch's rules."""
    values = value if isinstance(value, (tuple, list, torch.Size)) else (value,)
    try:
        values = tuple(operator.index(v) for v in values)
    except TypeError:
        raise TypeError(f"{argument}: expected an int or a pair of ints, got {value!r}") from None
    if len(values) not in (1, 2):
        raise RuntimeError(f"{argument}: expected an int or a pair of ints, got {value!r}")
    if any(abs(v) > _INT64_MAX for v in values):
        raise ValueError(f"{argument}: expected values that fit 64 bits, got {value!r}")
    return (values[0], values[-1])


# Typed, and called with integers only inside tuples (see pack_geometry): 2.0 == 2, but is no size.
@functools.lru_cache(maxsize=1024, typed=True)
def _pack(
    kernel_size, stride, padding, dilation, groups, pool_kernel, pool_stride, pool_padding,
    pool_dilation, ceil_mode,
) -> tuple[int, ...]:  # fmt: skip
    strides = _integers("stride", stride)
    dilations = _integers("dilation", dilation)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise RuntimeError(f"padding: expected 'same', 'valid' or ints, got {padding!r}")
        if padding == "same" and strides != (1, 1):
            raise RuntimeError(
                f"padding: expected numbers where stride is not 1, got 'same' and stride {stride}"
            )
        total_h, total_w = (
            d * (k - 1) * (padding == "same") for d, k in zip(dilations, kernel_size, strict=True)
        )
        # An odd total puts the extra zero after the last element, as torch does.
        pads = (total_h // 2, total_h - total_h // 2, total_w // 2, total_w - total_w // 2)
        if max(pads) > _INT64_MAX:
            raise RuntimeError(
                f"dilation: expected values for which padding='same' fits 64 bits, got {dilation}"
            )
    else:
        padding_h, padding_w = _integers("padding", padding)
        pads = (padding_h, padding_h, padding_w, padding_w)
    pool_kernels = _integers("pool_kernel_size", pool_kernel)
    # As in F.max_pool2d, None and an empty list both mean the kernel's size.
    if pool_stride is None or (isinstance(pool_stride, tuple) and not pool_stride):
        pool_stride = pool_kernel
    pool_sizes = (
        *pool_kernels,
        *_integers("pool_stride", pool_stride),
        *_integers("pool_padding", pool_padding),
        *_integers("pool_dilation", pool_dilation),
    )
    try:
        groups = operator.index(groups)
    except TypeError:
        raise TypeError(f"groups: expected an int, got {groups!r}") from None
    if abs(groups) > _INT64_MAX:
        raise ValueError(f"groups: expected a value that fits 64 bits, got {groups!r}")
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"ceil_mode: expected a bool, got {ceil_mode!r}")
    return tuple(Geometry(*strides, *pads, *dilations, groups, *pool_sizes, int(ceil_mode)))


# Geometries by the arguments that gave them, which stand beside them.
_packed: dict[tuple, tuple[tuple, tuple[int, ...]]] = {}


def pack_geometry(
    kernel_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    pool_kernel_size: int | Sequence[int] = 2,
    pool_stride: int | Sequence[int] | None = None,
    pool_padding: int | Sequence[int] = 0,
    pool_dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> tuple[int, ...]:
    """Pack the arguments of :func:`fusedcnn.conv_relu_max_pool2d` into the operators' ``geometry``.

    ``kernel_size``, (KH, KW) of the weight, decides what ``padding="same"`` means. The result is a
    plain tuple of the fields of :class:`Geometry`: faster to read for torch than a named one.

    Raises:
        TypeError: an argument is not an int, a pair of ints or (padding) a string.
        RuntimeError: a list of another length, an unknown padding string, ``"same"`` with a stride.
            Ranges are checked by the operator, which knows the sizes.
    """
    given = (
        kernel_size, stride, padding, dilation, groups, pool_kernel_size, pool_stride,
        pool_padding, pool_dilation, ceil_mode,
    )  # fmt: skip
    # torch.compile looks into functions, not into their caches, and would warn of one.
    cached = not torch.compiler.is_compiling()
    if cached:
        try:
            same, geometry = _packed[given]
            # The very objects of an earlier call, as a module's attributes and a program's
            # constants are: equal ones may be of another type.
            if all(map(operator.is_, given[1:], same)):
                return geometry
        except (KeyError, TypeError):  # TypeError: a list, which has no hash
            pass
    arguments = list(given[1:])
    for i, value in enumerate(arguments):
        kind = type(value)
        if kind is int or kind is bool or kind is str or value is None:
            continue
        if kind is list:
            arguments[i] = value = tuple(value)
        # Anything else but plain integers in a tuple is looked at afresh every time.
        if not (type(value) is tuple and all(type(v) is int for v in value)):
            cached = False
    if not cached:
        return _pack.__wrapped__(tuple(kernel_size), *arguments)
    geometry = _pack(tuple(kernel_size), *arguments)
    if list not in map(type, given):
        if len(_packed) >= 1024:
            _packed.clear()
        _packed[given] = given[1:], geometry
    return geometry
