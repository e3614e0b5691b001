"""Loads the CUDA kernels where this process's torch has CUDA, and says why where it has not.

``libfusedcnn_cuda`` registers the CUDA implementations of ``torch.ops.fusedcnn.*``. Whether it can
be loaded never decides whether ``import fusedcnn`` works.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusedcnn import _C

_PATH = Path(_C.__file__).with_name("libfusedcnn_cuda.so")
_library: ctypes.CDLL | None = None
# What the library has been told, and its own defaults.
_tf32 = False
_benchmark = False

# Why the CUDA kernels are not loaded, or None where they are.
reason: str | None = None


def _why_not_load() -> str | None:
    if not _PATH.is_file():
        return "built without CUDA kernels (for a torch without CUDA, without nvcc, or as asked)"
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    return None


def load() -> None:
    """Load the library if this process can use it; sets ``reason``. Called once, at import."""
    global _library, reason
    reason = _why_not_load()
    if reason is not None:
        return
    try:
        torch.ops.load_library(str(_PATH))
        library = ctypes.CDLL(str(_PATH))
        for function in ("info", "force", "forced", "device"):
            getattr(library, f"fusedcnn_cuda_{function}").restype = ctypes.c_char_p
    except (OSError, RuntimeError, AttributeError) as error:
        reason = f"{_PATH.name} cannot be loaded: {error}"
        return
    _library = library
    follow_torch()


def follow_torch() -> None:
    """Hand torch's switches for its own convolutions on, where they have changed.

    Kernels may round float32 operands to tf32 exactly where torch's may, which is where
    ``torch.backends.cudnn.conv.fp32_precision == "tf32"``; the older ``allow_tf32`` sets that, too.
    And where ``torch.backends.cudnn.benchmark`` is on, the quickest kernel is measured. The
    operators cannot ask for these through the stable ABI, so every eager call does. Compiled code
    runs with what the latest eager call found.
    """
    global _tf32, _benchmark
    allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"
    if allowed != _tf32:
        _library.fusedcnn_cuda_allow_tf32(int(allowed))
        _tf32 = allowed
    benchmark = torch.backends.cudnn.benchmark
    if benchmark != _benchmark:
        _library.fusedcnn_cuda_benchmark(int(benchmark))
        _benchmark = benchmark


def info() -> dict[str, Any]:
    """The ``cuda`` entry of :func:`fusedcnn.build_info`."""
    result: dict[str, Any] = {
        "built": _PATH.is_file(),
        "loaded": _library is not None,
        "reason": reason,
        "toolkit": None,
        "architectures": [],
        "measured": [],
        "kernels": [],
    }
    if _library is not None:
        result.update(json.loads(_library.fusedcnn_cuda_info().decode()))
        for architectures in ("architectures", "measured"):
            result[architectures] = result[architectures].split()
    return result


class Device(NamedTuple):
    """Where the library's code runs."""

    capability: int  # 90 for sm_90
    code: int  # the architecture that this code was compiled for
    measured: bool  # whether all of its kernels have been tested on such a GPU


def device(index: int) -> Device | str:
    """A device, or why the library's code cannot run there."""
    text = _library.fusedcnn_cuda_device(index).decode()
    numbers = text.split()
    if not numbers[0].isdigit():
        return text.removeprefix("fusedcnn: ")
    capability, code, measured = map(int, numbers)
    return Device(capability, code, bool(measured))


def settle(index: int, refused: list[str | None] | None) -> None:
    """Say why kernels must not be chosen on a device.

    Args:
        index: of the device.
        refused: a reason or None for each of ``info()["kernels"]``, and last for those of a
            BatchNorm; None as if nothing had been said.
    """
    reasons = None
    if refused is not None:
        encoded = [reason and reason.encode() for reason in refused]
        reasons = (ctypes.c_char_p * len(encoded))(*encoded)
    _library.fusedcnn_cuda_settle(index, reasons)


@contextlib.contextmanager
def trial(kernel: str, allow_tf32: bool) -> Iterator[None]:
    """Use this kernel in this thread alone, which has no other say in what others run."""
    _library.fusedcnn_cuda_try(kernel.encode(), int(allow_tf32))
    try:
        yield
    finally:
        _library.fusedcnn_cuda_try(b"", 0)


@contextlib.contextmanager
def force(kernel: str = "") -> Iterator[None]:
    """Use only CUDA kernels of this name, process-wide; for tests and benchmarks.

    Args:
        kernel: a name from ``build_info()["cuda"]["kernels"]``, or "" to let fusedcnn choose. A
            call that the forced kernel does not cover raises RuntimeError.

    Raises:
        RuntimeError: the CUDA kernels are not loaded.
        ValueError: the name is unknown.
    """
    if _library is None:
        raise RuntimeError(f"CUDA kernels are not loaded: {reason}")
    before = _library.fusedcnn_cuda_forced()
    refused = _library.fusedcnn_cuda_force(kernel.encode())
    if refused is not None:
        raise ValueError(refused.decode())
    try:
        yield
    finally:
        _library.fusedcnn_cuda_force(before)


load()
