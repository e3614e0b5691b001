"""Real blocks beside the stock layers: forward, and forward with backward."""

from __future__ import annotations

from typing import Any

import torch
from arguments import DTYPES, Run
from cases import Case, Problem, block_case
from contenders import CONTENDERS, Contender, Ready, judge, time_contenders, try_prepare
from fusedcnn._ops import _C
from kernel_options import Options
from ladder import peak
from passes import BlockCalls
from precision import of_dtype
from progress import Progress
from timing import against_best, summarize

KINDS = ("forward", "gradients")


def count_turns(options: Options) -> int:
    """Steps of the progress bar."""
    runs = sum(len(runs) for _, runs in options.blocks)
    return runs * len(KINDS) * len(options.contenders) * (1 + options.rounds)


def run_summary(
    options: Options, peaks: dict[tuple[str, int], float], progress: Progress
) -> list[dict[str, Any]]:
    """Time every block of the options.

    Args:
        options: what to measure.
        peaks: float32 multiply-add rates in GFLOP/s, by ISA and threads.
        progress: told about it.

    Returns:
        One row for each block, run and kind of work: ``contenders`` with their times, ``best_peer``
        and ``speedup`` as in bench_block.py, ``peak_fraction`` of the fused block, ``kernels`` that
        it used by pass, and ``status``: ``"timed"``, or ``"wrong"`` with the ``reason``.
    """
    dtype = options.dtypes[0]
    rows = []
    for block, runs in options.blocks:
        for run in runs:
            torch.set_num_threads(run.threads)
            progress.say(f"{block.name}, batch {run.batch}: reference")
            # Codes and all from the kernels that the module will use.
            calls = BlockCalls(block, run.batch, of_dtype(DTYPES[dtype]), False, forward_kernel="")
            for kind in KINDS:
                case = block_case(
                    block,
                    kind,
                    name=block.name,
                    title=block.title,
                    input_grad=kind == "gradients" and not block.reads_images,
                    clear_images=False,
                )
                fma_gflops = peaks[options.isas[0], run.threads]
                rows.append(_run_case(case, calls, run, options, peak(fma_gflops, dtype), progress))
    return rows


def _run_case(
    case: Case,
    calls: BlockCalls,
    run: Run,
    options: Options,
    peak_gflops: float,
    progress: Progress,
) -> dict[str, Any]:
    label = f"{case.name}, batch {run.batch}, {case.kind}"
    problem = Problem(case, run.batch, calls.precision, torch.device("cpu"))
    contenders = [c for c in CONTENDERS if c.name in options.contenders and c.covers(problem)]
    rows: dict[str, dict[str, Any]] = {}
    ready: dict[str, Ready] = {}
    kernels: dict[str, str] = {}
    for contender in contenders:
        progress.say(f"{label}: {contender.name}")
        rows[contender.name], one = try_prepare(contender, problem, run.threads)
        if contender.fused:
            kernels = _used(case)
        if one:
            judge(rows[contender.name], _check(calls, contender, one))
            ready[contender.name] = one
        progress.advance()

    progress.say(f"{label}: timing")
    seconds: dict[str, list[float]] = {}
    wrong = [name for name, row in rows.items() if row["status"] == "wrong"]
    if ready and not wrong:
        seconds = time_contenders(
            case,
            ready,
            device=problem.device,
            threads=run.threads,
            rounds=options.rounds,
            min_time=options.min_time,
            progress=progress.advance,
        )
        for name, times in seconds.items():
            rows[name] |= {"status": "timed", **summarize(times)}
    turns = len(contenders) + sum(len(times) for times in seconds.values())
    progress.advance(len(options.contenders) * (1 + options.rounds) - turns)
    torch._dynamo.reset()  # compiled code of this case is of no use to the next

    row = {
        "block": case.name,
        **run._asdict(),
        "kind": case.kind,
        "input_grad": case.input_grad,
        "status": "wrong" if wrong else "timed",
        "flops": case.flops * run.batch,
        "kernels": kernels,
        "contenders": list(rows.values()),
        **against_best(seconds, "fused"),
        "peak_fraction": None,
    }
    if "fused" in seconds:
        gflops = 1e-3 * row["flops"] / rows["fused"]["median_us"]
        row["peak_fraction"] = gflops / peak_gflops
    return row


def _used(case: Case) -> dict[str, str]:
    """Names of the kernels that served the last call, by pass."""
    names = _C.last_selected()
    passes = ["forward"]
    if case.kind == "gradients":
        passes += ["grad_weight"] + ["grad_input"] * case.input_grad
    return {name: names[name] for name in passes}


def _check(calls: BlockCalls, contender: Contender, ready: Ready) -> dict[str, dict[str, Any]]:
    """Compare a contender's results with the reference.

    The gradients of the fused block alone: where windows nearly tie, the other contenders' follow
    choices that nobody sees, and they are torch's own.
    """
    results = {key.replace("0.", ""): value for key, value in ready.results.items()}
    report = calls.check_output(results.pop("output"), None)
    if contender.fused and results:
        report |= calls.check_gradients(results)
    return report
