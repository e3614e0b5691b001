"""Autograd of the registered operators, and the double backward of both paths.

The eager path records its calls itself (see :mod:`fusedcnn.autograd`); this serves torch.compile,
export, and whoever calls ``torch.ops.fusedcnn`` directly. Both use the same backward operator, and
the backward operator's own derivative is the double backward of both.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedcnn import _stock
from fusedcnn._geometry import Geometry, off, padding_of, plane_sizes, sums_dtype
from fusedcnn._ops import (
    backward_op,
    below_autograd,
    bn_backward_op,
    bn_forward_op,
    bn_output_mask,
    bn_select_grads,
    forward_op,
    linear_backward_op,
    linear_op,
    output_mask,
    select_grads,
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


def winners(code: Tensor, conv_w: int, g: Geometry) -> tuple[Tensor, Tensor]:
    """Where gradient flows, and the winner's index into its plane; 0 where none flows."""
    live = code != off(code.dtype)
    element = torch.where(live, code, 0).long()
    out_h, out_w = code.shape[-2:]
    rows = torch.arange(out_h, device=code.device).view(-1, 1) * g.pool_stride_h - g.pool_padding_h
    cols = torch.arange(out_w, device=code.device) * g.pool_stride_w - g.pool_padding_w
    rows = rows + element.div(g.pool_kernel_w, rounding_mode="floor") * g.pool_dilation_h
    cols = cols + element % g.pool_kernel_w * g.pool_dilation_w
    return live, torch.where(live, rows * conv_w + cols, 0)


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
    n, out_channels = grad_output.shape[:2]
    padded = F.pad(input, padding_of(g))
    conv_h, conv_w = plane_sizes(g, padded.shape[2:], weight.shape[2:])
    live, index = winners(code, conv_w, g)
    flat = grad_output.new_zeros(n, out_channels, conv_h * conv_w)
    flat = flat.scatter_add(2, index.flatten(2), torch.where(live, grad_output, 0).flatten(2))
    grad_input, *others = conv_backward(
        flat.view(n, out_channels, conv_h, conv_w), padded, weight, g
    )
    grad_input = F.pad(grad_input, [-p for p in padding_of(g)])
    return (grad_input if batched else grad_input[0]), *others


def conv_backward(
    grad_output: Tensor, padded: Tensor, weight: Tensor, g: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution's gradients, of an input that is padded already."""
    return torch.ops.aten.convolution_backward(
        grad_output,
        padded,
        weight,
        [weight.shape[0]],
        [g.stride_h, g.stride_w],
        [0, 0],
        [g.dilation_h, g.dilation_w],
        False,
        [0, 0],
        g.groups,
        [True, True, True],
    )


def _setup_backward(ctx, inputs, output):
    grad_output, input, weight, code, geometry, mask = inputs
    ctx.save_for_backward(grad_output, input, weight, code)
    ctx.geometry = geometry
    ctx.mask = mask
    ctx.set_materialize_grads(False)


def _double_backward(ctx, *grad_grads):
    *primals, code = ctx.saved_tensors
    geometry = Geometry(*ctx.geometry)

    def gradients(*primals):
        return dense_backward(*primals, code, geometry)

    return *_differentiate(ctx, gradients, primals, grad_grads), None, None, None


def _differentiate(ctx, gradients, primals, grad_grads) -> list[Tensor | None]:
    """What the double backward returns for the primals, a backward's first arguments.

    Args:
        ctx: of the backward, with the ``mask`` of its results that were asked for.
        gradients: the backward, in differentiable operations.
        primals: its arguments; some may be None.
        grad_grads: of its results; None where there is none.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: one primal may have been computed from another (grad_output from input, in a
        # Hessian-vector product), and only the direct dependence is wanted here.
        primals = [
            t
            if t is None
            else t.view_as(t)
            if create_graph
            else t.detach().requires_grad_(t.requires_grad)
            for t in primals
        ]
        wanted = [t for t, need in zip(primals, ctx.needs_input_grad, strict=False) if need]
        # The last bit of the mask is for all results from the third on.
        masks = [1 << min(i, 2) for i in range(len(grad_grads))]
        pairs = [
            (output, grad)
            for output, mask, grad in zip(gradients(*primals), masks, grad_grads, strict=True)
            if ctx.mask & mask and grad is not None
        ]
        if not pairs or not wanted:
            return [None] * len(primals)
        grads = iter(
            torch.autograd.grad(
                [output for output, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return [next(grads) if need else None for need in ctx.needs_input_grad[: len(primals)]]


torch.library.register_autograd(
    "fusedcnn::conv_relu_max_pool2d_backward", _double_backward, setup_context=_setup_backward
)


# ---- a linear layer ------------------------------------------------------------------------------

_library = torch.library.Library("fusedcnn", "IMPL")  # its registrations live as long as it does


def _refuse_gradients(op):
    """Of an operator whose caller records its calls: silence would train nothing."""

    def call(*arguments):
        tensors = (value for value in arguments if isinstance(value, Tensor))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise NotImplementedError(
                f"{op.name()} has no gradient of its own; torch.nn.functional.linear has"
            )
        with below_autograd():
            return op(*arguments)

    return call


for _op in (linear_op, linear_backward_op):
    _library.impl(_op._schema.name.removeprefix("fusedcnn::"), _refuse_gradients(_op), "Autograd")


# ---- with a BatchNorm ----------------------------------------------------------------------------


def _setup_bn_forward(ctx, inputs, output):
    input, weight, bias, bn_weight, bn_bias, geometry, eps, with_code = inputs
    kept = output[1:] if with_code else (bias, bn_bias)  # as in _setup_forward
    ctx.save_for_backward(input, weight, bn_weight, *kept)
    ctx.geometry, ctx.eps, ctx.with_code = geometry, eps, with_code
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _bn_backward(ctx, grad_output, *_):
    mask = bn_output_mask(ctx.needs_input_grad)
    if grad_output is None or not mask:
        return (None,) * 8
    input, weight, bn_weight, *kept = ctx.saved_tensors
    if not ctx.with_code:
        bias, bn_bias = kept
        _, *kept = bn_forward_op(
            input, weight, bias, bn_weight, bn_bias, ctx.geometry, ctx.eps, True
        )
    grads = bn_backward_op(
        grad_output, input, weight, bn_weight, *kept, ctx.geometry, ctx.eps, mask
    )
    return *bn_select_grads(grads, ctx.needs_input_grad), None, None, None


torch.library.register_autograd(
    "fusedcnn::conv_batch_norm_relu_max_pool2d", _bn_backward, setup_context=_setup_bn_forward
)


def dense_bn_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bn_weight: Tensor | None,
    code: Tensor,
    g: Geometry,
    eps: float,
) -> tuple[Tensor, ...]:
    """The four gradients in differentiable torch operations; the code is held fixed.

    They are those of the stock convolution and normalisation, read at the winners. A bias of the
    convolution plays no part, and one of the normalisation adds to each output.
    """
    if bn_weight is None:
        bn_weight = torch.ones(weight.shape[0], dtype=sums_dtype(input.dtype), device=input.device)
    bn_bias = torch.zeros_like(bn_weight).requires_grad_()
    leaves = [
        t if t.requires_grad else t.detach().requires_grad_() for t in (input, weight, bn_weight)
    ]
    plane = _stock.conv(*leaves[:2], None, g)
    live, index = winners(code, plane.shape[-1], g)
    plane = F.batch_norm(plane, None, None, leaves[2], bn_bias, training=True, eps=eps)
    output = plane.flatten(2).gather(2, index.flatten(2)).view(index.shape)
    output = torch.where(live, output, 0)
    return torch.autograd.grad(output, (*leaves, bn_bias), grad_output, create_graph=True)


def _setup_bn_backward(ctx, inputs, output):
    *primals, code, _extremum, _mean, _var, geometry, eps, mask = inputs
    ctx.save_for_backward(*primals, code)
    ctx.geometry, ctx.eps, ctx.mask = geometry, eps, mask
    ctx.set_materialize_grads(False)


def _bn_double_backward(ctx, *grad_grads):
    *primals, code = ctx.saved_tensors
    geometry = Geometry(*ctx.geometry)

    def gradients(*primals):
        return dense_bn_backward(*primals, code, geometry, ctx.eps)

    return *_differentiate(ctx, gradients, primals, grad_grads), *(None,) * 7


torch.library.register_autograd(
    "fusedcnn::conv_batch_norm_relu_max_pool2d_backward",
    _bn_double_backward,
    setup_context=_setup_bn_backward,
)
