"""The fused block beside its peers: forward, backward, inference and training step.

    python benchmarks/bench_block.py                              # about two minutes on two cores
    python benchmarks/bench_block.py --cases block1-forward --batch-sizes 64 --threads 1
    python benchmarks/bench_block.py --json bench.json --plot bench.png

Needs torch and fusedcnn. With rich and tqdm the output is nicer (``fusedcnn[bench]``), ``--plot``
needs matplotlib (``fusedcnn[plot]``), ONNX Runtime is timed where onnxruntime and onnxscript are
installed.

For every case and batch size, each contender first computes its results from the same parameters
and images; they must be as close to a float64 reference as agreement.py says. If one is not, the
case is reported as wrong, nobody is timed in it, and the exit status is 1. Then all contenders are
timed by turns. Speed is told as a ratio to the best other contender of the same run and as a
fraction of the machine's own limits, measured in the same run.

Exit status: 0; 1 where a result was wrong or fused could not run; 2 for bad arguments.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import fusedcnn
import torch
from agreement import compare, describe
from cases import CASES, Case, Problem
from contenders import CONTENDERS, Contender, Ready, prepare
from fusedcnn._ops import force
from limits import describe_machine, measure_limits
from options import Options, parse
from progress import Progress
from report import print_report, write_json, write_plot
from saved_bytes import measure_saved_bytes
from timing import speedup, summarize, time_by_turns


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)  # torch.compile bakes it in
    report = run(options)
    print_report(report)
    if options.json:
        write_json(report, options.json)
    if options.plot:
        write_plot(report, options.plot)
    return 0 if report["status"] == "right" else 1


def run(options: Options) -> dict[str, Any]:
    """Measure everything that the options ask for.

    Returns:
        The report: plain values only, ready for JSON.
    """
    cases = [case for case in CASES if case.name in options.cases]
    contenders = [c for c in CONTENDERS if c.name in options.contenders]
    turns = len(options.batch_sizes) * len(cases) * len(contenders)
    progress = Progress(1 + turns * (1 + options.rounds))
    try:
        with force(options.isa, options.kernel):
            progress.say("limits of the machine")
            limits = measure_limits(options.threads, options.dtype, options.device)
            progress.advance()
            results = [
                _run_case(case, batch_size, contenders, options, limits, progress)
                for batch_size in options.batch_sizes
                for case in cases
            ]
    finally:
        progress.close()
    saved = measure_saved_bytes(options.batch_sizes[0], options.dtype, options.device)
    statuses = {result["status"] for result in results}
    return {
        "status": next((s for s in ("wrong", "incomplete") if s in statuses), "right"),
        "options": {
            "batch_sizes": options.batch_sizes,
            "threads": options.threads,
            "dtype": str(options.dtype).removeprefix("torch."),
            "device": str(options.device),
            "cases": [case.name for case in cases],
            "contenders": [contender.name for contender in contenders],
            "isa": options.isa,
            "kernel": options.kernel,
            "min_time_s": options.min_time,
            "rounds": options.rounds,
        },
        "machine": describe_machine(options.device),
        "limits": limits,
        "peak_name": _peak(limits, options.dtype)[0],
        "notes": _notes(options),
        "results": results,
        "saved_bytes": saved,
    }


def _run_case(
    case: Case,
    batch_size: int,
    contenders: list[Contender],
    options: Options,
    limits: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Check all contenders of one case at one batch size, then time them."""
    label = f"{case.name}, batch {batch_size}"
    progress.say(f"{label}: reference")
    problem = Problem(case, batch_size, options.dtype, options.device)
    exact, stock = problem.references()
    rows, ready = [], {}
    for contender in contenders:
        if contender.covers(problem):
            progress.say(f"{label}: {contender.name}")
            row, ready_contender = _check(contender, problem, exact, stock, options.threads)
            rows.append(row)
            if ready_contender:
                ready[contender.name] = ready_contender
        progress.advance()

    status = "wrong" if any(row["status"] == "wrong" for row in rows) else "timed"
    seconds = {}
    if status == "timed":
        progress.say(f"{label}: timing")
        seconds = _time(case, contenders, ready, options, progress)
        for row in rows:
            if row["name"] in seconds:
                row |= {"status": "timed", **summarize(seconds[row["name"]])}
                row |= _fractions(row["median_us"], problem, limits)
        if any(row["name"] == "fused" and row["status"] != "timed" for row in rows):
            status = "incomplete"
    turns = sum(len(times) for times in seconds.values())
    progress.advance(len(contenders) * options.rounds - turns)  # those that nobody took
    torch._dynamo.reset()  # compiled code of this case is of no use to the next

    peers = {name: times for name, times in seconds.items() if name != "fused"}
    best = min(peers, key=lambda name: statistics.median(peers[name]), default=None)
    return {
        "case": case.name,
        "title": case.title,
        "batch": batch_size,
        "status": status,
        "flops": case.flops * batch_size,
        "bytes": _bytes(problem),
        "contenders": rows,
        "best_peer": best,
        "speedup": speedup(peers[best], seconds["fused"]) if best and "fused" in seconds else None,
    }


def _check(
    contender: Contender,
    problem: Problem,
    exact: dict[str, torch.Tensor],
    stock: list[dict[str, torch.Tensor]],
    threads: int,
) -> tuple[dict[str, Any], Ready | None]:
    """Set a contender up and compare its results; without it where it cannot run or is wrong."""
    row: dict[str, Any] = {"name": contender.name, "note": contender.note}
    try:
        ready = prepare(contender, problem, threads)
    except Exception as error:  # compilers and exporters raise all sorts; the others go on
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return row | {"status": "unavailable", "reason": reason}, None
    agreement = compare(ready.results, exact, stock)
    row["agreement"] = agreement
    wrong = describe(agreement)
    if wrong:
        return row | {"status": "wrong", "reason": wrong}, None
    return row | {"status": "right"}, ready


def _time(
    case: Case,
    contenders: list[Contender],
    ready: dict[str, Ready],
    options: Options,
    progress: Progress,
) -> dict[str, list[float]]:
    with torch.set_grad_enabled(case.kind != "forward"):
        return time_by_turns(
            {name: contender.step for name, contender in ready.items()},
            {contender.name: contender.rest for contender in contenders},
            threads=options.threads,
            rounds=options.rounds,
            min_time=options.min_time,
            progress=progress.advance,
        )


def _bytes(problem: Problem) -> int:
    """Bytes that one call must at least read and write."""
    case = problem.case
    elements = case.elements * problem.batch_size + case.elements_per_call
    return elements * problem.dtype.itemsize


def _peak(limits: dict[str, Any], dtype: torch.dtype) -> tuple[str, float]:
    """Name and GFLOP/s of the arithmetic limit that fits the dtype."""
    if limits["fma_gflops"] and dtype == torch.float32:
        return "FMA", limits["fma_gflops"]
    return "GEMM", limits["gemm_gflops"]


def _fractions(micros: float, problem: Problem, limits: dict[str, Any]) -> dict[str, float]:
    """How much of the machine's limits a call of this length uses, and images per second."""
    seconds = 1e-6 * micros
    flops = problem.case.flops * problem.batch_size
    return {
        "images_per_s": problem.batch_size / seconds,
        "peak_fraction": 1e-9 * flops / seconds / _peak(limits, problem.dtype)[1],
        "gemm_fraction": 1e-9 * flops / seconds / limits["gemm_gflops"],
        "copy_fraction": 1e-9 * _bytes(problem) / seconds / limits["copy_gbps"],
    }


def _notes(options: Options) -> list[str]:
    """What a reader must know about this run's figures."""
    info = fusedcnn.build_info()
    devices = info["devices"]
    notes = []
    if options.device.type != "cpu":
        text = devices.get(options.device.type, devices.get("others"))
        notes.append(f"fused on {options.device.type}: {text}")
    notes += [
        f"fused: {count} calls were computed by the stock layers: {reason}"
        for reason, count in info["stock_calls"].items()
    ]
    if options.isa or options.kernel:
        forced = {"isa": options.isa, "kernel": options.kernel}
        notes.append("fused: forced " + ", ".join(f"{k} {v}" for k, v in forced.items() if v))
    return notes


if __name__ == "__main__":
    sys.exit(main())
