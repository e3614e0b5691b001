"""Who is timed: the fused operator and the ways to compute the same with what there is."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from agreement import describe
from cases import Batch, Case, Problem, make_call, run_checked
from graphed import record_calls, record_training
from timing import time_by_turns
from torch import Tensor, nn


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
        name: on the command line and in the JSON.
        note: what it is, for people.
        fused: the fused modules instead of the stock layers.
        channels_last: parameters, inputs and gradients in channels_last; the conversion of the
            inputs is not timed.
        compiled: through torch.compile.
        onnx: exported to ONNX Runtime, which serves forward passes only, and is timed on the CPU.
        graphed: recorded as CUDA graphs, which only a CUDA device has.
        rest: seconds to wait after its turn, until its idle threads have stopped spinning; else
            they would take a core from the next contender. Torch's threads spin for some 4 ms,
            ONNX Runtime's for some 30.
    """

    name: str
    note: str
    fused: bool = False
    channels_last: bool = False
    compiled: bool = False
    onnx: bool = False
    graphed: bool = False
    rest: float = 0.01

    def covers(self, problem: Problem) -> bool:
        """Whether the contender can do this kind of work at all."""
        return not self.onnx or problem.case.kind == "forward"

    def why_not_on(self, device_type: str) -> str:
        """Why the contender cannot run on a type of device, or ""."""
        if self.graphed and device_type != "cuda":
            return "CUDA graphs need --device cuda"
        if self.onnx and device_type != "cpu":
            return "it is timed with --device cpu only"
        return ""


_EVERYWHERE = (
    Contender("fused", "fusedcnn", fused=True),
    Contender("eager", "stock layers, contiguous"),
    Contender("eager-cl", "stock layers, channels_last", channels_last=True),
    Contender("compile", "torch.compile of the stock layers, contiguous", compiled=True),
    Contender(
        "compile-cl",
        "torch.compile of the stock layers, channels_last",
        channels_last=True,
        compiled=True,
    ),
)
CONTENDERS = (
    *_EVERYWHERE,
    *(
        replace(one, name=f"{one.name}-graph", note=f"{one.note}, as CUDA graphs", graphed=True)
        for one in _EVERYWHERE
    ),
    Contender("onnxruntime", "ONNX Runtime, forward passes only", onnx=True, rest=0.05),
)
# Tuned on the GPU, and without the compiler's own graphs: these are recorded like everybody's.
COMPILE_MODE = {"cpu": None, "cuda": "max-autotune-no-cudagraphs"}


def contenders_on(device_type: str) -> list[str]:
    """Names of the contenders that can run on a type of device."""
    return [one.name for one in CONTENDERS if not one.why_not_on(device_type)]


@dataclass(frozen=True)
class Ready:
    """A contender set up for one problem.

    Attributes:
        step: does the work on the next of the rotated batches: what is timed.
        results: of the work on the first batch, by name.
    """

    step: Callable[[], object]
    results: dict[str, Tensor]


def try_prepare(
    contender: Contender, problem: Problem, threads: int
) -> tuple[dict[str, Any], Ready | None]:
    """Call :func:`prepare`; return the beginning of the report's row, which says what failed."""
    row: dict[str, Any] = {"name": contender.name, "note": contender.note}
    try:
        return row, prepare(contender, problem, threads)
    except Exception as error:  # compilers and exporters raise all sorts; the others go on
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return row | {"status": "unavailable", "reason": reason}, None


def judge(row: dict[str, Any], agreement: dict[str, dict[str, Any]]) -> None:
    """Add the verdict on a contender's results (agreement.py) to its row of the report."""
    row |= {"agreement": agreement, "status": "right"}
    wrong = describe(agreement)
    if wrong:
        row |= {"status": "wrong", "reason": wrong}


def time_contenders(
    case: Case,
    ready: dict[str, Ready],
    *,
    device: torch.device,
    threads: int,
    rounds: int,
    min_time: float,
    progress: Callable[[], None],
) -> dict[str, list[float]]:
    """Time contenders, by name, at a case: see :func:`timing.time_by_turns`."""
    with torch.set_grad_enabled(case.kind != "forward"):
        return time_by_turns(
            {name: one.step for name, one in ready.items()},
            {
                # A device does not spin for anyone.
                contender.name: contender.rest if device.type == "cpu" else 0.0
                for contender in CONTENDERS
            },
            threads=threads,
            rounds=rounds,
            min_time=min_time,
            progress=progress,
        )


def prepare(contender: Contender, problem: Problem, threads: int) -> Ready:
    """Set a contender up: build, compile or export it, and compute its results once.

    Raises:
        Exception: whatever keeps it from working here: a missing package, a failing compiler, a
            dtype that it does not know.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters and compilers, not about the figures
        if contender.onnx:
            return _prepare_onnx(problem, threads)
        return _prepare(contender, problem, threads)


def _prepare(contender: Contender, problem: Problem, threads: int) -> Ready:
    own = problem.module(fused=contender.fused, channels_last=contender.channels_last)
    module = own
    if contender.compiled:
        # Dropout from torch's own generator, so that the results can be compared; Inductor's own
        # generator saves some microseconds at most in these models.
        torch._inductor.config.fallback_random = True
        torch._inductor.config.cpp.threads = threads  # compiled in
        module = torch.compile(own, dynamic=False, mode=COMPILE_MODE[problem.device.type])
    batches = problem.batches(channels_last=contender.channels_last)
    if contender.graphed:
        return _prepare_graphed(problem.case, module, own, batches)
    call = make_call(problem.case, module, own)
    results = run_checked(problem.case, module, own, batches[0], call)
    rotating = itertools.cycle(batches)
    return Ready(lambda: call(next(rotating)), results)


def _prepare_graphed(case: Case, module: nn.Module, own: nn.Module, batches: list[Batch]) -> Ready:
    if case.kind == "training":
        call = record_training(module, own, batches)
        rotating = itertools.cycle(batches)
        results = run_checked(case, module, own, batches[0], call)
        return Ready(lambda: call(next(rotating)), results)
    with torch.set_grad_enabled(case.kind != "forward"):
        replays = record_calls(make_call(case, module, own), batches)
    results = run_checked(case, module, own, batches[0], lambda _batch: replays[0]())
    rotating = itertools.cycle(replays)
    return Ready(lambda: next(rotating)(), results)


def _prepare_onnx(problem: Problem, threads: int) -> Ready:
    import onnxruntime

    batches = problem.batches(channels_last=False)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.onnx.export(
        problem.module(fused=False), (batches[0].input,), dynamo=True, verbose=False
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    feeds = [{name: batch.input.numpy()} for batch in batches]
    results = {"output": torch.from_numpy(session.run(None, feeds[0])[0])}
    rotating = itertools.cycle(feeds)
    return Ready(lambda: session.run(None, next(rotating)), results)
