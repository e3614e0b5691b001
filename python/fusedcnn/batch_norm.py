"""The block with a BatchNorm between convolution and ReLU: checks, routing, running statistics."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from fusedcnn import _C, _cuda, _first_use, _stock
from fusedcnn._geometry import Geometry, pack_geometry, plane_sizes, sums_dtype
from fusedcnn._ops import below_autograd, bn_forward_op
from fusedcnn.autograd import ConvBatchNormReLUMaxPool2dFunction
from fusedcnn.functional import conv_relu_max_pool2d, operands, why_stock


def conv_batch_norm_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pool_kernel_size: int | Sequence[int] = 2,
    pool_stride: int | Sequence[int] | None = None,
    pool_padding: int | Sequence[int] = 0,
    pool_dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    r"""Convolution, batch normalisation, ReLU and max pooling in one pass, differentiable.

    Equivalent to::

        plane = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        plane = F.batch_norm(plane, running_mean, running_var, bn_weight, bn_bias, training,
                             momentum, eps)
        F.max_pool2d(F.relu(plane), pool_kernel_size, pool_stride, pool_padding, pool_dilation,
                     ceil_mode)

    in value and in every gradient, and in what becomes of the running statistics. In training it
    keeps ``input``, ``weight``, one byte and one element per pooled output and two numbers per
    channel for the backward; the stock layers keep two tensors of the convolution output's size and
    eight bytes per pooled output. In evaluation mode the normalisation is folded into weight and
    bias, and the call is one of :func:`fusedcnn.conv_relu_max_pool2d`.

    Args:
        input: [N, C, H, W]; float32, float64, bfloat16 or float16; any strides. A channels_last
            input gives a channels_last output.
        weight: [OC, C / groups, KH, KW], of input's dtype and device.
        bias: [OC] or None. In training it moves the running mean alone, and its gradient is zero.
        running_mean: [OC], of the same dtype as the three that follow: input's, or float32 where
            input is of a half type. None, like running_var, where training keeps no statistics.
        running_var: [OC]. Both are updated in training, once everything else is done: after an
            error they are as they were.
        bn_weight: [OC] or None for ones; of any sign.
        bn_bias: [OC] or None for zeros.
        stride: of the convolution, in pixels; an int or (h, w), like all sizes here.
        padding: zeros on both sides, or ``"same"`` or ``"valid"``.
        dilation: distance between the kernel's taps.
        groups: blocks of channels convolved apart.
        training: normalise by the batch's mean and (biased) variance, and update the running ones;
            otherwise normalise by the running ones.
        momentum: weight of the batch's mean and (unbiased) variance in the running ones.
        eps: added to the variance.
        pool_kernel_size: size of the pooling window, in convolution outputs.
        pool_stride: distance between windows; default: ``pool_kernel_size``.
        pool_padding: ignored elements on both sides, at most half a window.
        pool_dilation: distance between a window's elements.
        ceil_mode: round the pooled size up instead of down.

    Returns:
        [N, OC, OH, OW], sizes as :class:`torch.nn.Conv2d` and :class:`torch.nn.MaxPool2d` define
        them.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: one value per channel in training; one running statistic without the other, or
            an eps that is not positive, likewise.
        RuntimeError: shapes, dtypes, devices or sizes that do not go together, no running
            statistics in evaluation mode, or such that require a gradient. The message names the
            argument, what was expected and what came; nothing has been computed.

    Source: :func:`torch.nn.functional.conv2d`, :func:`torch.nn.functional.batch_norm`,
    :func:`torch.nn.functional.max_pool2d`. Devices without a fused kernel are served by those, with
    a debug line in the ``fusedcnn`` logger.
    """
    tensors = (input, weight, bias, running_mean, running_var, bn_weight, bn_bias)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            conv_batch_norm_relu_max_pool2d, tensors,
            *tensors, stride, padding, dilation, groups,
            training=training, momentum=momentum, eps=eps, pool_kernel_size=pool_kernel_size,
            pool_stride=pool_stride, pool_padding=pool_padding, pool_dilation=pool_dilation,
            ceil_mode=ceil_mode,
        )  # fmt: skip
    if not isinstance(training, bool):
        raise TypeError(f"training: expected a bool, got {training!r}")
    momentum, eps = _number("momentum", momentum), _number("eps", eps)
    given = input, weight, bias
    input, weight, bias = operands(*given)
    if input.dim() != 4:
        raise RuntimeError(f"input: expected [N, C, H, W], got {list(input.shape)}")
    norm = (running_mean, running_var, bn_weight, bn_bias)
    _check_norm(input, weight.shape[0], *norm, training, eps)
    if not training and _foldable(bn_weight, bn_bias, eps):
        _check_to_fold(input, weight, bias)
        folded = _fold(*given[1:], *norm, eps)
        return conv_relu_max_pool2d(
            given[0], *folded, stride, padding, dilation, groups,
            pool_kernel_size=pool_kernel_size, pool_stride=pool_stride, pool_padding=pool_padding,
            pool_dilation=pool_dilation, ceil_mode=ceil_mode,
        )  # fmt: skip
    geometry = pack_geometry(
        weight.shape[2:], stride, padding, dilation, groups,
        pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode,
    )  # fmt: skip
    compiling = torch.compiler.is_compiling()
    reason = _why_stock(input, weight, geometry, norm, training, compiling)
    if training and input.shape[0] == 1:
        _check_one_value(input, weight, geometry, compiling)
    if reason is not None:
        _stock.note(reason)
        return _stock_layers(
            input, weight, bias, norm, training, momentum, eps, Geometry(*geometry)
        )
    if not input.is_cpu and not compiling:
        _cuda.follow_torch()
    arguments = (input, weight, bias, bn_weight, bn_bias, geometry, eps)
    needs_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in arguments[:5]
    )
    update = None
    if running_mean is not None:
        update = functools.partial(
            _update, running_mean, running_var, input, weight, bias, Geometry(*geometry), momentum
        )
    if needs_grad and not compiling:
        return ConvBatchNormReLUMaxPool2dFunction.apply(*arguments, update)
    with contextlib.nullcontext() if compiling else below_autograd():
        output, _code, _extremum, *statistics = bn_forward_op(*arguments, needs_grad)
    if update is not None:
        update(*statistics)
    return output


# ---- checks --------------------------------------------------------------------------------------


def _number(argument: str, value: Any) -> float:
    """A float, or what stands for one while torch.compile or torch.export traces."""
    if type(value) is float or isinstance(value, torch.SymFloat):
        return value
    # str has no __float__ and neither has None or a complex number.
    if not hasattr(value, "__float__"):
        raise TypeError(f"{argument}: expected a number, got {value!r}")
    return float(value)


def _check_norm(
    input: Tensor,
    channels: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    """Refuse what F.batch_norm refuses, of the class that it raises."""
    if training:
        if (running_mean is None) != (running_var is None):
            missing = "running_mean" if running_mean is None else "running_var"
            raise ValueError(f"{missing}: expected both running statistics or none, got one")
        if eps <= 0:
            raise ValueError(f"eps: expected a positive number in training, got {eps}")
    elif eps < 0:
        raise ValueError(f"eps: expected no negative number, got {eps}")
    dtype = None
    for name, tensor in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("bn_weight", bn_weight),
        ("bn_bias", bn_bias),
    ):
        statistic = name[0] == "r"
        if tensor is None:
            if statistic and not training:
                raise RuntimeError(f"{name}: expected a Tensor in evaluation mode, got None")
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor or None, got {type(tensor).__name__}")
        if tensor.numel() != channels or (statistic and tensor.dim() != 1):
            raise RuntimeError(
                f"{name}: expected [{channels}], one for each channel of weight, got "
                f"{list(tensor.shape)}"
            )
        if not (tensor.is_cpu and input.is_cpu) and tensor.device != input.device:
            raise RuntimeError(
                f"{name}: expected device {input.device} like input, got {tensor.device}"
            )
        if dtype is None:
            dtype = tensor.dtype
            _check_dtype(name, dtype, input.dtype)
        elif tensor.dtype != dtype:
            raise RuntimeError(
                f"{name}: expected dtype {dtype} like the normalisation's other tensors, got "
                f"{tensor.dtype}"
            )
        if statistic and tensor.requires_grad:
            raise RuntimeError(f"{name}: expected a Tensor that requires no gradient")
        if statistic and training and channels > 1 and tensor.stride(0) == 0:
            raise RuntimeError(f"{name}: expected elements of their own, got an expanded tensor")
        if statistic or not training:  # the operator looks at its own
            _check_memory(name, tensor)


def _check_dtype(argument: str, dtype: torch.dtype, inputs: torch.dtype) -> None:
    # Of an input of integers, or a quantized one, the operators have something to say.
    if dtype != inputs and inputs.is_floating_point and dtype != sums_dtype(inputs):
        allowed = " or ".join(map(str, dict.fromkeys((inputs, sums_dtype(inputs)))))
        raise RuntimeError(f"{argument}: expected dtype {allowed} for this input, got {dtype}")


def _check_memory(argument: str, tensor: Tensor) -> None:
    """Refuse a tensor whose storage was released or cut short: torch would read on regardless."""
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return
    if torch._C._are_functorch_transforms_active():  # whose wrappers have none
        return
    if not tensor.numel() or tensor.layout != torch.strided or tensor.is_meta:
        return
    needed = tensor.storage_offset()
    if tensor.is_contiguous():  # quicker
        needed += tensor.numel()
    else:
        axes = zip(tensor.shape, tensor.stride(), strict=True)
        needed += sum((size - 1) * stride for size, stride in axes) + 1
    held = tensor.untyped_storage().nbytes() // tensor.element_size()
    if held < needed:
        raise RuntimeError(
            f"{argument}: expected memory for {needed} elements, got a storage of {held}"
        )


def _check_one_value(
    input: Tensor, weight: Tensor, geometry: tuple[int, ...], compiling: bool
) -> None:
    if not compiling:
        _C.check_sizes(input.shape, weight.shape, geometry)
    sizes = _plane_of(input, weight, Geometry(*geometry))
    if sizes == [1, 1]:
        shape = torch.Size([1, weight.shape[0], 1, 1])
        raise ValueError(
            f"input: Expected more than 1 value per channel when training, got input size {shape} "
            "of the normalisation"
        )


def _plane_of(input: Tensor, weight: Tensor, g: Geometry) -> list[int]:
    padded = (
        input.shape[2] + g.padding_top + g.padding_bottom,
        input.shape[3] + g.padding_left + g.padding_right,
    )
    return plane_sizes(g, padded, weight.shape[2:])


# ---- routing -------------------------------------------------------------------------------------


def _why_stock(
    input: Tensor,
    weight: Tensor,
    geometry: tuple[int, ...],
    norm: tuple[Tensor | None, ...],
    training: bool,
    compiling: bool,
) -> str | None:
    """Why the stock layers compute this call, or None where the operator does."""
    if not training:
        return "BatchNorm2d whose tensors cannot be folded"
    reason = why_stock(input, weight, geometry, compiling)
    if reason is None and not input.is_cpu:
        reason = _first_use.why_stock_batch_norm(input.device)
    if reason is not None:
        return reason
    if input.shape[0] == 0:
        return "a BatchNorm2d of an empty batch"
    if any(t is not None and (t.dim() != 1 or t.layout != torch.strided) for t in norm):
        return "BatchNorm2d with parameters that are no plain vectors"
    return None


def _stock_layers(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor | None, ...],
    training: bool,
    momentum: float,
    eps: float,
    g: Geometry,
) -> Tensor:
    """The meaning of the block in plain torch, with statistics that are written at the end."""
    running_mean, running_var, *affine = norm
    kept = [running_mean, running_var]
    if training and running_mean is not None:
        kept = [running_mean.clone(), running_var.clone()]
    plane = _stock.conv(input, weight, bias, g)
    plane = F.batch_norm(plane, *kept, *affine, training, momentum, eps)
    output = _stock.relu_max_pool(plane, g)
    if kept[0] is not running_mean:
        with torch.no_grad():
            running_mean.copy_(kept[0])
            running_var.copy_(kept[1])
    return output


# ---- evaluation mode -----------------------------------------------------------------------------


def _foldable(bn_weight: Tensor | None, bn_bias: Tensor | None, eps: float) -> bool:
    return eps > 0 and all(t is None or t.dim() == 1 for t in (bn_weight, bn_bias))


def _check_to_fold(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse what the convolution would, and folding would hide or be the first to touch."""
    if weight.dtype != input.dtype and input.is_floating_point():
        raise RuntimeError(f"weight: expected dtype {input.dtype} like input, got {weight.dtype}")
    _check_memory("weight", weight)
    if bias is None:
        return
    _check_memory("bias", bias)
    if bias.shape != weight.shape[:1]:
        raise RuntimeError(
            f"bias: expected [{weight.shape[0]}], one for each channel of weight, got "
            f"{list(bias.shape)}"
        )
    if bias.dtype != weight.dtype:
        raise RuntimeError(f"bias: expected dtype {weight.dtype} like weight, got {bias.dtype}")


def _fold(
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that also normalises."""
    # Half types are folded in float32 and rounded once, as BatchNorm2d computes in float32.
    dtype, wide = weight.dtype, sums_dtype(weight.dtype)
    scale = torch.rsqrt(running_var.to(wide) + eps)
    if bn_weight is not None:
        scale = scale * bn_weight.to(wide)
    shift = -running_mean.to(wide) * scale
    if bn_bias is not None:
        shift = shift + bn_bias.to(wide)
    if bias is not None:
        shift = shift + bias.to(wide) * scale
    weight = weight.to(wide) * scale.view(-1, 1, 1, 1)
    return weight.to(dtype), shift.to(dtype)


# ---- running statistics --------------------------------------------------------------------------


def _update(
    running_mean: Tensor,
    running_var: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: Geometry,
    momentum: float,
    mean: Tensor,
    var: Tensor,
) -> None:
    """Mix the batch's statistics into the running ones: the variance with the divisor count - 1."""
    conv_h, conv_w = _plane_of(input, weight, g)
    count = input.shape[0] * conv_h * conv_w
    if bias is not None:
        # Detached instead of under no_grad, which an exported program would forget.
        mean = mean + bias.detach()
    # Both first, so that an error on the way leaves both as they were.
    mixed = [
        torch.add(running.to(var.dtype) * (1 - momentum), batch, alpha=share)
        for running, batch, share in (
            (running_mean, mean, momentum),
            (running_var, var, momentum * (count / (count - 1))),
        )
    ]
    running_mean.copy_(mixed[0])
    running_var.copy_(mixed[1])
