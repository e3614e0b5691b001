"""Forcing fusedcnn's kernels on whichever device they run."""

from __future__ import annotations

import contextlib

import torch
from fusedcnn import _cuda
from fusedcnn._ops import _C, force


def force_kernel(
    device: torch.device, kernel: str, isa: str | None = None
) -> contextlib.AbstractContextManager[None]:
    """Use only kernels of this name; see ``fusedcnn._ops.force`` and ``fusedcnn._cuda.force``.

    Args:
        device: whose kernels.
        kernel: its name, or "" to let fusedcnn choose.
        isa: of the CPU; None: what is forced already.

    Raises:
        RuntimeError: the device's kernels are not loaded.
        ValueError: the name is unknown.
    """
    if device.type == "cpu":
        return force(_C.forced()[0] if isa is None else isa, kernel)
    # Without the CUDA kernels the stock layers compute: nothing to force, and the report says so.
    return _cuda.force(kernel) if kernel else contextlib.nullcontext()
