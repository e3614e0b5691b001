"""What this machine could do at most, and what it is."""

from __future__ import annotations

import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import fusedcnn
import torch
from torch.utils.benchmark import Timer

FMA_SECONDS = 0.3
# Large enough that packing and edges cost a GEMM little, small enough for some 20 to 50 ms on a
# desktop core; a GPU needs more work to fill it.
GEMM_SIZE = {"cpu": 1280, "cuda": 8192}
# Larger than most last-level caches, so that the copy goes through memory.
COPY_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
REPEATS = 5
# On a GPU several in a row, so that waiting for the last one costs little beside them.
CALLS = {"cpu": 1, "cuda": 10}


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measure_limits(threads: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Measure the machine's peak arithmetic and memory rates, best of several.

    Args:
        threads: used on the CPU, as in the timings.
        dtype: of the matrix product, which rounds to tf32 where torch is set so.
        device: which machine.

    Returns:
        ``fma_gflops``: :func:`fma_gflops`, in which a multiply-add counts as 2, or None on a GPU;
        ``gemm_gflops``: a large ``torch.mm`` in ``dtype``; ``copy_gbps``: ``tensor.copy_`` of a
        large buffer, bytes read plus bytes written, in GB/s.
    """
    return {
        "fma_gflops": fma_gflops(threads) if device.type == "cpu" else None,
        "gemm_gflops": _gemm_gflops(threads, dtype, device),
        "copy_gbps": _copy_gbps(threads, device),
    }


def _best_seconds(
    statement: str, names: dict[str, Any], threads: int, device: torch.device
) -> float:
    timer = Timer(statement, globals=names, num_threads=threads)
    return min(timer.timeit(CALLS[device.type]).mean for _ in range(REPEATS))


def fma_gflops(threads: int) -> float:
    """Measure float32 multiply-adds from registers by fusedcnn's ISA in use, in GFLOP/s."""
    with ThreadPoolExecutor(threads) as pool:  # it runs on the calling thread, without the GIL
        return sum(pool.map(fusedcnn._C.fma_gflops, [FMA_SECONDS] * threads))


def _gemm_gflops(threads: int, dtype: torch.dtype, device: torch.device) -> float:
    size = GEMM_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    names = {"torch": torch, "a": a, "b": b, "out": torch.empty_like(a)}
    return 2e-9 * size**3 / _best_seconds("torch.mm(a, b, out=out)", names, threads, device)


def _copy_gbps(threads: int, device: torch.device) -> float:
    size = COPY_BYTES[device.type]
    source = torch.ones(size // 4, device=device)
    names = {"source": source, "target": torch.zeros_like(source)}
    return 2e-9 * size / _best_seconds("target.copy_(source)", names, threads, device)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on: hardware, software, commit, date; no paths."""
    build = fusedcnn.build_info()
    del build["library"]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": available_cores(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cuda": describe_cuda(device) if device.type == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "onnxruntime": _version("onnxruntime"),
        "fusedcnn": build,
        "commit": _commit(),
    }


def describe_cuda(device: torch.device) -> dict[str, Any]:
    """The GPU and what drives it."""
    properties = torch.cuda.get_device_properties(device)
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "driver": _driver_version(),
        "runtime": torch.version.cuda,
        "cudnn": cudnn,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
    }


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(answer.stdout.split()), None)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout, marked -dirty where it has changes.

    Where there is no git, as in a copy of the files, what ``FUSEDCNN_COMMIT`` says; else None.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FUSEDCNN_COMMIT")
