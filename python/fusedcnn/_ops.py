"""Loads the compiled library: its operators, and which of its kernels they may use.

The C++ side registers the schemas and the kernels. What torch's stable ABI cannot express is
registered by :mod:`fusedcnn._fake` (fake tensors), :mod:`fusedcnn._derivatives` (autograd) and
:mod:`fusedcnn._registrations` (decomposition, flop counts).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

# The extension module's run path leads to libfusedcnn beside it, whose static initialisers register
# torch.ops.fusedcnn.*; torch is imported first, so that it binds to this process's torch.
from fusedcnn import _C

forward_op = torch.ops.fusedcnn.conv_relu_max_pool2d.default
backward_op = torch.ops.fusedcnn.conv_relu_max_pool2d_backward.default
bn_forward_op = torch.ops.fusedcnn.conv_batch_norm_relu_max_pool2d.default
bn_backward_op = torch.ops.fusedcnn.conv_batch_norm_relu_max_pool2d_backward.default
linear_op = torch.ops.fusedcnn.linear.default
linear_backward_op = torch.ops.fusedcnn.linear_backward.default
explain_op = torch.ops.fusedcnn.explain.default

# `with below_autograd():` calls the operators without their autograd registration, which costs
# several microseconds of Python per call; for callers that record the call themselves, or know that
# nothing is to be recorded.
below_autograd = torch._C._AutoDispatchBelowAutograd

# Bits of the backwards' output_mask. With a BatchNorm the last is for both of its parameters.
GRAD_INPUT, GRAD_WEIGHT, GRAD_BIAS = 1, 2, 4
GRAD_BATCH_NORM = GRAD_BIAS


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


def bn_output_mask(needs_input_grad: tuple[bool, ...]) -> int:
    """As :func:`output_mask`, for (input, weight, bias, bn_weight, bn_bias)."""
    need_input, need_weight, *others = needs_input_grad[:5]
    return need_input * GRAD_INPUT + need_weight * GRAD_WEIGHT + any(others) * GRAD_BATCH_NORM


def bn_select_grads(
    grads: tuple[Tensor, Tensor, Tensor, Tensor], needs_input_grad: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of (input, weight, bias, bn_weight, bn_bias) from the backward operator's results.

    The mean takes the convolution's bias out again, so that no gradient is left for it: zeros, or
    NaN where the channel's other gradients are not finite.
    """
    grad_input, grad_weight, grad_bn_weight, grad_bn_bias = grads
    need_input, need_weight, need_bias, need_bn_weight, need_bn_bias = needs_input_grad[:5]
    return (
        grad_input if need_input else None,
        grad_weight if need_weight else None,
        (grad_bn_weight + grad_bn_bias) * 0 if need_bias else None,
        grad_bn_weight if need_bn_weight else None,
        grad_bn_bias if need_bn_bias else None,
    )


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
