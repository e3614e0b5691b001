"""The fused block beside its peers: forward, backward, inference and training step.

    python benchmarks/bench_block.py                              # about two minutes on two cores
    python benchmarks/bench_block.py --cases block1-forward --batch-sizes 64 --threads 1
    python benchmarks/bench_block.py --batch-sizes 1 4 64 256 --json bench.json
    python benchmarks/bench_block.py --device cuda --precision tf32 --batch-sizes 4 1024 8192

Needs ``fusedcnn[bench]``. For every case and batch size, each contender first computes its results
from the same parameters and images; they must be as close to a float64 reference as contenders.py
says. If one is not, the case is reported as wrong, nobody is timed in it, and the exit status is 1.
Then all contenders are timed by turns. Speed is told as a ratio to the best other contender of the
same run and as a fraction of the machine's own limits, measured in the same run.

With ``--device cuda`` each contender runs as it is and recorded as CUDA graphs, with cuDNN's search
for the fastest algorithm on; compiled ones are tuned (max-autotune). All follow the same
``--precision``: float32 means that nobody may round to tf32.

Exit status: 0; 1 where a result was wrong, fused could not run or time was over; 2 for bad
arguments.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

import fusedcnn
import torch
from blocks import CASES, MORE_CASES, SIMPLECNN_1, SIMPLECNN_2, Case, Problem
from contenders import contenders_on, race
from fusedcnn._ops import _C
from fusedcnn.bench import kept_bytes
from options import Parser, Run
from report import Report
from timing import Clock, at_best, force_kernel

BATCH_SIZES = {"cpu": [4, 64], "cuda": [4, 1024, 4096]}
SMALL_BATCH = 4


def main(arguments: list[str] | None = None) -> int:
    return run(parse(arguments)).finish()


def parse(arguments: list[str] | None) -> Namespace:
    parser = Parser("Time the fused block beside its peers.", min_time=0.2, rounds=10)
    parser.add_kernels()
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES | MORE_CASES,
        default=list(CASES),
        metavar="CASE",
        help="see --list (default: SimpleCNN's)",
    )
    options = parser.read(arguments)
    options.contenders = options.contenders or contenders_on(options.device.type)
    parser.expect_one(options, "isa", "kernel")
    options.runs = parser.pair_runs(options, BATCH_SIZES[options.device.type], SMALL_BATCH)
    return options


def run(options: Namespace) -> Report:
    works = [(run, (CASES | MORE_CASES)[name]) for run in options.runs for name in options.cases]
    report = race_all(options, works)
    batch = max(run.batch for run in options.runs)
    dtype = options.precisions[0].dtype
    report.values["saved_bytes"] = measure_saved_bytes(batch, dtype, options.device)
    return report


def race_all(options: Namespace, works: Iterable[tuple[Run, Case]]) -> Report:
    """Race the contenders at each piece of work and precision."""
    torch.backends.cudnn.benchmark = True  # for everybody; the CPU does not ask
    device = options.device
    works = [(precision, *work) for precision in options.precisions for work in works]
    report = Report(options, len(works))
    isa, kernel = (next(iter(names), None) for names in (options.isa, options.kernel))
    for precision, run, case in works:
        head = {"case": case.name, **run._asdict(), "precision": precision.name}
        if not report.begin(head):
            continue
        precision.use(device)
        torch.set_num_threads(run.threads)
        limits = report.limits(run.threads, precision, isa)
        with force_kernel(device, kernel or "", isa):
            problem = Problem(case, run.batch, precision, device)
            result = race(
                problem,
                options.contenders,
                Clock(run.threads, options.min_time, options.rounds),
                report.say,
            )
        timed = {row["name"] for row in result["rows"] if row["status"] == "timed"}
        if case.passes and device.type == "cpu" and "fused" in timed:
            used = _C.last_selected()  # nobody else calls fusedcnn after the timing
            result["kernels"] = [used[name] for name in case.passes if used[name]]
        report.add(head, result | at_best(case.flops * run.batch, problem.bytes, limits))
    return report


def measure_saved_bytes(
    batch: int, dtype: torch.dtype, device: torch.device
) -> list[dict[str, Any]]:
    """Count what autograd keeps for the backward, by each block and by both in a row."""
    parts = {"block 1": slice(0, 3), "block 2": slice(3, 6), "both blocks": slice(0, 6)}
    rows = []
    for what, part in parts.items():
        image = (SIMPLECNN_2 if what == "block 2" else SIMPLECNN_1).image
        images = torch.randn(batch, *image, dtype=dtype, device=device)
        images.requires_grad_(what == "block 2")  # whose input is an activation
        row = {"what": what, "batch": batch}
        for name, model in (("stock", fusedcnn.SimpleCNN), ("fused", fusedcnn.FusedSimpleCNN)):
            row[name] = kept_bytes(model().features[part].to(device, dtype), [images])
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
