"""The fused block beside its peers: forward, backward, inference and training step.

    python benchmarks/bench_block.py                              # about two minutes on two cores
    python benchmarks/bench_block.py --cases block1-forward --batch-sizes 64 --threads 1
    python benchmarks/bench_block.py --batch-sizes 1 4 64 256 --threads 1 1 2 2   # some four
    python benchmarks/bench_block.py --json bench.json --plot bench.png
    python benchmarks/bench_block.py --device cuda --precision tf32 --batch-sizes 4 1024 8192

Needs torch and fusedcnn. With rich and tqdm the output is nicer (``fusedcnn[bench]``), ``--plot``
needs matplotlib (``fusedcnn[plot]``), ONNX Runtime is timed where onnxruntime and onnxscript are
installed.

For every case and batch size, each contender first computes its results from the same parameters
and images; they must be as close to a float64 reference as agreement.py says. If one is not, the
case is reported as wrong, nobody is timed in it, and the exit status is 1. Then all contenders are
timed by turns. Speed is told as a ratio to the best other contender of the same run and as a
fraction of the machine's own limits, measured in the same run.

With ``--device cuda`` each contender runs as it is and recorded as CUDA graphs, with cuDNN's search
for the fastest algorithm on; compiled ones are tuned (max-autotune). All follow the same
``--precision``: float32 means that nobody may round to tf32.

Exit status: 0; 1 where a result was wrong or fused could not run; 2 for bad arguments.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import fusedcnn
import torch
from agreement import compare
from arguments import Run
from cases import CASES, Case, Problem
from contenders import CONTENDERS, Contender, Ready, judge, time_contenders, try_prepare
from kernel_forcing import force_kernel
from limits import describe_machine, measure_limits
from options import Options, parse
from precision import describe_settings, set_precision, use_device
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
    began = time.monotonic()
    use_device(options.device)
    set_precision(options.precision)
    torch.backends.cudnn.benchmark = True  # for everybody; the CPU does not ask
    dtype = options.precision.dtype
    cases = [case for case in CASES if case.name in options.cases]
    contenders = [c for c in CONTENDERS if c.name in options.contenders]
    turns = len(options.runs) * len(cases) * len(contenders)
    threads = list(dict.fromkeys(run.threads for run in options.runs))
    progress = Progress(len(threads) + turns * (1 + options.rounds))
    limits = {}
    results: list[dict[str, Any]] = []
    not_run: list[dict[str, Any]] = []
    try:
        with force_kernel(options.device, options.kernel, options.isa):
            for count in threads:
                progress.say(f"limits of the machine, {count} thread(s)")
                limits[count] = measure_limits(count, dtype, options.device)
                progress.advance()
            for run in options.runs:
                for case in cases:
                    if options.time_limit and time.monotonic() - began > options.time_limit:
                        not_run.append({"case": case.name, **run._asdict()})
                        continue
                    results.append(
                        _run_case(case, run, contenders, options, limits[run.threads], progress)
                    )
    finally:
        progress.close()
    saved = measure_saved_bytes(max(run.batch for run in options.runs), dtype, options.device)
    statuses = {result["status"] for result in results} | ({"incomplete"} if not_run else set())
    return {
        "status": next((s for s in ("wrong", "incomplete") if s in statuses), "right"),
        "options": {
            "runs": [run._asdict() for run in options.runs],
            "dtype": str(dtype).removeprefix("torch."),
            "precision": options.precision.name,
            "settings": describe_settings(options.device),
            "device": str(options.device),
            "cases": [case.name for case in cases],
            "contenders": [contender.name for contender in contenders],
            "isa": options.isa,
            "kernel": options.kernel,
            "min_time_s": options.min_time,
            "rounds": options.rounds,
            "time_limit_s": options.time_limit,
        },
        "machine": describe_machine(options.device),
        "limits": [{"threads": count, **rates} for count, rates in limits.items()],
        "peak_name": _peak(limits[threads[0]], dtype)[0],
        "notes": _notes(options),
        "results": results,
        "not_run": not_run,
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
    problem = Problem(case, run.batch, options.precision, options.device)
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
            device=options.device,
            threads=run.threads,
            rounds=options.rounds,
            min_time=options.min_time,
            progress=progress.advance,
        )
        for row in rows:
            if row["name"] in seconds:
                row |= {"status": "timed", **summarize(seconds[row["name"]])}
                row |= _fractions(row["median_us"], problem, limits)
        own = {contender.name for contender in contenders if contender.fused}
        if any(row["name"] in own and row["status"] != "timed" for row in rows):
            status = "incomplete"
    turns = sum(len(times) for times in seconds.values())
    progress.advance(len(contenders) * options.rounds - turns)  # those that nobody took
    torch._dynamo.reset()  # compiled code of this case is of no use to the next
    if options.device.type == "cuda":
        ready.clear()
        torch.cuda.empty_cache()  # nor are the memory pools of its graphs

    return {
        "case": case.name,
        "title": case.title,
        **run._asdict(),
        "status": status,
        "flops": case.flops * run.batch,
        "bytes": _bytes(problem),
        "contenders": rows,
        **_compare(seconds, contenders),
    }


def _compare(seconds: dict[str, list[float]], contenders: list[Contender]) -> dict[str, Any]:
    """Fused against the others: the faster of its ways against all, and like against like."""
    ours = [c for c in contenders if c.fused and c.name in seconds]
    best = min(ours, key=lambda c: statistics.median(seconds[c.name]), default=None)
    result = {
        "own": best.name if best else None,
        **against_best(seconds, best.name if best else "", tuple(c.name for c in ours)),
    }
    if any(c.graphed for c in contenders):
        result["like_with_like"] = [
            {
                "own": own.name,
                **against_best(
                    seconds,
                    own.name,
                    tuple(c.name for c in contenders if c.fused or c.graphed != own.graphed),
                ),
            }
            for own in ours
        ]
    return result


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
