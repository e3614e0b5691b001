r"""Kernels by name on any block, and real blocks beside the stock layers.

    python benchmarks/bench_kernels.py                          # every kernel of SimpleCNN's blocks
    python benchmarks/bench_kernels.py alexnet-2 --isa avx2 avx512 --passes forward
    python benchmarks/bench_kernels.py --shape 64x3x32x32 --out-channels 16 --kernel-size 3 \
        --padding 1 --pool 2 --dtype bfloat16 --layout channels_last --threads 1
    python benchmarks/bench_kernels.py --blocks                 # a summary of real networks

The first three time the operators pass by pass: each kernel that covers the block is forced by its
name, checked against a float64 reference (agreement.py) and timed by turns with the others; one
that does not cover it is listed with its reason. The gradients start from the general kernel's
codes. The last times whole calls from Python, forward and forward with backward, beside the stock
layers. Both report the fraction of the float32 multiply-add peak of the ISA, measured in the same
run with as many threads. --list prints all names.

Exit status: 0; 1 where a result was wrong; 2 for bad arguments.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from block_summary import count_turns as count_summary_turns
from block_summary import run_summary
from fusedcnn._ops import force
from kernel_options import Options, parse
from kernel_report import print_report
from ladder import count_turns as count_ladder_turns
from ladder import run_ladder
from limits import describe_machine, fma_gflops
from progress import Progress
from report import write_json


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = parse(arguments)
    report = run(options)
    print_report(report)
    if options.json:
        write_json(report, options.json)
    return 0 if report["status"] == "right" else 1


def run(options: Options) -> dict[str, Any]:
    """Measure everything that the options ask for.

    Returns:
        The report: plain values only, ready for JSON.
    """
    threads = sorted({one.threads for _, runs in options.blocks for one in runs})
    turns = count_summary_turns(options) if options.summary else count_ladder_turns(options)
    progress = Progress(len(options.isas) * len(threads) + turns)
    peaks = {}
    try:
        for isa in options.isas:
            for count in threads:
                progress.say(f"FMA peak of {isa}, {count} thread(s)")
                with force(isa):
                    peaks[isa, count] = fma_gflops(count)
                progress.advance()
        if options.summary:
            with force(options.isas[0]):
                rows = run_summary(options, peaks, progress)
        else:
            rows = run_ladder(options, peaks, progress)
    finally:
        progress.close()
    return {
        "status": "wrong" if any(row["status"] == "wrong" for row in rows) else "right",
        "options": {
            "summary": options.summary,
            "dtype": ", ".join(options.dtypes),
            "device": "cpu",
            "layouts": options.layouts,
            "passes": options.passes,
            "isas": options.isas,
            "kernels": options.kernels,
            "contenders": options.contenders,
            "min_time_s": options.min_time,
            "rounds": options.rounds,
        },
        "machine": describe_machine(torch.device("cpu")),
        "peaks": [
            {"isa": isa, "threads": count, "fma_gflops": rate}
            for (isa, count), rate in peaks.items()
        ],
        "blocks": [block.describe() for block, _ in options.blocks],
        "rows": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
