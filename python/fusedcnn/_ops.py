"""Loads the compiled library and completes its operators: fake tensors, autograd, information.

The C++ side registers the schemas and the CPU kernels; what torch's stable ABI cannot express is
registered here. ``geometry`` is the packed list that :func:`fusedcnn.functional.pack_geometry`
writes; ``code`` is opaque outside this file and ``csrc/``.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The extension module's run path leads to libfusedcnn beside it, whose static initialisers register
# torch.ops.fusedcnn.*; torch is imported first, so that it binds to this process's torch.
from fusedcnn import _C, _cuda

logger = logging.getLogger("fusedcnn")

forward_op = torch.ops.fusedcnn.conv_relu_max_pool2d.default
backward_op = torch.ops.fusedcnn.conv_relu_max_pool2d_backward.default

# `with below_autograd():` calls the operators without their autograd registration, which costs
# several microseconds of Python per call; for callers that record the call themselves, or know that
# nothing is to be recorded.
below_autograd = torch._C._AutoDispatchBelowAutograd

# Bits of the backward's output_mask.
GRAD_INPUT, GRAD_WEIGHT, GRAD_BIAS = 1, 2, 4

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


# ---- fake tensors --------------------------------------------------------------------------------


def stock_conv(input: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    """The stock convolution for a packed geometry."""
    if g.padding_top == g.padding_bottom and g.padding_left == g.padding_right:
        padding = (g.padding_top, g.padding_left)
    else:
        input = F.pad(input, (g.padding_left, g.padding_right, g.padding_top, g.padding_bottom))
        padding = (0, 0)
    return F.conv2d(
        input,
        weight,
        bias,
        (g.stride_h, g.stride_w),
        padding,
        (g.dilation_h, g.dilation_w),
        g.groups,
    )


def stock_pool(plane: Tensor, g: Geometry) -> Tensor:
    """The stock pool for a packed geometry, of a plane that ReLU has passed.

    Where dilation takes a window from the padding before the plane past its end, the window is the
    axis's only one, and all results are -inf. The stock pool gives it an index outside of the
    plane, where its backward would write: no gradient may reach it.
    """
    empty = any(
        dilation > 1 and padding > 0 and -padding % dilation >= size
        for size, padding, dilation in (
            (plane.shape[-2], g.pool_padding_h, g.pool_dilation_h),
            (plane.shape[-1], g.pool_padding_w, g.pool_dilation_w),
        )
    )
    pooled = F.max_pool2d(
        plane.detach() if empty else plane,
        (g.pool_kernel_h, g.pool_kernel_w),
        (g.pool_stride_h, g.pool_stride_w),
        (g.pool_padding_h, g.pool_padding_w),
        (g.pool_dilation_h, g.pool_dilation_w),
        bool(g.ceil_mode),
    )
    # The sum is never taken; through it the plane's gradient is zero instead of missing.
    return torch.where(pooled == -torch.inf, pooled, plane.sum()) if empty else pooled


def _stock_forward(input: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
    """The stock layers for a packed geometry: the meaning of the operator in plain torch."""
    return stock_pool(F.relu(stock_conv(input, weight, bias, g)), g)


def code_dtype(g: Geometry) -> torch.dtype:
    """What codes are stored in."""
    wide = g.pool_kernel_h * g.pool_kernel_w > _LARGEST_BYTE_WINDOW
    return torch.int32 if wide else torch.uint8


@torch.library.register_fake("fusedcnn::conv_relu_max_pool2d")
def _(input, weight, bias, geometry, with_code):
    g = Geometry(*geometry)
    output = _stock_forward(input, weight, bias, g)
    dtype = code_dtype(g)
    code = torch.empty_like(output, dtype=dtype) if with_code else output.new_empty(0, dtype=dtype)
    return output, code


_library = torch.library.Library("fusedcnn", "IMPL")  # its registrations live as long as it does


def _refuse_quantized(input, *_):
    raise RuntimeError(
        "input: expected float32, float64, bfloat16 or float16, got a quantized tensor; call "
        "fusedcnn.unfuse before quantization, which has no such layer"
    )


for key in ("QuantizedCPU", "QuantizedCUDA"):
    _library.impl("conv_relu_max_pool2d", _refuse_quantized, key)


@torch.library.register_fake("fusedcnn::conv_relu_max_pool2d_backward")
def _(grad_output, input, weight, code, geometry, output_mask):
    return (
        _image_like(input) if output_mask & GRAD_INPUT else input.new_empty(0),
        _image_like(weight) if output_mask & GRAD_WEIGHT else input.new_empty(0),
        input.new_empty(weight.shape[0] if output_mask & GRAD_BIAS else 0),
    )


def _image_like(tensor: Tensor) -> Tensor:
    channels_last = tensor.dim() == 4 and torch._prims_common.suggest_memory_format(tensor) == (
        torch.channels_last
    )
    return torch.empty_like(
        tensor, memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


# ---- autograd of the registered operators --------------------------------------------------------
#
# The eager path does not come this way (see autograd.py): it serves torch.compile, export, and
# whoever calls torch.ops.fusedcnn directly. Both use the same backward operator, and the backward
# operator's own derivative is the double backward of both.


def output_mask(needs_input_grad: tuple[bool, ...]) -> int:
    """Bit mask of the backward operator for the (input, weight, bias) that need a gradient."""
    need_input, need_weight, need_bias = needs_input_grad[:3]
    return need_input * GRAD_INPUT + need_weight * GRAD_WEIGHT + need_bias * GRAD_BIAS


def select_grads(
    grads: tuple[Tensor, Tensor, Tensor], mask: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The backward operator's results with None for the gradients that were not asked for."""
    grad_input, grad_weight, grad_bias = grads
    return (
        grad_input if mask & GRAD_INPUT else None,
        grad_weight if mask & GRAD_WEIGHT else None,
        grad_bias if mask & GRAD_BIAS else None,
    )


def _setup_forward(ctx, inputs, output):
    input, weight, bias, geometry, with_code = inputs
    # A program exported under no_grad has no codes, and may be run with gradients all the same:
    # the backward then computes them, at the price of another forward.
    saved = (output[1], None) if with_code else (None, bias)
    ctx.save_for_backward(input, weight, *saved)
    ctx.geometry = geometry
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, _grad_code):
    mask = output_mask(ctx.needs_input_grad)
    if grad_output is None or not mask:
        return None, None, None, None, None
    input, weight, code, bias = ctx.saved_tensors
    if code is None:
        _, code = forward_op(input, weight, bias, ctx.geometry, True)
    grads = backward_op(grad_output, input, weight, code, ctx.geometry, mask)
    return *select_grads(grads, mask), None, None


torch.library.register_autograd(
    "fusedcnn::conv_relu_max_pool2d", _backward, setup_context=_setup_forward
)


def _dense_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, code: Tensor, g: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients in differentiable torch operations.

    With the code held fixed they are linear in ``grad_output`` and bilinear with ``input`` and
    ``weight``: scatter ``grad_output`` to the convolution outputs that won, then run the
    convolution's own backward. Differentiating this gives the double backward, as for the stock
    layers, whose pool and ReLU also hold their choices fixed.
    """
    batched = input.dim() == 4
    if not batched:
        grad_output, input, code = grad_output[None], input[None], code[None]
    n, out_channels, out_h, out_w = grad_output.shape
    pads = (g.padding_left, g.padding_right, g.padding_top, g.padding_bottom)
    padded = F.pad(input, pads)
    conv_h, conv_w = (
        (size - dilation * (kernel - 1) - 1) // stride + 1
        for size, dilation, kernel, stride in zip(
            padded.shape[2:],
            (g.dilation_h, g.dilation_w),
            weight.shape[2:],
            (g.stride_h, g.stride_w),
            strict=True,
        )
    )
    live = code != (-1 if code.dtype == torch.int32 else 255)
    element = torch.where(live, code, 0).long()
    rows = torch.arange(out_h, device=code.device).view(-1, 1) * g.pool_stride_h - g.pool_padding_h
    cols = torch.arange(out_w, device=code.device) * g.pool_stride_w - g.pool_padding_w
    rows = rows + element.div(g.pool_kernel_w, rounding_mode="floor") * g.pool_dilation_h
    cols = cols + element % g.pool_kernel_w * g.pool_dilation_w
    # Where no gradient flows the winner is meaningless; index 0 receives a zero.
    index = torch.where(live, rows * conv_w + cols, 0)
    flat = grad_output.new_zeros(n, out_channels, conv_h * conv_w)
    flat = flat.scatter_add(2, index.flatten(2), torch.where(live, grad_output, 0).flatten(2))
    grad_padded, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        flat.view(n, out_channels, conv_h, conv_w),
        padded,
        weight,
        [out_channels],
        [g.stride_h, g.stride_w],
        [0, 0],
        [g.dilation_h, g.dilation_w],
        False,
        [0, 0],
        g.groups,
        [True, True, True],
    )
    grad_input = F.pad(grad_padded, [-p for p in pads])
    return (grad_input if batched else grad_input[0]), grad_weight, grad_bias


def _setup_backward(ctx, inputs, output):
    grad_output, input, weight, code, geometry, mask = inputs
    ctx.save_for_backward(grad_output, input, weight, code)
    ctx.geometry = geometry
    ctx.mask = mask
    ctx.set_materialize_grads(False)


def _double_backward(ctx, *grad_grads):
    *primals, code = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: one primal may have been computed from another (grad_output from input, in a
        # Hessian-vector product), and only the direct dependence is wanted here.
        primals = [
            t.view_as(t) if create_graph else t.detach().requires_grad_(t.requires_grad)
            for t in primals
        ]
        outputs = _dense_backward(*primals, code, Geometry(*ctx.geometry))
        pairs = [
            (output, grad)
            for i, (output, grad) in enumerate(zip(outputs, grad_grads, strict=True))
            if ctx.mask & (1 << i) and grad is not None
        ]
        wanted = [t for t, need in zip(primals, ctx.needs_input_grad, strict=False) if need]
        if not pairs or not wanted:
            return (None,) * 6
        grads = iter(
            torch.autograd.grad(
                [output for output, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return *(next(grads) if need else None for need in ctx.needs_input_grad[:3]), None, None, None


torch.library.register_autograd(
    "fusedcnn::conv_relu_max_pool2d_backward", _double_backward, setup_context=_setup_backward
)


# ---- what was built, what runs -------------------------------------------------------------------

_stock_reasons: dict[str, int] = {}


def note_stock(reason: str) -> None:
    """Record that a call was computed by the stock layers, and why; logs each reason once.

    Not while a graph is captured: torch.compile would break it at the log line.
    """
    if torch.compiler.is_compiling():
        return
    count = _stock_reasons.get(reason, 0)
    _stock_reasons[reason] = count + 1
    if count == 0:  # once each: a training loop would repeat it at every step
        logger.debug("computed by the stock layers: %s", reason)


def build_info() -> dict[str, Any]:
    """What was built, what was selected on this machine, and why not the rest.

    Returns:
        A dict of plain values: ``version``; ``compiler``; ``library`` (path of the operator
        library, for ``torch.ops.load_library`` or a C++ program); ``torch`` (the running version);
        ``isas`` (each with ``name``, ``supported`` by this machine, ``selected`` and ``reason``);
        ``kernels`` (in order of preference, each with ``isa``, ``pass``, ``name``, ``supported``,
        ``exact`` and ``error``); ``winograd`` (whether Winograd kernels may be chosen);
        ``cuda`` (whether the CUDA kernels were ``built`` and are ``loaded``, the ``reason`` why
        not; where loaded, ``toolkit``, ``architectures`` and ``kernels``);
        ``devices`` (what computes the block on each device type); ``stock_calls`` (calls of this
        process that the stock layers computed, by reason).
    """
    return {
        "version": _C.version,
        "compiler": _C.compiler,
        "library": str(Path(_C.__file__).with_name("libfusedcnn.so")),
        "torch": torch.__version__,
        "isas": _C.isas(),
        "kernels": _C.kernels(),
        "winograd": _C.winograd_allowed(),
        "cuda": _cuda.info(),
        "devices": {
            "cpu": "fused kernels",
            "cuda": f"stock layers: {_cuda.reason}" if _cuda.reason else "fused kernels",
            "others": "stock layers: fusedcnn has no kernels for them in this version",
        },
        "stock_calls": dict(_stock_reasons),
    }


@contextlib.contextmanager
def force(isa: str = "", kernel: str = "") -> Iterator[None]:
    """Use only this ISA and only kernels of this name, process-wide; for tests and benchmarks.

    Args:
        isa: a name from ``build_info()["isas"]``, or "" to let fusedcnn choose.
        kernel: a name from ``build_info()["kernels"]``, or "" to let fusedcnn choose. A call that
            the forced kernel does not cover raises RuntimeError.

    Raises:
        ValueError: the name is unknown, or this machine cannot run the ISA.
    """
    before = _C.forced()
    _C.force(isa, kernel)
    try:
        yield
    finally:
        _C.force(*before)
