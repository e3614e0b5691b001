"""How times are taken: at which precision, by turns, beside the machine's own limits."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from fusedcnn import _cuda
from fusedcnn._ops import _C, force
from fusedcnn.bench import time_by_turns
from torch import Tensor, nn
from torch.utils.benchmark import Timer

FMA_SECONDS = 0.3
# A GEMM whose packing and edges cost little, and that takes some 20 to 50 ms on a desktop core; a
# GPU needs more work to fill it.
GEMM_SIZE = {"cpu": 1280, "cuda": 8192}
# Larger than most last-level caches, so that the copy goes through memory.
COPY_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}
# Several calls in a row on a GPU, so that waiting for the last one costs little beside them.
LIMIT_CALLS = {"cpu": 1, "cuda": 10}
LIMIT_REPEATS = 5
# A call this long is exact enough to be made once: half types are very slow on some CPUs.
LIMIT_SLOW_SECONDS = 0.3


# ---- precision -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """A type of parameters and images, and what may be done to its operands.

    Attributes:
        name: on the command line and in the JSON.
        dtype: of parameters and images.
        title: for people.
        tf32: whether a CUDA device may round float32 operands of products to tf32.
        capability: the oldest CUDA device that computes so, as (major, minor).
    """

    name: str
    dtype: torch.dtype
    title: str
    tf32: bool = False
    capability: tuple[int, int] = (0, 0)

    @property
    def measured(self) -> torch.dtype:
        """The dtype whose error in the stock layers is the yardstick.

        Nothing is more exact than float64's reference: its error is float32's, scaled.
        """
        return torch.float32 if self.dtype == torch.float64 else self.dtype

    @property
    def coarse(self) -> bool:
        """Whether operands or results are rounded to half of float32's digits or fewer."""
        return self.tf32 or torch.finfo(self.dtype).bits < 32

    def use(self, device: torch.device) -> None:
        """Make torch and fusedcnn's operators compute so from now on, in this process."""
        # The older switches set the newer ones (fp32_precision) too, and Inductor reads both.
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        torch.backends.cudnn.allow_tf32 = self.tf32
        if device.type == "cuda" and _cuda.reason is None:
            _cuda.follow_torch()  # the modules do so by themselves, the bare operators do not


PRECISIONS = {
    one.name: one
    for one in (
        Precision("float32", torch.float32, "float32, tf32 allowed to nobody"),
        Precision("tf32", torch.float32, "float32, tf32 allowed to all", True, (8, 0)),
        Precision("float64", torch.float64, "float64"),
        Precision("bfloat16", torch.bfloat16, "bfloat16", capability=(8, 0)),
        Precision("float16", torch.float16, "float16"),
    )
}


def round_to_tf32(tensor: Tensor) -> Tensor:
    """Round float32 to the 10 explicit significand bits of tf32, ties to even; infinities stay."""
    bits = tensor.contiguous().view(torch.int32)
    dropped = 13  # of float32's 23
    rounded = bits + (bits >> dropped & 1) + (1 << dropped - 1) - 1 >> dropped << dropped
    return torch.where(tensor.isfinite(), rounded.view(torch.float32), tensor)


def with_tf32_operands(module: nn.Module) -> nn.Module:
    """Make a module's convolutions and linear layers round weight and input to tf32; in place.

    What stock layers computed so are off by is what tf32 costs, on any device, whichever algorithm
    a library would have chosen for them.
    """

    def rounded(_layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        # The difference is exact, so the sum is the rounded input, with the input's own gradient.
        return (args[0] + (round_to_tf32(args[0]) - args[0]).detach(),)

    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            with torch.no_grad():
                layer.weight.copy_(round_to_tf32(layer.weight))
            layer.register_forward_pre_hook(rounded)
    return module


# ---- by turns ------------------------------------------------------------------------------------


class Clock(NamedTuple):
    """How long to look: see :func:`fusedcnn.bench.time_by_turns`."""

    threads: int
    seconds: float
    rounds: int


def time_rows(
    rows: list[dict[str, Any]],
    steps: Mapping[str, Callable[[], object]],
    clock: Clock,
    turn: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> dict[str, list[float]]:
    """Time all contenders by turns, and write into the report's rows what came of it.

    Those named as in ``steps`` get a median and its quartiles in microseconds, or the reason why
    the step failed.

    Returns:
        For each contender that did not fail, seconds per call, one value a round.
    """
    times, errors = time_by_turns(steps, *clock, turn)
    for row in rows:
        if row["name"] in errors:
            row |= {"status": "failed", "reason": errors[row["name"]]}
        elif row["name"] in times:
            micros = [1e6 * seconds for seconds in times[row["name"]]]
            q1, median, q3 = statistics.quantiles(micros, n=4, method="inclusive")
            row |= {"status": "timed", "median_us": median, "q1_us": q1, "q3_us": q3}
    return times


@contextlib.contextmanager
def rest_after(device: torch.device, seconds: float) -> Iterator[None]:
    """A turn after which the CPU's idle threads get the time to stop spinning.

    They would take a core from the next contender. Torch's threads spin for some 4 ms, ONNX
    Runtime's for some 30.
    """
    yield
    if device.type == "cpu":
        time.sleep(seconds)


def against_best(seconds: Mapping[str, list[float]], own: str, peers: set[str]) -> dict[str, Any]:
    """Compare one contender with the fastest of its peers.

    Returns:
        ``own``; ``best_peer``; ``ratio``, how many times as fast as that one it is by the medians;
        ``q1`` and ``q3``, the quartiles of the rounds' own ratios.
    """
    best = min(peers, key=lambda name: statistics.median(seconds[name]))
    ratios = [peer / mine for peer, mine in zip(seconds[best], seconds[own], strict=True)]
    q1, _, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    ratio = statistics.median(seconds[best]) / statistics.median(seconds[own])
    return {"own": own, "best_peer": best, "ratio": ratio, "q1": q1, "q3": q3}


# ---- the machine ---------------------------------------------------------------------------------


def force_kernel(
    device: torch.device, kernel: str = "", isa: str | None = None
) -> contextlib.AbstractContextManager[None]:
    """Make fusedcnn use only kernels of this name ("": any) on the device, or of a CPU's ISA.

    Raises:
        RuntimeError: the device's kernels are not loaded.
        ValueError: the name is unknown.
    """
    if device.type == "cpu":
        return force(_C.forced()[0] if isa is None else isa, kernel)
    # Without CUDA kernels the stock layers compute: nothing to force, and the report says so.
    return _cuda.force(kernel) if kernel else contextlib.nullcontext()


def measure_limits(threads: int, precision: Precision, device: torch.device) -> dict[str, Any]:
    """Measure the machine's peak arithmetic and memory rates, best of several.

    Returns:
        ``fma_gflops``: float32 multiply-adds from registers by fusedcnn's ISA in use, each counted
        as 2, or None on a GPU; ``gemm_gflops``: a large ``torch.mm``; ``copy_gbps``:
        ``tensor.copy_``, bytes read plus bytes written; ``peak_gflops``: the first, half of it in
        float64 (half types accumulate in float32), or on a GPU the second.
    """
    gemm, copy = _library_rates(threads, precision, device)
    fma = None
    if device.type == "cpu":
        with ThreadPoolExecutor(threads) as pool:  # on the calling thread, without the GIL
            fma = sum(pool.map(_C.fma_gflops, [FMA_SECONDS] * threads))
    peak = gemm if fma is None else fma / (1 + (precision.dtype == torch.float64))
    return {"fma_gflops": fma, "gemm_gflops": gemm, "copy_gbps": copy, "peak_gflops": peak}


@functools.cache
def _library_rates(threads: int, precision: Precision, device: torch.device) -> tuple[float, float]:
    size, bytes = GEMM_SIZE[device.type], COPY_BYTES[device.type]
    a, b = torch.randn(2, size, size, device=device).to(precision.dtype)
    source = torch.ones(bytes // 4, device=device)
    product, target = torch.empty_like(a), torch.zeros_like(source)

    def best_seconds(step: Callable[[], object]) -> float:
        timer = Timer("step()", globals={"step": step}, num_threads=threads)
        first = timer.timeit(LIMIT_CALLS[device.type]).mean
        repeats = 0 if first > LIMIT_SLOW_SECONDS else LIMIT_REPEATS
        return min([first, *(timer.timeit(LIMIT_CALLS[device.type]).mean for _ in range(repeats))])

    gemm = 2e-9 * size**3 / best_seconds(lambda: torch.mm(a, b, out=product))
    return gemm, 2e-9 * bytes / best_seconds(lambda: target.copy_(source))


def at_best(flops: float, bytes: float, limits: Mapping[str, Any]) -> dict[str, float]:
    """What work takes at the machine's limits: ``peak_us`` for FLOPs, ``copy_us`` for bytes.

    The longer of the two is its floor. FLOPs are those of the direct convolutions and full
    gradients, and kernels that skip work beat the peak; bytes must be read and written once.
    """
    peak_us = 1e-3 * flops / limits["peak_gflops"]
    copy_us = 1e-3 * bytes / limits["copy_gbps"]
    return {"flops": flops, "bytes": bytes, "peak_us": peak_us, "copy_us": copy_us}
