"""Arguments, defaults and routing of the fused block."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fusedcnn import _C, _cuda
from fusedcnn._ops import Geometry, below_autograd, forward_op, note_stock, stock_pool
from fusedcnn.autograd import ConvReLUMaxPool2dFunction

_INT64_MAX = 2**63 - 1
# The backward kernels index one padded image with 32 bits; this leaves room for padding.
_MAX_IMAGE_ELEMENTS = 2**31
# The kernels lay out images with their padding, which the stock convolution never sees. Where it is
# most of the image, that is lost time and memory; below the first of these sizes neither shows.
# Beyond the second the stock layers' own sizes wrap, and the operator says what is wrong.
_PADDED_ELEMENTS = (2**18, 2**31)
_MAX_PADDED_GROWTH = 8
# Padding that cannot make an image so large, on all four sides together.
_FEW_PADDING = 128
# The CUDA kernels' coordinates and places within a channel have 32 bits; this leaves room for
# padding, and for sums.
_MAX_CUDA_PIXELS = 2**27

# Asked once: torch 2.11's compiler cannot trace the question, and asking about autocast on other
# devices (meta) is an error.
_AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla")
    if torch.amp.is_autocast_available(device)
)


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
) -> Geometry:  # fmt: skip
    stride_h, stride_w = _integers("stride", stride)
    dilation_h, dilation_w = _integers("dilation", dilation)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise RuntimeError(f"padding: expected 'same', 'valid' or ints, got {padding!r}")
        if padding == "same" and (stride_h, stride_w) != (1, 1):
            raise RuntimeError(
                f"padding: expected numbers where stride is not 1, got 'same' and stride {stride}"
            )
        same = padding == "same"
        # An odd total puts the extra zero after the last element, as torch does.
        total_h = dilation_h * (kernel_size[0] - 1) * same
        total_w = dilation_w * (kernel_size[1] - 1) * same
        pads = (total_h // 2, total_h - total_h // 2, total_w // 2, total_w - total_w // 2)
        if max(pads) > _INT64_MAX:
            raise RuntimeError(
                f"dilation: expected values for which padding='same' fits 64 bits, got {dilation}"
            )
    else:
        padding_h, padding_w = _integers("padding", padding)
        pads = (padding_h, padding_h, padding_w, padding_w)
    pool_kernel_h, pool_kernel_w = _integers("pool_kernel_size", pool_kernel)
    # As in F.max_pool2d, None and an empty list both mean the kernel's size.
    if pool_stride is None or (isinstance(pool_stride, tuple) and not pool_stride):
        pool_stride = pool_kernel
    pool_stride_h, pool_stride_w = _integers("pool_stride", pool_stride)
    pool_padding_h, pool_padding_w = _integers("pool_padding", pool_padding)
    pool_dilation_h, pool_dilation_w = _integers("pool_dilation", pool_dilation)
    try:
        groups = operator.index(groups)
    except TypeError:
        raise TypeError(f"groups: expected an int, got {groups!r}") from None
    if abs(groups) > _INT64_MAX:
        raise ValueError(f"groups: expected a value that fits 64 bits, got {groups!r}")
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"ceil_mode: expected a bool, got {ceil_mode!r}")
    return Geometry(
        stride_h, stride_w, *pads, dilation_h, dilation_w, groups, pool_kernel_h, pool_kernel_w,
        pool_stride_h, pool_stride_w, pool_padding_h, pool_padding_w, pool_dilation_h,
        pool_dilation_w, int(ceil_mode),
    )  # fmt: skip


_packed: dict[tuple, tuple[tuple, tuple[int, ...]]] = {}


def pack_geometry(
    kernel_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    pool_kernel_size: int | Sequence[int] = 2,
    pool_stride: int | Sequence[int] | None = None,
    pool_padding: int | Sequence[int] = 0,
    pool_dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> tuple[int, ...]:
    """Pack the arguments of the block into the operators' ``geometry``.

    A plain tuple of the fields of :class:`Geometry`: faster to read for torch than a named one.

    Args:
        kernel_size: (KH, KW) of the weight; decides what ``padding="same"`` means.
        stride: as in :func:`conv_relu_max_pool2d`, like all that follow.
        padding: see there.
        dilation: see there.
        groups: see there.
        pool_kernel_size: see there.
        pool_stride: see there.
        pool_padding: see there.
        pool_dilation: see there.
        ceil_mode: see there.

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
        return tuple(_pack.__wrapped__(tuple(kernel_size), *arguments))
    geometry = _pack(tuple(kernel_size), *arguments)
    if list not in map(type, given):
        if len(_packed) >= 1024:
            _packed.clear()
        _packed[given] = given[1:], tuple(geometry)
    return tuple(geometry)


def _is_dtensor(tensor: Tensor) -> bool:
    # Without importing it: where nobody has, there is none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _mostly_padding(input: Tensor, geometry: tuple[int, ...]) -> bool:
    _, _, top, bottom, left, right = geometry[:6]
    channels, height, width = input.shape[-3:]
    padded = (height + top + bottom) * (width + left + right)
    low, high = _PADDED_ELEMENTS
    return padded > _MAX_PADDED_GROWTH * height * width and low < padded * channels <= high


def _why_stock(
    input: Tensor, weight: Tensor, geometry: tuple[int, ...], compiling: bool
) -> str | None:
    """Why the stock layers compute this call, or None where a fused kernel does."""
    if not input.is_cpu:
        device = input.device.type
        if device != "cuda":
            return f"no fused kernel for device type '{device}' in this version"
        if _cuda.reason is not None:
            return f"no fused kernel for device type 'cuda': {_cuda.reason}"
        if input.shape[-2] * input.shape[-1] > _MAX_CUDA_PIXELS:
            return f"CUDA images of more than {_MAX_CUDA_PIXELS} pixels"
    if input.layout != torch.strided:
        return f"no fused kernel for layout {input.layout}"
    if type(input) is not Tensor and (_is_dtensor(input) or _is_dtensor(weight)):
        return "a DTensor, whose sharding the fused operator does not know"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if compiling and torch.onnx.is_in_onnx_export():
        return "torch.onnx.export, for which the stock operators have translations"
    # The whole batch is quicker to look at, but must not bound a symbolic batch size.
    if (compiling or input.numel() > _MAX_IMAGE_ELEMENTS) and (
        input.shape[-3] * input.shape[-2] * input.shape[-1] > _MAX_IMAGE_ELEMENTS
    ):
        return f"images of more than {_MAX_IMAGE_ELEMENTS} elements"
    padding = geometry[2] + geometry[3] + geometry[4] + geometry[5]
    if padding > _FEW_PADDING and _mostly_padding(input, geometry):
        if not compiling:  # the stock layers' own messages name no argument
            shape = input.shape if input.dim() == 4 else (1, *input.shape)
            _C.check_sizes(shape, weight.shape, geometry)
        return "images that are mostly padding"
    return None


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # As torch casts operands: not float64, and never integers or complex numbers, whose imaginary
    # part would be lost.
    castable = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if castable else tensor


def _stock(input, weight, bias, stride, padding, dilation, groups, geometry) -> Tensor:
    plane = F.relu(F.conv2d(input, weight, bias, stride, padding, dilation, groups))
    return stock_pool(plane, Geometry(*geometry))


def conv_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    pool_kernel_size: int | Sequence[int] = 2,
    pool_stride: int | Sequence[int] | None = None,
    pool_padding: int | Sequence[int] = 0,
    pool_dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    r"""Convolution, bias, ReLU and max pooling in one pass, differentiable.

    Equivalent to::

        F.max_pool2d(F.relu(F.conv2d(input, weight, bias, stride, padding, dilation, groups)),
                     pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode)

    in value and in every gradient: the first maximum of a window takes its gradient, ReLU's
    gradient at 0 is 0, NaN passes through. For the backward it keeps ``input``, ``weight`` and one
    byte per pooled output; the stock layers keep ReLU's output and eight bytes per pooled output
    instead of that byte.

    Args:
        input: [N, C, H, W] or [C, H, W]; float32, float64, bfloat16 or float16; any strides.
            A channels_last input gives a channels_last output.
        weight: [OC, C / groups, KH, KW], of input's dtype and device.
        bias: [OC] or None.
        stride: of the convolution, in pixels; an int or (h, w), like all sizes here.
        padding: zeros on both sides, or ``"same"`` or ``"valid"``.
        dilation: distance between the kernel's taps.
        groups: blocks of channels convolved apart.
        pool_kernel_size: size of the pooling window, in convolution outputs.
        pool_stride: distance between windows; default: ``pool_kernel_size``.
        pool_padding: ignored elements on both sides, at most half a window.
        pool_dilation: distance between a window's elements.
        ceil_mode: round the pooled size up instead of down.

    Returns:
        [N, OC, OH, OW] (or [OC, OH, OW]), sizes as :class:`torch.nn.Conv2d` and
        :class:`torch.nn.MaxPool2d` define them.

    Raises:
        TypeError: an argument of the wrong type.
        RuntimeError: shapes, dtypes, devices or sizes that do not go together. The message names
            the argument, what was expected and what came; nothing has been computed.

    Source: :func:`torch.nn.functional.conv2d`, :func:`torch.nn.functional.max_pool2d`. Devices
    without a fused kernel are served by those, with a debug line in the ``fusedcnn`` logger.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            conv_relu_max_pool2d,
            (input, weight, bias),
            input,
            weight,
            bias,
            stride,
            padding,
            dilation,
            groups,
            pool_kernel_size=pool_kernel_size,
            pool_stride=pool_stride,
            pool_padding=pool_padding,
            pool_dilation=pool_dilation,
            ceil_mode=ceil_mode,
        )
    _check_tensors(input, weight, bias)  # what the lines below need; the operator checks the rest
    device_type = "cpu" if input.is_cpu else input.device.type  # the first is quicker
    if device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        input = _autocast(input, dtype)
        weight = _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
    geometry = pack_geometry(
        weight.shape[2:],
        stride,
        padding,
        dilation,
        groups,
        pool_kernel_size=pool_kernel_size,
        pool_stride=pool_stride,
        pool_padding=pool_padding,
        pool_dilation=pool_dilation,
        ceil_mode=ceil_mode,
    )
    compiling = torch.compiler.is_compiling()
    reason = _why_stock(input, weight, geometry, compiling)
    if reason is not None:
        note_stock(reason)
        return _stock(input, weight, bias, stride, padding, dilation, groups, geometry)
    needs_grad = torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if device_type == "cuda" and not compiling:
        _cuda.follow_tf32()
    if compiling:
        return forward_op(input, weight, bias, geometry, needs_grad)[0]
    if needs_grad:
        return ConvReLUMaxPool2dFunction.apply(input, weight, bias, geometry)
    with below_autograd():
        return forward_op(input, weight, bias, geometry, False)[0]


def _check_tensors(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor, got {type(input).__name__}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a Tensor, got {type(weight).__name__}")
    if input.dim() not in (3, 4):
        raise RuntimeError(f"input: expected [N, C, H, W] or [C, H, W], got {list(input.shape)}")
    if weight.dim() != 4:
        raise RuntimeError(
            f"weight: expected [out_channels, in_channels / groups, KH, KW], "
            f"got {list(weight.shape)}"
        )
    _check_like("weight", weight, input)
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"bias: expected a Tensor or None, got {type(bias).__name__}")
        _check_like("bias", bias, input)


def _check_like(argument: str, tensor: Tensor, input: Tensor) -> None:
    if not (tensor.is_cpu and input.is_cpu) and tensor.device != input.device:
        raise RuntimeError(
            f"{argument}: expected device {input.device} like input, got {tensor.device}"
        )
    if tensor.layout != input.layout:
        raise RuntimeError(
            f"{argument}: expected layout {input.layout} like input, got {tensor.layout}"
        )
