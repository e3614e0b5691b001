"""How times are taken: at which precision, by turns, beside the machine's own limits."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from fusedcnn import _cuda
from fusedcnn._ops import _C, force
from torch import Tensor, nn
from torch.utils.benchmark import Timer

# Calls for the first estimate of a contender's speed.
ESTIMATE_CALLS = 3

# A race may take this many times the time that was asked for: warming up costs some, and so do
# calls longer than a turn. On a machine that is busy with something else it then ends early, but
# not before the quartiles of the rounds mean something.
PATIENCE = 4
ENOUGH_ROUNDS = 5

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
            _cuda.follow_tf32()  # the modules do so by themselves, the bare operators do not


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
    """How long to look: seconds that each contender runs at least, over how many turns."""

    threads: int
    rounds: int  # fewer where they take much longer than min_time says
    min_time: float


def time_rows(
    rows: list[dict[str, Any]],
    steps: Mapping[str, Callable[[], object]],
    clock: Clock,
    *,
    rests: Mapping[str, float] | None = None,
    before_turn: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Time every contender once a round, in a new order each round, so that drift hits all alike.

    On a CUDA device torch's Timer waits for the device.

    Args:
        rows: of the report; those named as in ``steps`` get a median and its quartiles in
            microseconds, or a reason where the step fails.
        steps: what to time, by contender.
        clock: how long.
        rests: seconds to wait after a contender's turn.
        before_turn: called with the contender's name before each of its turns, off the clock.

    Returns:
        For each contender that did not fail, seconds per call, one value a round.
    """
    rests = rests or {}
    timers = {
        name: Timer("step()", globals={"step": step}, num_threads=clock.threads)
        for name, step in steps.items()
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    failed: dict[str, str] = {}

    def take_turn(name: str, calls: int) -> float:
        before_turn(name)
        try:
            return timers[name].timeit(calls).mean  # warms up by itself
        except Exception as error:  # whatever a compiled or recorded call may raise
            failed[name] = first_line(error)
            del times[name]
            return 1.0
        finally:
            time.sleep(rests.get(name, 0.0))

    estimates = {name: take_turn(name, ESTIMATE_CALLS) for name in steps}
    order = list(steps)
    shuffle = random.Random(0).shuffle  # so that nobody always follows the same neighbour
    deadline = time.monotonic() + PATIENCE * clock.min_time * len(steps)
    for done in range(clock.rounds):
        if done >= ENOUGH_ROUNDS and time.monotonic() > deadline:
            break
        shuffle(order)
        for name in order:
            if name not in failed:
                calls = max(1, round(clock.min_time / clock.rounds / estimates[name]))
                seconds = take_turn(name, calls)
                times.get(name, []).append(seconds)
    for row in rows:
        if row["name"] in failed:
            row |= {"status": "failed", "reason": failed[row["name"]]}
        elif row["name"] in times:
            micros = [1e6 * seconds for seconds in times[row["name"]]]
            q1, median, q3 = statistics.quantiles(micros, n=4, method="inclusive")
            row |= {"status": "timed", "median_us": median, "q1_us": q1, "q3_us": q3}
    return times


def first_line(error: Exception) -> str:
    """The first line of an exception's text, or the exception's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def against_best(
    seconds: Mapping[str, list[float]], own: str, ignored: set[str]
) -> dict[str, Any] | None:
    """Compare one contender with the fastest of the others that are not ignored.

    Returns:
        ``own``; ``best_peer``; ``ratio``, how many times as fast as that one it is by the medians;
        ``q1`` and ``q3``, the quartiles of the rounds' own ratios. None without a peer.
    """
    peers = [name for name in seconds if name not in {own, *ignored}]
    if not peers:
        return None
    best = min(peers, key=lambda name: statistics.median(seconds[name]))
    ratios = [peer / mine for peer, mine in zip(seconds[best], seconds[own], strict=True)]
    q1, _, q3 = statistics.quantiles(ratios, n=4, method="inclusive")
    ratio = statistics.median(seconds[best]) / statistics.median(seconds[own])
    return {"own": own, "best_peer": best, "ratio": ratio, "q1": q1, "q3": q3}


# ---- the machine ---------------------------------------------------------------------------------


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
    gemm = _gemm_gflops(threads, precision, device)
    fma = _fma_gflops(threads) if device.type == "cpu" else None
    return {
        "fma_gflops": fma,
        "gemm_gflops": gemm,
        "copy_gbps": _copy_gbps(threads, device),
        "peak_gflops": (fma or gemm) / (2 if fma and precision.dtype == torch.float64 else 1),
    }


def at_best(flops: float, bytes: float, limits: Mapping[str, Any]) -> dict[str, float]:
    """What work takes at the machine's limits: ``peak_us`` for FLOPs, ``copy_us`` for bytes.

    The longer of the two is its floor. FLOPs are those of the direct convolutions and full
    gradients, and kernels that skip work beat the peak; bytes must be read and written once.
    """
    peak_us = 1e-3 * flops / limits["peak_gflops"]
    copy_us = 1e-3 * bytes / limits["copy_gbps"]
    return {"flops": flops, "bytes": bytes, "peak_us": peak_us, "copy_us": copy_us}


def _fma_gflops(threads: int) -> float:
    with ThreadPoolExecutor(threads) as pool:  # it runs on the calling thread, without the GIL
        return sum(pool.map(_C.fma_gflops, [FMA_SECONDS] * threads))


@functools.cache
def _gemm_gflops(threads: int, precision: Precision, device: torch.device) -> float:
    size = GEMM_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device).to(precision.dtype)
    names = {"torch": torch, "a": a, "b": b, "out": torch.empty_like(a)}
    return 2e-9 * size**3 / _best_seconds("torch.mm(a, b, out=out)", names, threads, device)


@functools.cache
def _copy_gbps(threads: int, device: torch.device) -> float:
    size = COPY_BYTES[device.type]
    source = torch.ones(size // 4, device=device)
    names = {"source": source, "target": torch.zeros_like(source)}
    return 2e-9 * size / _best_seconds("target.copy_(source)", names, threads, device)


def _best_seconds(
    statement: str, names: dict[str, Any], threads: int, device: torch.device
) -> float:
    timer, calls = Timer(statement, globals=names, num_threads=threads), LIMIT_CALLS[device.type]
    first = timer.timeit(calls).mean
    repeats = 0 if first > LIMIT_SLOW_SECONDS else LIMIT_REPEATS
    return min([first] + [timer.timeit(calls).mean for _ in range(repeats)])
