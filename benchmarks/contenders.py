"""Who is timed: the fused operator and the ways to compute the same with what there is."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from cases import Problem, make_call, run_checked
from torch import Tensor


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
        onnx: exported to ONNX Runtime, which serves forward passes only.
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
    rest: float = 0.01

    def covers(self, problem: Problem) -> bool:
        """Whether the contender can do this kind of work at all."""
        return not self.onnx or problem.case.kind == "forward"


CONTENDERS = (
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
    Contender("onnxruntime", "ONNX Runtime, forward passes only", onnx=True, rest=0.05),
)


@dataclass(frozen=True)
class Ready:
    """A contender set up for one problem.

    Attributes:
        step: does the work on the next of the rotated batches: what is timed.
        results: of the work on the first batch, by name.
    """

    step: Callable[[], object]
    results: dict[str, Tensor]


def prepare(contender: Contender, problem: Problem, threads: int) -> Ready:
    """Set a contender up: build, compile or export it, and compute its results once.

    Raises:
        Exception: whatever keeps it from working here: a missing package, a failing compiler, a
            dtype that it does not know.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters and compilers, not about the figures
        return _prepare_onnx(problem, threads) if contender.onnx else _prepare(contender, problem)


def _prepare(contender: Contender, problem: Problem) -> Ready:
    own = problem.module(fused=contender.fused, channels_last=contender.channels_last)
    module = own
    if contender.compiled:
        # Dropout from torch's own generator, so that the results can be compared; Inductor's own
        # generator saves some microseconds at most in these models.
        torch._inductor.config.fallback_random = True
        module = torch.compile(own, dynamic=False)
    batches = problem.batches(channels_last=contender.channels_last)
    call = make_call(problem.case, module, own)
    results = run_checked(problem.case, module, own, batches[0], call)
    rotating = itertools.cycle(batches)
    return Ready(lambda: call(next(rotating)), results)


def _prepare_onnx(problem: Problem, threads: int) -> Ready:
    if problem.device.type != "cpu":
        raise RuntimeError("timed on the CPU only")
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
