"""Kernel by kernel: every pass of a block, each kernel forced by name, timed by turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import fusedcnn
import torch
from agreement import describe
from arguments import DTYPES, Run
from blocks import Block
from fusedcnn._ops import _C, below_autograd, force
from kernel_options import Options
from passes import PASSES, BlockCalls, Pass
from precision import of_dtype
from progress import Progress
from timing import summarize, time_by_turns


@dataclass(frozen=True)
class Rung:
    """One kernel of one ISA."""

    isa: str
    kernel: str


def rungs(of_pass: Pass, options: Options) -> list[Rung]:
    """The kernels that are asked for, those of :func:`fusedcnn.build_info` in its order."""
    if options.kernels:  # listed as not covered where an ISA has no such kernel
        return [Rung(isa, name) for isa in options.isas for name in options.kernels]
    return [
        Rung(isa, row["name"])
        for isa in options.isas
        for row in fusedcnn.build_info()["kernels"]
        if row["isa"] == isa and row["pass"] == of_pass.kernels
    ]


def count_turns(options: Options) -> int:
    """Steps of the progress bar."""
    kernels = sum(len(rungs(p, options)) for p in PASSES if p.name in options.passes)
    runs = sum(len(runs) for _, runs in options.blocks)
    return runs * len(options.dtypes) * len(options.layouts) * kernels * (1 + options.rounds)


def run_ladder(
    options: Options, peaks: dict[tuple[str, int], float], progress: Progress
) -> list[dict[str, Any]]:
    """Time everything that the options ask for.

    Args:
        options: what to measure.
        peaks: float32 multiply-add rates in GFLOP/s, by ISA and threads.
        progress: told about it.

    Returns:
        One row for each kernel, pass, block, run, dtype and layout. ``status`` is ``"timed"``,
        ``"not covered"`` or ``"wrong"``, the latter two with ``reason``.
    """
    rows = []
    for block, runs in options.blocks:
        for run in runs:
            torch.set_num_threads(run.threads)
            for dtype in options.dtypes:
                for layout in options.layouts:
                    head = {"block": block.name, **run._asdict(), "dtype": dtype, "layout": layout}
                    progress.say(f"{block.name}, batch {run.batch}: operands")
                    precision = of_dtype(DTYPES[dtype])
                    calls = BlockCalls(block, run.batch, precision, layout == "channels_last")
                    for of_pass in PASSES:
                        if of_pass.name in options.passes:
                            progress.say(f"{block.name}, batch {run.batch}: {of_pass.name}")
                            found = _run_pass(calls, block, of_pass, run, options, progress)
                            rows += [head | row for row in found]
    for row in rows:
        if row["status"] == "timed":
            row |= _rates(row, peaks[row["isa"], row["threads"]])
    return rows


def _run_pass(
    calls: BlockCalls,
    block: Block,
    of_pass: Pass,
    run: Run,
    options: Options,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Check each kernel of a pass, then time those that cover the block and are right."""
    rows, timed = [], {}
    selected = {isa: _selected(calls, of_pass, isa) for isa in options.isas}
    candidates = rungs(of_pass, options)
    for rung in candidates:
        row = {
            "pass": of_pass.name,
            **vars(rung),
            "selected": selected[rung.isa] == rung.kernel,
            "flops": block.flops * run.batch,
        }
        rows.append(row)
        row |= _check(calls, of_pass, rung)
        if row["status"] == "right":
            timed[f"{rung.isa} {rung.kernel}"] = (rung, row)
        progress.advance()

    def force_kernel(name: str) -> None:
        rung, _ = timed[name]
        _C.force(rung.isa, rung.kernel)

    turns = 0
    if timed:
        # `force` puts back what was forced before; the turns change it.
        with torch.no_grad(), below_autograd(), force():
            seconds = time_by_turns(
                {name: calls.step(of_pass) for name in timed},
                dict.fromkeys(timed, 0.0),  # all share one pool of threads
                threads=run.threads,
                rounds=options.rounds,
                min_time=options.min_time,
                progress=progress.advance,
                before_turn=force_kernel,
            )
        for name, (_, row) in timed.items():
            row |= {"status": "timed", **summarize(seconds[name])}
        turns = sum(len(times) for times in seconds.values())
    progress.advance(len(candidates) * options.rounds - turns)  # those that nobody took
    return rows


def _selected(calls: BlockCalls, of_pass: Pass, isa: str) -> str:
    """The kernel that selection chooses, by letting it choose."""
    with force(isa), below_autograd():
        calls.step(of_pass)()
    return _C.last_selected()[of_pass.kernels]


def _check(calls: BlockCalls, of_pass: Pass, rung: Rung) -> dict[str, Any]:
    try:
        with force(rung.isa, rung.kernel):
            agreement = calls.check(of_pass)
    except RuntimeError as error:
        reason = str(error).partition(f"no {of_pass.kernels} kernel covers this call: ")[2]
        if not reason:
            raise
        return {"status": "not covered", "reason": reason.removeprefix(f"{rung.kernel}: ")}
    reason = describe(agreement)
    if reason:
        return {"status": "wrong", "reason": reason, "agreement": agreement}
    return {"status": "right", "agreement": agreement}


def peak(fma_gflops: float, dtype: str) -> float:
    """The multiply-add peak in a dtype.

    Half types accumulate in float32, and a vector holds half as many float64.
    """
    return fma_gflops / 2 if dtype == "float64" else fma_gflops


def _rates(row: dict[str, Any], fma_gflops: float) -> dict[str, float]:
    gflops = 1e-3 * row["flops"] / row["median_us"]
    return {
        "ns_per_image": 1e3 * row["median_us"] / row["batch"],
        "gflops": gflops,
        "peak_fraction": gflops / peak(fma_gflops, row["dtype"]),
    }
