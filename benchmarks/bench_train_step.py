"""Where a training step's time goes, and what train_step and the optimizer add to the model.

    python benchmarks/bench_train_step.py                            # batch 4 and 64
    python benchmarks/bench_train_step.py --batch-sizes 256 --threads 2 --json steps.json

For SimpleCNN from stock layers and from fused blocks: the model alone (forward and gradients of all
parameters, from a given gradient of the logits), and ``fusedcnn.train_step`` with Adam as fused,
default (on the CPU: a loop over the parameters) and foreach implementation, timed by turns. What
the step adds is the difference of the medians. The split into zero_grad, forward, loss, backward
and optimizer comes from the same calls, made one by one with a clock read in between, which costs
some 0.1 us each.

Exit status: 0; 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fusedcnn
import torch
from arguments import Run, add_batch_arguments, add_timing_arguments, check_writable, pair_runs
from cases import CASES, Batch, Problem
from limits import describe_machine
from precision import PRECISIONS
from progress import Progress
from report import print_machine, print_table, write_json
from timing import summarize, time_by_turns
from torch import nn

CASE = next(case for case in CASES if case.name == "training")
OPTIMIZERS = {"fused": {"fused": True}, "default": {}, "foreach": {"foreach": True}}
PARTS = ("zero_grad", "forward", "loss", "backward", "optimizer", "rest")
MODELS = {"SimpleCNN": False, "FusedSimpleCNN": True}
SMALL_BATCH = 4  # see arguments.py
# Torch's idle threads stop spinning after some 4 ms: see contenders.py.
REST = 0.01


@dataclass(frozen=True)
class Options:
    """What to measure: see the command line's help."""

    runs: list[Run]
    min_time: float
    rounds: int
    json: Path | None


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = parse(arguments)
    report = run(options)
    print_report(report)
    if options.json:
        write_json(report, options.json)
    return 0


def parse(arguments: list[str] | None) -> Options:
    """Read the command line; on bad arguments, say what is wrong and exit with status 2."""
    parser = argparse.ArgumentParser(description="Split a training step's time.")
    add_batch_arguments(parser, [4, 64], SMALL_BATCH)
    add_timing_arguments(parser, min_time=0.5, rounds=10)
    values = vars(parser.parse_args(arguments))
    try:
        runs = pair_runs(values.pop("batch_sizes"), values.pop("threads"), SMALL_BATCH)
        if values["json"]:
            check_writable("--json", values["json"])
    except ValueError as error:
        parser.error(str(error))
    return Options(runs, **values)


def run(options: Options) -> dict[str, Any]:
    """Measure everything that the options ask for.

    Returns:
        The report: plain values only, ready for JSON.
    """
    turns = len(MODELS) * (1 + len(OPTIMIZERS)) * options.rounds + len(MODELS) * len(OPTIMIZERS)
    progress = Progress(len(options.runs) * turns)
    try:
        rows = [row for one in options.runs for row in _run(one, options, progress)]
    finally:
        progress.close()
    return {
        "options": {
            "runs": [one._asdict() for one in options.runs],
            "dtype": "float32",
            "device": "cpu",
            "min_time_s": options.min_time,
            "rounds": options.rounds,
        },
        "machine": describe_machine(torch.device("cpu")),
        "rows": rows,
    }


def _run(one: Run, options: Options, progress: Progress) -> list[dict[str, Any]]:
    """One row for each model and optimizer."""
    torch.set_num_threads(one.threads)
    problem = Problem(CASE, one.batch, PRECISIONS["float32"], torch.device("cpu"))
    batches = problem.batches(channels_last=False)
    steps: dict[str, Callable[[], object]] = {}
    splits: dict[str, Callable[[], list[int]]] = {}
    for model, fused in MODELS.items():
        steps[model] = _model_alone(problem.module(fused=fused), batches)
        for optimizer in OPTIMIZERS:
            module = problem.module(fused=fused)
            steps[f"{model} {optimizer}"] = _train_step(module, optimizer, batches)
            splits[f"{model} {optimizer}"] = _split_step(module, optimizer, batches)
    progress.say(f"batch {one.batch}: timing")
    seconds = time_by_turns(
        steps,
        dict.fromkeys(steps, REST),
        threads=one.threads,
        rounds=options.rounds,
        min_time=options.min_time,
        progress=progress.advance,
    )
    rows = []
    for model in MODELS:
        alone = summarize(seconds[model])
        for optimizer in OPTIMIZERS:
            name = f"{model} {optimizer}"
            progress.say(f"batch {one.batch}: {name}, split")
            step = summarize(seconds[name])
            rows.append(
                {
                    **one._asdict(),
                    "model": model,
                    "optimizer": optimizer,
                    "step": step,
                    "model_alone": alone,
                    "added_us": step["median_us"] - alone["median_us"],
                    "parts_us": _median_parts(splits[name], options.min_time),
                }
            )
            progress.advance()
    turns = sum(len(times) for times in seconds.values())
    progress.advance(len(steps) * options.rounds - turns)  # those that nobody took
    return rows


def _make_optimizer(module: nn.Module, name: str) -> torch.optim.Optimizer:
    # A learning rate of 0: see cases.make_call.
    return torch.optim.Adam(module.parameters(), lr=0.0, **OPTIMIZERS[name])


def _model_alone(module: nn.Module, batches: list[Batch]) -> Callable[[], object]:
    parameters = list(module.parameters())
    grad_logits = torch.randn_like(module(batches[0].input))
    rotating = itertools.cycle(batches)
    return lambda: torch.autograd.grad(module(next(rotating).input), parameters, grad_logits)


def _train_step(module: nn.Module, optimizer: str, batches: list[Batch]) -> Callable[[], object]:
    criterion, adam = nn.CrossEntropyLoss(), _make_optimizer(module, optimizer)
    rotating = itertools.cycle(batches)

    def step() -> object:
        batch = next(rotating)
        return fusedcnn.train_step(module, criterion, adam, batch.input, batch.target)

    return step


def _split_step(module: nn.Module, optimizer: str, batches: list[Batch]) -> Callable[[], list[int]]:
    """Return the calls of fusedcnn.train_step, one by one: nanoseconds of each of PARTS."""
    criterion, adam = nn.CrossEntropyLoss(), _make_optimizer(module, optimizer)
    rotating = itertools.cycle(batches)
    clock = time.perf_counter_ns

    def step() -> list[int]:
        batch = next(rotating)
        times = [clock()]
        adam.zero_grad(set_to_none=True)
        times.append(clock())
        logits = module(batch.input)
        times.append(clock())
        loss = criterion(logits, batch.target)
        times.append(clock())
        loss.backward()
        times.append(clock())
        adam.step()
        times.append(clock())
        loss.detach()
        times.append(clock())
        return [after - before for before, after in itertools.pairwise(times)]

    return step


def _median_parts(step: Callable[[], list[int]], min_time: float) -> dict[str, float]:
    """Microseconds of each part, medians over calls that take min_time together."""
    for _ in range(3):
        step()
    end = time.monotonic() + min_time
    times = [step()]
    while time.monotonic() < end:
        times.append(step())
    medians = (statistics.median(part) for part in zip(*times, strict=True))
    return dict(zip(PARTS, (1e-3 * nanoseconds for nanoseconds in medians), strict=True))


def print_report(report: dict[str, Any]) -> None:
    """Print everything that a person wants to know."""
    print_machine(report)
    header = ("model", "batch", "threads", "Adam", "step us", "model alone", "added", *PARTS)
    groups: dict[tuple[int, str], list[tuple[str, ...]]] = {}
    for row in report["rows"]:
        cells = (
            row["model"],
            str(row["batch"]),
            str(row["threads"]),
            row["optimizer"],
            f"{row['step']['median_us']:,.1f}",
            f"{row['model_alone']['median_us']:,.1f}",
            f"{row['added_us']:,.1f}",
            *(f"{row['parts_us'][part]:,.1f}" for part in PARTS),
        )
        groups.setdefault((row["batch"], row["model"]), []).append(cells)
    print_table(header, list(groups.values()))
    print(
        "Medians in microseconds. Added: step less model alone (forward and gradients of all "
        "parameters).\nThe parts are one step's calls, timed one by one; rest: loss.detach()."
    )


if __name__ == "__main__":
    sys.exit(main())
