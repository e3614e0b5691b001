"""The fused block beside its peers: forward, backward, inference and training step.

    python benchmarks/bench_block.py                              # about two minutes on two cores
    python benchmarks/bench_block.py --cases block1-forward --batch-sizes 64 --threads 1
    python benchmarks/bench_block.py --batch-sizes 1 4 64 256 --threads 1 1 2 2   # some four
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

import sys
from typing import Any

import fusedcnn
import torch
from agreement import compare
from arguments import Run
from cases import CASES, Case, Problem
from contenders import CONTENDERS, Contender, Ready, judge, time_contenders, try_prepare
from fusedcnn._ops import force
from limits import describe_machine, measure_limits
from options import Options, parse
from progress import Progress
from report import print_report, write_json, write_plot
from saved_bytes import measure_saved_bytes
from timing import against_best, summarize


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = parse(arguments)
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
    turns = len(options.runs) * len(cases) * len(contenders)
    threads = list(dict.fromkeys(run.threads for run in options.runs))
    progress = Progress(len(threads) + turns * (1 + options.rounds))
    limits = {}
    try:
        with force(options.isa, options.kernel):
            for count in threads:
                progress.say(f"limits of the machine, {count} thread(s)")
                limits[count] = measure_limits(count, options.dtype, options.device)
                progress.advance()
            results = [
                _run_case(case, run, contenders, options, limits[run.threads], progress)
                for run in options.runs
                for case in cases
            ]
    finally:
        progress.close()
    saved = measure_saved_bytes(
        max(run.batch for run in options.runs), options.dtype, options.device
    )
    statuses = {result["status"] for result in results}
    return {
        "status": next((s for s in ("wrong", "incomplete") if s in statuses), "right"),
        "options": {
            "runs": [run._asdict() for run in options.runs],
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
        "limits": [{"threads": count, **rates} for count, rates in limits.items()],
        "peak_name": _peak(limits[threads[0]], options.dtype)[0],
        "notes": _notes(options),
        "results": results,
        "saved_bytes": saved,
    }


def _run_case(
    case: Case,
    run: Run,
    contenders: list[Contender],
    options: Options,
    limits: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Check all contenders of one case at one batch size, then time them."""
    label = f"{case.name}, batch {run.batch}"
    progress.say(f"{label}: reference")
    torch.set_num_threads(run.threads)
    problem = Problem(case, run.batch, options.dtype, options.device)
    exact, stock = problem.references()
    rows: list[dict[str, Any]] = []
    ready: dict[str, Ready] = {}
    for contender in contenders:
        if contender.covers(problem):
            progress.say(f"{label}: {contender.name}")
            row, one = try_prepare(contender, problem, run.threads)
            rows.append(row)
            if one:
                judge(row, compare(one.results, exact, stock))
                ready[contender.name] = one
        progress.advance()

    status = "wrong" if any(row["status"] == "wrong" for row in rows) else "timed"
    seconds = {}
    if status == "timed":
        progress.say(f"{label}: timing")
        seconds = time_contenders(
            case,
            ready,
            threads=run.threads,
            rounds=options.rounds,
            min_time=options.min_time,
            progress=progress.advance,
        )
        for row in rows:
            if row["name"] in seconds:
                row |= {"status": "timed", **summarize(seconds[row["name"]])}
                row |= _fractions(row["median_us"], problem, limits)
        if any(row["name"] == "fused" and row["status"] != "timed" for row in rows):
            status = "incomplete"
    turns = sum(len(times) for times in seconds.values())
    progress.advance(len(contenders) * options.rounds - turns)  # those that nobody took
    torch._dynamo.reset()  # compiled code of this case is of no use to the next

    return {
        "case": case.name,
        "title": case.title,
        **run._asdict(),
        "status": status,
        "flops": case.flops * run.batch,
        "bytes": _bytes(problem),
        "contenders": rows,
        **against_best(seconds, "fused"),
    }


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
