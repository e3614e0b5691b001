"""A GPU that is none, for tests of the check that a device's first use begins with; and faults."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fusedcnn import _device_check, _first_use
from fusedcnn._device_check import BATCH_NORM, Kernel
from torch import Tensor

FORWARD, BACKWARD, NORM, NORM_BACKWARD = OPERATORS = (
    "forward_op", "backward_op", "bn_forward_op", "bn_backward_op",
)  # fmt: skip


def wrap(monkeypatch: Any, operator: str, change: Callable[[list[Tensor], tuple], Any]) -> None:
    """Lets an operator of the check return what `change(results, arguments)` makes of its own."""
    right = getattr(_device_check, operator)

    def wrapped(*arguments):
        results = [t.clone() for t in right(*arguments)]
        change(results, arguments)
        return tuple(results)

    monkeypatch.setattr(_device_check, operator, wrapped)


ON_GPU = torch.device("cuda", 0)
CHECKED = "checked on A GPU (sm_120)"
LISTED = [
    Kernel("forward", "cuda_cores_3x3"),
    Kernel("forward", "library"),
    Kernel("grad_weight", "winners_3x3"),
    Kernel("grad_weight", "library"),
    Kernel("grad_input", "tensor_cores_3x3", tf32=True),
    Kernel("grad_input", "library"),
]
KEYS = [*(kernel.key for kernel in LISTED), BATCH_NORM]


class Library:
    """Answers as libfusedcnn_cuda does; the CPU's `general` computes, under all names."""

    def __init__(self) -> None:
        self.answer = b"120 100 0"
        self.architectures = self.measured = ""
        self.tried = ""
        self.ran: list[str] = []  # kernels, operator by operator
        self.settled: dict[int, list[str | None] | None] = {}

    def fusedcnn_cuda_device(self, index: int) -> bytes:
        return self.answer

    def fusedcnn_cuda_try(self, kernel: bytes, tf32: int) -> None:
        assert tf32 == (kernel == b"tensor_cores_3x3")
        self.tried = kernel.decode()

    def fusedcnn_cuda_settle(self, index: int, reasons) -> None:
        said = reasons and [reason and reason.decode() for reason in reasons]
        self.settled[index] = said

    def fusedcnn_cuda_info(self) -> bytes:
        rows = [{"pass": k.pass_name, "name": k.name, "tf32": k.tf32} for k in LISTED]
        info = {"architectures": self.architectures, "measured": self.measured, "kernels": rows}
        return json.dumps(info).encode()

    def fusedcnn_cuda_allow_tf32(self, allowed: int) -> None: ...

    def fusedcnn_cuda_benchmark(self, on: int) -> None: ...


def another_process(library: Library) -> None:
    """Nothing is left but what is on disk."""
    _first_use._findings.clear()
    _first_use._lost.clear()
    library.settled.clear()
    library.ran.clear()


def break_kernel(monkeypatch, library: Library, operator: str, kernel: str) -> None:
    """One that writes a wrong number into the first of an operator's results that has any."""

    def change(results: list[Tensor], _: tuple) -> None:
        if library.tried == kernel:
            next(t for t in results if t.numel()).view(-1)[0] += 1

    wrap(monkeypatch, operator, change)


def fail_kernel(monkeypatch, library: Library, kernel: str, error: Exception) -> None:
    """One whose forward raises."""
    right = _device_check.forward_op

    def wrapped(*arguments):
        if library.tried == kernel:
            raise error
        return right(*arguments)

    monkeypatch.setattr(_device_check, FORWARD, wrapped)


def cached_files() -> list[Path]:
    return list(Path(os.environ["XDG_CACHE_HOME"]).glob("fusedcnn/*"))
