"""Who is timed: the fused operator and the ways to compute the same with what there is.

Before anybody is timed, all must be right: see :func:`what_is_wrong`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import fusedcnn
import torch
from blocks import Batch, Call, Problem, Results, make_call, make_optimizer
from fusedcnn.bench import one_line
from timing import Clock, against_best, rest_after, time_rows
from torch import Tensor, nn

# Tuned on the GPU, and without the compiler's own graphs: these are recorded like everybody's.
COMPILE_MODE = {"cpu": None, "cuda": "max-autotune-no-cudagraphs"}

# Calls before a recording: what is initialised or chosen lazily (cuDNN's algorithms, Inductor's
# tuning) synchronises, which a graph cannot record. torch's own recipe takes three.
WARM_UP_CALLS = 3

# A result may be this many times as far from the float64 reference as the stock layers are. Four is
# for the largest Winograd kernel, which selection may choose; the tests hold every kernel to its
# own bound, two for the rest.
ALLOWED_ERROR_RATIO = max(row["error"] for row in fusedcnn.build_info()["kernels"])

# Where even the stock layers miss the reference by more than this part of its norm, the two do not
# compute the same thing, and the ratio above would let anything pass. Single elements may be off by
# all they are in half types: a rounded convolution makes ties that were none, and the pool then
# sends a gradient elsewhere.
SANE_STOCK_ERROR = 0.3


@dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
        name: on the command line and in the JSON; ``title`` is for people.
        fused: the fused modules instead of the stock layers.
        channels_last: parameters, inputs and gradients in channels_last; the conversion of the
            inputs is not timed.
        compiled: through torch.compile.
        onnx: exported to ONNX Runtime, which serves forward passes only, and is timed on the CPU.
        aoti: compiled ahead of time by AOTInductor, likewise. Each takes 10 seconds or more, so
            that only those asked for by name are.
        graphed: recorded as CUDA graphs, which only a CUDA device has.
    """

    name: str
    title: str
    fused: bool = False
    channels_last: bool = False
    compiled: bool = False
    onnx: bool = False
    aoti: bool = False
    graphed: bool = False

    def why_not_on(self, device_type: str) -> str:
        """Why the contender cannot run on a type of device, or ""."""
        if self.graphed and device_type != "cuda":
            return "CUDA graphs need --device cuda"
        if (self.onnx or self.aoti) and device_type != "cpu":
            return "it is timed with --device cpu only"
        return ""


_EVERYWHERE = (
    Contender("fused", "fusedcnn", fused=True),
    Contender("eager", "eager"),
    Contender("eager-cl", "eager channels_last", channels_last=True),
    Contender("compile", "torch.compile", compiled=True),
    Contender("compile-cl", "torch.compile channels_last", channels_last=True, compiled=True),
)
_GRAPHED = (
    replace(one, name=f"{one.name}-graph", title=f"{one.title}, as CUDA graphs", graphed=True)
    for one in _EVERYWHERE
)
_ONNX = Contender("onnxruntime", "ONNX Runtime", onnx=True)
_AOTI = (
    Contender("fused-aoti", "fusedcnn, AOTInductor", fused=True, aoti=True),
    Contender("aoti", "AOTInductor", aoti=True),
)
CONTENDERS = {one.name: one for one in (*_EVERYWHERE, _ONNX, *_AOTI, *_GRAPHED)}


def contenders_on(device_type: str) -> list[str]:
    """Names of the contenders that run on a type of device unless others are asked for."""
    able = [one for one in CONTENDERS.values() if not one.why_not_on(device_type)]
    return [one.name for one in able if not one.aoti]


def race(
    problem: Problem, names: list[str], clock: Clock, say: Callable[[str], object]
) -> dict[str, Any]:
    """Check all contenders of one problem, then time them by turns; ``say`` is told what is next.

    Returns:
        The report's result: ``rows``, one for each contender, whose ``status`` is ``"timed"``,
        or ``"unavailable"``, ``"failed"`` or ``"wrong"`` with a ``reason``; ``speedups``, of the
        fastest fused way against all, then of each fused way against its like; ``status``:
        ``"wrong"`` where any is, and then nobody is timed, ``"incomplete"`` where a fused one has
        no time (through AOTInductor it may have none), else ``"timed"``.
    """
    rows: list[dict[str, Any]] = []
    steps: dict[str, Callable[[], object]] = {}
    for name in names:
        say(name)
        row = {"name": name, "status": "right"}
        rows.append(row)
        try:
            steps[name], results = prepare(CONTENDERS[name], problem, clock.threads)
        except Exception as error:  # compilers and exporters raise all sorts; the others go on
            row |= {"status": "unavailable", "reason": one_line(error)}
            continue
        if wrong := what_is_wrong(results, *problem.references):
            row |= {"status": "wrong", "reason": wrong}
    wrong = any(row["status"] == "wrong" for row in rows)
    seconds = {}
    if not wrong:
        say("timing")

        def turn(name: str) -> contextlib.AbstractContextManager[None]:
            return rest_after(problem.device, 0.05 if CONTENDERS[name].onnx else 0.01)

        with torch.set_grad_enabled(problem.case.kind != "forward"):
            seconds = time_rows(rows, steps, clock, turn)
    torch._dynamo.reset()  # compiled code of this problem is of no use to the next
    steps.clear()
    if problem.device.type == "cuda":
        torch.cuda.empty_cache()  # nor are the memory pools of its graphs
    ours = [row for row in rows if CONTENDERS[row["name"]].fused]
    timed = all(row["status"] == "timed" for row in ours if not CONTENDERS[row["name"]].aoti)
    status = "wrong" if wrong else "timed" if timed else "incomplete"
    return {"status": status, "rows": rows, "speedups": speedups(seconds)}


def speedups(seconds: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    """Fused against the others: the faster of its ways against all, and like against like."""
    ours = [name for name in seconds if CONTENDERS[name].fused]
    others = seconds.keys() - ours
    best = sorted(ours, key=lambda name: statistics.median(seconds[name]))[:1]
    pairs = [(name, others) for name in best]
    if any(CONTENDERS[name].graphed for name in seconds):
        for own in ours:
            graphed = CONTENDERS[own].graphed
            pairs.append((own, {one for one in others if CONTENDERS[one].graphed == graphed}))
    return [against_best(seconds, own, peers) for own, peers in pairs if peers]


# ---- the rule ------------------------------------------------------------------------------------


def what_is_wrong(results: Results, exact: Results, stock: list[Results]) -> str:
    """Hold results against :attr:`blocks.Problem.references` by the stock layers' largest error.

    Returns:
        What is wrong, or "". A wrong shape or a NaN is an infinite error. Nothing is right where
        the stock layers miss the reference by far.
    """
    wrong = []
    for name, result in results.items():
        stock_error, limit = allowed_error(result.dtype, exact[name], [s[name] for s in stock])
        error = largest_error(result, exact[name])
        if not error <= limit:
            wrong.append(
                f"{name} is off by {error:.2g}, allowed {limit:.2g} "
                f"(stock layers: off by {stock_error:.2g})"
            )
    return "; ".join(wrong)


def allowed_error(dtype: torch.dtype, exact: Tensor, stock: list[Tensor]) -> tuple[float, float]:
    """The stock layers' largest error, and what a result of this dtype may be off by at most.

    The latter is minus infinity where the stock layers miss the reference by far.
    """
    eps = torch.finfo(dtype).eps
    stock_error = max(largest_error(way, exact) for way in stock)
    stock_error *= eps / torch.finfo(stock[0].dtype).eps  # 1, but for float64
    # The smallest error that can be asked of anybody: the reference itself, rounded to the dtype,
    # is off by up to half a unit in the last place of its largest element, which is at most eps / 2
    # times that element. It matters where the stock layers' error happens to be (nearly) zero, as
    # in a sum of few terms.
    limit = ALLOWED_ERROR_RATIO * (stock_error + eps / 2 * exact.abs().max().item())
    if dtype == torch.float64:
        limit += stock_error  # the reference errs as much itself
    sane = SANE_STOCK_ERROR * exact.norm()
    if not all((way.double() - exact).norm() <= sane for way in stock):
        limit = -math.inf
    return stock_error, limit


def largest_error(result: Tensor, reference: Tensor) -> float:
    """The largest absolute difference; infinite for another shape or a NaN."""
    if result.shape != reference.shape:
        return math.inf
    error = (result.double() - reference).abs().max().item()
    return math.inf if math.isnan(error) else error


# What does the work on the next of the rotated batches and is timed; and the first one's results.
Prepared = tuple[Callable[[], object], Results]


def prepare(contender: Contender, problem: Problem, threads: int) -> Prepared:
    """Set a contender up: build, compile, record or export it, and compute its results once.

    Raises:
        Exception: whatever keeps it from working here: a missing package, a failing compiler, a
            dtype that it does not know.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of exporters and compilers, not about the figures
        if contender.onnx or contender.aoti:
            if problem.case.kind != "forward":
                raise NotImplementedError("it serves forward passes only")
            how = _prepare_onnx if contender.onnx else _prepare_aoti
            return how(contender, problem, threads)
        return _prepare_torch(contender, problem, threads)


def _prepare_torch(contender: Contender, problem: Problem, threads: int) -> Prepared:
    case, batches = problem.case, problem.batches(channels_last=contender.channels_last)
    module = own = problem.module(fused=contender.fused, channels_last=contender.channels_last)
    if contender.compiled:
        # Dropout from torch's own generator, so that the results can be compared; Inductor's own
        # generator saves some microseconds at most in these models.
        torch._inductor.config.fallback_random = True
        torch._inductor.config.cpp.threads = threads  # compiled in
        module = torch.compile(own, dynamic=False, mode=COMPILE_MODE[problem.device.type])
    if contender.graphed and case.kind != "training":
        with torch.set_grad_enabled(case.kind != "forward"):
            replays = record_calls(make_call(case, module, own), batches)
        results = problem.results(lambda _batch: replays[0](), own, batches[0])
        rotating = itertools.cycle(replays)
        return lambda: next(rotating)(), results
    call = record_training(module, own, batches) if contender.graphed else None
    call = call or make_call(case, module, own)
    results = problem.results(call, own, batches[0])
    rotating = itertools.cycle(batches)
    return lambda: call(next(rotating)), results


def _prepare_aoti(contender: Contender, problem: Problem, threads: int) -> Prepared:
    batches = problem.batches()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(problem.module(fused=contender.fused), (batches[0].input,))
        path = torch._inductor.aoti_compile_and_package(
            program,
            package_path=f"{folder}/model.pt2",
            inductor_configs={"cpp.threads": threads},  # compiled in
        )
        # What torch._inductor.aoti_load_package wraps: less work around a call.
        loader = torch._C._aoti.AOTIModelPackageLoader(path, "model", False, 1, -1)
    results = {"output": loader.run([batches[0].input])[0]}
    rotating = itertools.cycle([[batch.input] for batch in batches])
    return lambda: loader.run(next(rotating)), results


def _prepare_onnx(_contender: Contender, problem: Problem, threads: int) -> Prepared:
    import onnxruntime

    batches = problem.batches()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.onnx.export(problem.module(), (batches[0].input,), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    feeds = [{name: batch.input.numpy()} for batch in batches]
    results = {"output": torch.from_numpy(session.run(None, feeds[0])[0])}
    rotating = itertools.cycle(feeds)
    return lambda: session.run(None, next(rotating)), results


def record_calls(call: Call, batches: list[Batch]) -> list[Callable[[], tuple[Tensor, ...]]]:
    """Record a call on each batch as a CUDA graph, which reads that batch's memory: no copies.

    Returns:
        For each batch a function that replays its graph and returns the results, which live in
        memory that all graphs share: they are valid until another one of them replays.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            call(batches[0])
    torch.cuda.current_stream().wait_stream(stream)
    replays, pool = [], None
    for batch in batches:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            # Detached: the results' history would keep the graph's intermediates from being the
            # next graph's memory.
            results = tuple(result.detach() for result in call(batch))
        pool = pool or graph.pool()
        replays.append(functools.partial(_replay, graph, results))
    return replays


def _replay(graph: torch.cuda.CUDAGraph, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    graph.replay()
    return results


def record_training(module: nn.Module, own: nn.Module, batches: list[Batch]) -> Call:
    """Record a training step as :class:`fusedcnn.GraphedTrainStep`, whichever the model.

    Its calls copy the batch into the graph's memory, as in training: that is timed too.
    """
    optimizer = make_optimizer(own, fused=True, capturable=True)
    step = fusedcnn.GraphedTrainStep(module, nn.CrossEntropyLoss(), optimizer)
    for batch in itertools.islice(itertools.cycle(batches), WARM_UP_CALLS + 1):
        step(*batch)
    return lambda batch: (step(*batch),)
