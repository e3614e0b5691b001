"""The eager autograd path: classic Functions, the leanest that torch offers to Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedcnn._ops import (
    backward_op,
    below_autograd,
    bn_backward_op,
    bn_forward_op,
    bn_output_mask,
    bn_select_grads,
    forward_op,
    output_mask,
    select_grads,
)


class ConvReLUMaxPool2dFunction(torch.autograd.Function):
    """conv2d + bias + ReLU + max_pool2d with its fused backward.

    ``apply(input, weight, bias, geometry)``, where ``geometry`` is the packed tuple of
    :func:`fusedcnn._geometry.pack_geometry`. Users want
    :func:`fusedcnn.conv_relu_max_pool2d`, which checks, packs and routes.

    Saved for the backward: input, weight and one byte per pooled output (four where the pool
    window has more than 255 elements). Differentiable any number of times.

    A ``forward(ctx, ...)`` Function, because one with ``setup_context`` inspects its signature at
    every call (30 us). Under torch.func and torch.compile, which need the other kind,
    :mod:`fusedcnn.functional` takes the registered operators instead.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[int, ...]
    ) -> Tensor:
        """Return the pooled output [N, OC, OH, OW] and save what the backward needs."""
        with below_autograd():
            output, code = forward_op(input, weight, bias, geometry, True)
        ctx.save_for_backward(input, weight, code)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, weight and bias that are needed, None for the rest."""
        mask = output_mask(ctx.needs_input_grad)
        if grad_output is None or not mask:
            return None, None, None, None
        input, weight, code = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: record the backward itself
            grads = backward_op(grad_output, input, weight, code, ctx.geometry, mask)
        else:
            with below_autograd():
                grads = backward_op(grad_output, input, weight, code, ctx.geometry, mask)
        return *select_grads(grads, mask), None


class ConvBatchNormReLUMaxPool2dFunction(torch.autograd.Function):
    """conv2d + batch_norm by the batch + ReLU + max_pool2d with its fused backward.

    ``apply(input, weight, bias, bn_weight, bn_bias, geometry, eps, update)``, where ``update`` is
    None or is called with mean and variance of the convolution without its bias, as soon as all is
    computed: under checkpointing, which breaks off a forward that it runs again when it has what
    it needs, running statistics are then updated as by the stock layers. Users want
    :func:`fusedcnn.conv_batch_norm_relu_max_pool2d`.

    Saved for the backward: input, weight, bn_weight, one byte and one element per pooled output and
    two numbers per channel. Differentiable any number of times.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        bn_weight: Tensor | None,
        bn_bias: Tensor | None,
        geometry: tuple[int, ...],
        eps: float,
        update: Callable[[Tensor, Tensor], None] | None,
    ) -> Tensor:
        """Return the pooled output [N, OC, OH, OW] and save what the backward needs."""
        with below_autograd():
            output, *kept = bn_forward_op(
                input, weight, bias, bn_weight, bn_bias, geometry, eps, True
            )
        ctx.save_for_backward(input, weight, bn_weight, *kept)
        ctx.geometry, ctx.eps = geometry, eps
        ctx.set_materialize_grads(False)
        if update is not None:
            update(*kept[2:])
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of the first five that are needed, None for the rest."""
        mask = bn_output_mask(ctx.needs_input_grad)
        if grad_output is None or not mask:
            return (None,) * 8
        arguments = (grad_output, *ctx.saved_tensors, ctx.geometry, ctx.eps, mask)
        if torch.is_grad_enabled():  # create_graph=True: record the backward itself
            grads = bn_backward_op(*arguments)
        else:
            with below_autograd():
                grads = bn_backward_op(*arguments)
        return *bn_select_grads(grads, ctx.needs_input_grad), None, None, None
