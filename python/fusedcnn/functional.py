"""Arguments, defaults and routing of the fused block."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fusedcnn import _C, _cuda, _first_use, _stock
from fusedcnn._geometry import PADDING, Geometry, pack_geometry
from fusedcnn._ops import below_autograd, forward_op
from fusedcnn.autograd import ConvReLUMaxPool2dFunction

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


def _is_dtensor(tensor: Tensor) -> bool:
    # Without importing it: where nobody has, there is none.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _mostly_padding(input: Tensor, padding_h: int, padding_w: int) -> bool:
    channels, height, width = input.shape[-3:]
    padded = (height + padding_h) * (width + padding_w)
    low, high = _PADDED_ELEMENTS
    return padded > _MAX_PADDED_GROWTH * height * width and low < padded * channels <= high


def why_stock(
    input: Tensor, weight: Tensor, geometry: tuple[int, ...], compiling: bool
) -> str | None:
    """Why the stock layers compute this call, or None where a fused kernel does."""
    if not input.is_cpu:
        device = input.device.type
        if device != "cuda":
            return f"no fused kernel for device type '{device}' in this version"
        if _cuda.reason is not None:
            return f"no fused kernel for device type 'cuda': {_cuda.reason}"
        reason = _first_use.why_stock(input.device)
        if reason is not None:
            return reason
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
    top, bottom, left, right = geometry[PADDING]
    if top + bottom + left + right > _FEW_PADDING and (
        _mostly_padding(input, top + bottom, left + right)
    ):
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
            conv_relu_max_pool2d, (input, weight, bias),
            input, weight, bias, stride, padding, dilation, groups,
            pool_kernel_size=pool_kernel_size, pool_stride=pool_stride, pool_padding=pool_padding,
            pool_dilation=pool_dilation, ceil_mode=ceil_mode,
        )  # fmt: skip
    input, weight, bias = operands(input, weight, bias)
    geometry = pack_geometry(
        weight.shape[2:], stride, padding, dilation, groups,
        pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode,
    )  # fmt: skip
    compiling = torch.compiler.is_compiling()
    reason = why_stock(input, weight, geometry, compiling)
    if reason is not None:
        _stock.note(reason)
        return _stock.layers(input, weight, bias, Geometry(*geometry))
    needs_grad = torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if not input.is_cpu and not compiling:
        _cuda.follow_torch()
    if compiling:
        return forward_op(input, weight, bias, geometry, needs_grad)[0]
    if needs_grad:
        return ConvReLUMaxPool2dFunction.apply(input, weight, bias, geometry)
    with below_autograd():
        return forward_op(input, weight, bias, geometry, False)[0]


def operands(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors, checked as far as routing needs it, in the type that autocast asks for."""
    _check_tensors(input, weight, bias)
    device_type = "cpu" if input.is_cpu else input.device.type  # the first is quicker
    if device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        input = _autocast(input, dtype)
        weight = _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
    return input, weight, bias


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
