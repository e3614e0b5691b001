"""Autograd of the registered operators, and the double backward of both paths.

The eager path records its calls itself (see :mod:`fusedcnn.autograd`); this serves torch.compile,
export, and whoever calls ``torch.ops.fusedcnn`` directly. Both use the same backward operator, and
the backward operator's own derivative is the double backward of both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedcnn._geometry import Geometry, off, padding_of, plane_sizes
from fusedcnn._ops import backward_op, forward_op, output_mask, select_grads


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


def dense_backward(
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
    padded = F.pad(input, padding_of(g))
    conv_h, conv_w = plane_sizes(g, padded.shape[2:], weight.shape[2:])
    live = code != off(code.dtype)
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
    grad_input = F.pad(grad_padded, [-p for p in padding_of(g)])
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
        outputs = dense_backward(*primals, code, Geometry(*ctx.geometry))
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
