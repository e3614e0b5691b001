"""Where a training step's time goes, and what train_step and the optimizer add to the model.

    python benchmarks/bench_train_step.py                            # batch 4 and 64
    python benchmarks/bench_train_step.py --batch-sizes 256 --threads 2 --json steps.json

For SimpleCNN from stock layers and from fused blocks: the model alone (forward and gradients of all
parameters, from a given gradient of the logits), and ``fusedcnn.train_step`` with Adam as fused,
default (on the CPU: a loop over the parameters) and foreach implementation, timed by turns. What
the step adds is the difference of the medians. The split into zero_grad, forward, loss, backward
and optimizer comes from the same calls, made one by one with a clock read in between, which costs
some 0.1 us each.

Needs ``fusedcnn[bench]``. Exit status: 0; 1 where something failed or time was over; 2 for bad
arguments.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import fusedcnn
import torch
from blocks import CASES, Batch, Problem, make_optimizer
from options import Parser, Run
from report import Report
from timing import PRECISIONS, Clock, rest_after, time_rows
from torch import nn

OPTIMIZERS = {"fused": {"fused": True}, "default": {}, "foreach": {"foreach": True}}
PARTS = ("zero_grad", "forward", "loss", "backward", "optimizer", "rest")
MODELS = {"SimpleCNN": False, "FusedSimpleCNN": True}
SMALL_BATCH = 4
REST = 0.01  # seconds: see timing.rest_after


def main(arguments: list[str] | None = None) -> int:
    return run(parse(arguments)).finish()


def parse(arguments: list[str] | None) -> Namespace:
    parser = Parser("Split a training step's time.", min_time=0.5, rounds=10)
    options = parser.read(arguments)
    options.runs = parser.pair_runs(options, [4, 64], SMALL_BATCH)
    return options


def run(options: Namespace) -> Report:
    report = Report(options, len(options.runs))
    for run in options.runs:
        head = {"case": "training", **run._asdict()}
        if report.begin(head):
            report.add(head, _split(run, options, report.say))
    return report


def _split(run: Run, options: Namespace, say: Callable[[str], object]) -> dict[str, Any]:
    """Time each model alone, and its step with each optimizer, whole and in parts."""
    torch.set_num_threads(run.threads)
    problem = Problem(CASES["training"], run.batch, PRECISIONS["float32"], options.device)
    batches = problem.batches()
    criterion = nn.CrossEntropyLoss()
    steps: dict[str, Callable[[], object]] = {}
    parts: dict[str, Callable[[], list[int]]] = {}
    for model, fused in MODELS.items():
        steps[f"{model} alone"] = _model_alone(problem.module(fused=fused), batches)
        for name, how in OPTIMIZERS.items():
            module = problem.module(fused=fused)
            training = (module, criterion, make_optimizer(module, **how), itertools.cycle(batches))
            steps[f"{model} {name}"] = functools.partial(_whole_step, *training)
            parts[f"{model} {name}"] = functools.partial(_step_in_parts, *training)
    rows = [{"name": name, "status": "right"} for name in steps]
    say("timing")
    time_rows(
        rows,
        steps,
        Clock(run.threads, options.min_time, options.rounds),
        lambda _: rest_after(options.device, REST),
    )
    medians = {row["name"]: row["median_us"] for row in rows if row["status"] == "timed"}
    for row in rows:
        name = row["name"]
        alone = medians.get(f"{name.split()[0]} alone")
        if name in parts and name in medians and alone:
            say(f"{name}, split")
            row["parts_us"] = {"added": medians[name] - alone} | _median_parts(
                parts[name], options.min_time
            )
    status = "timed" if all(row["status"] == "timed" for row in rows) else "incomplete"
    return {"status": status, "rows": rows}


def _model_alone(module: nn.Module, batches: list[Batch]) -> Callable[[], object]:
    parameters = list(module.parameters())
    grad_logits = torch.randn_like(module(batches[0].input))
    rotating = itertools.cycle(batches)
    return lambda: torch.autograd.grad(module(next(rotating).input), parameters, grad_logits)


def _whole_step(module, criterion, optimizer, rotating) -> None:
    fusedcnn.train_step(module, criterion, optimizer, *next(rotating))


def _step_in_parts(module, criterion, optimizer, rotating) -> list[int]:
    """The calls of fusedcnn.train_step, one by one: nanoseconds of each of PARTS."""
    images, labels = next(rotating)
    clock = time.perf_counter_ns
    times = [clock()]
    optimizer.zero_grad(set_to_none=True)
    times.append(clock())
    logits = module(images)
    times.append(clock())
    loss = criterion(logits, labels)
    times.append(clock())
    loss.backward()
    times.append(clock())
    optimizer.step()
    times.append(clock())
    loss.detach()
    times.append(clock())
    return [after - before for before, after in itertools.pairwise(times)]


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


if __name__ == "__main__":
    sys.exit(main())
