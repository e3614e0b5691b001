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
explain_op = torch.ops.fusedcnn.explain.default

# `with below_autograd():` calls the operators without their autograd registration, which costs
# several microseconds of Python per call; for callers that record the call themselves, or know that
# nothing is to be recorded.
below_autograd = torch._C._AutoDispatchBelowAutograd

# Bits of the backward's output_mask.
GRAD_INPUT, GRAD_WEIGHT, GRAD_BIAS = 1, 2, 4


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
