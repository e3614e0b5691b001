"""``python -m fusedcnn bench``: a user's own model, before and after :func:`fusedcnn.fuse`."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.benchmark import Timer

from fusedcnn.fuse import FuseReport, fuse

# The two models are compared in float64, where rounding explains next to nothing: sums of a million
# terms in another order differ by 1e-10 of their size.
TOLERANCE = 1e-8
ROUNDS = 9
# Calls that warm up and give the first estimate.
ESTIMATE_CALLS = 2


class BadInputError(Exception):
    """What the user gave cannot be measured; the message says why in one line."""


class Comparison(NamedTuple):
    """One row of the result: medians over the rounds."""

    what: str
    stock: float  # seconds, or bytes
    fused: float


def one_line(error: BaseException) -> str:
    """The class and the first line of an error's message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def load_model(target: str) -> nn.Module:
    """Make the model that a command line names.

    Args:
        target: ``package.module:Name`` or ``path/to/file.py:Name``, where Name is a class or a
            function that needs no arguments, or a module; dots lead into attributes.

    Raises:
        BadInputError: no such module or name, it cannot be made, or it is no ``nn.Module``.
    """
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name:
        raise BadInputError(f"model: expected package.module:Name or file.py:Name, got {target!r}")
    sys.path.insert(0, os.getcwd())  # as for `python -m`
    try:
        found: Any = _import_file(Path(where)) if where.endswith(".py") else _import(where)
    except FileNotFoundError:
        raise BadInputError(f"model: expected an existing file, got {where!r}") from None
    except (Exception, SystemExit) as error:
        raise BadInputError(
            f"model: expected {where!r} to import, got {one_line(error)}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise BadInputError(f"model: expected {part!r} in {where!r}, which has no such name")
        found = getattr(found, part)
    if not isinstance(found, nn.Module):
        if not callable(found):
            kind = type(found).__name__
            raise BadInputError(
                f"model: expected {name!r} to be a module or to make one, got {kind}"
            )
        try:
            found = found()
        except Exception as error:
            raise BadInputError(
                f"model: expected {name!r} to need no arguments, got {one_line(error)}"
            ) from error
    if not isinstance(found, nn.Module):
        kind = type(found).__name__
        raise BadInputError(f"model: expected {name!r} to make a torch.nn.Module, got {kind}")
    return found


def _import(name: str) -> Any:
    return importlib.import_module(name)


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(path)
    sys.path.insert(0, str(path.resolve().parent))  # for what stands beside it
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors of whatever a model returns."""
    leaves = pytree.tree_leaves(output)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def training_step(model: nn.Module, inputs: list[Tensor]) -> Callable[[], Any]:
    """zero_grad, forward, a loss, backward and an optimizer's step that moves nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        sum(t.square().mean() for t in tensors_of(model(*inputs))).backward()
        optimizer.step()

    return step


def kept_bytes(model: nn.Module, inputs: list[Tensor]) -> int:
    """Bytes of the distinct storages that a forward saves for its backward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor  # keeps the storage alive, so that no address comes twice

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs)
    del output
    return sum(size for pointer, size in saved.items() if pointer not in parameters)


def difference(stock: nn.Module, fused: nn.Module, inputs: list[Tensor], train: bool) -> float:
    """The largest difference in float64, relative to the largest value of the same tensor.

    Of the outputs, and with ``train`` of the parameters' gradients; both models draw the same
    random numbers.
    """
    first, second = (_results(model, inputs, train) for model in (stock, fused))
    if first.keys() != second.keys():
        return float("inf")
    largest = {name: _largest(value) for name, value in first.items()}
    # Some gradients are rounding and nothing else: those of a bias before a normalisation.
    least = 1e-6 * max(largest.values())
    worst = 0.0
    for name, value in first.items():
        # Equal values that are not finite have no difference.
        apart = (value - second[name]).masked_fill(value == second[name], 0).abs().max().item()
        worst = max(worst, apart / (max(largest[name], least) or 1.0))
    return worst


def _results(model: nn.Module, inputs: list[Tensor], train: bool) -> dict[str, Tensor]:
    model = copy.deepcopy(model).double()
    torch.manual_seed(0)
    with torch.set_grad_enabled(train):
        outputs = tensors_of(model(*(t.double() for t in inputs)))
    results = {f"output {i}": t for i, t in enumerate(outputs)}
    if train:
        sum(t.square().mean() for t in outputs).backward()
        results |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return results


def _largest(tensor: Tensor) -> float:
    return tensor.detach().nan_to_num(0, 0, 0).abs().max().item()


def seconds_by_turns(
    steps: dict[str, Callable[[], Any]], threads: int, seconds: float, tick: Callable[[], None]
) -> dict[str, float]:
    """Median seconds of a call; every contender runs in every round, so that drift hits all."""
    timers = {
        n: Timer("step()", globals={"step": s}, num_threads=threads) for n, s in steps.items()
    }
    calls = {
        name: max(1, round(seconds / ROUNDS / timer.timeit(ESTIMATE_CALLS).mean))
        for name, timer in timers.items()
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            times[name].append(timer.timeit(calls[name]).mean)
            tick()
    return {name: statistics.median(values) for name, values in times.items()}


class Bench:
    """One model in one mode, stock and fused.

    Args:
        model: in training or evaluation mode, in the dtype that is to be measured.
        inputs: what it is called with.

    Raises:
        BadInputError: the model refuses the inputs, returns no tensor, or nothing in it is fused.
    """

    def __init__(self, model: nn.Module, inputs: list[Tensor]) -> None:
        self.stock, self.inputs = model, inputs
        shapes = ", ".join(str(list(t.shape)) for t in inputs)
        try:
            with torch.no_grad():
                outputs = tensors_of(model(*inputs))
        except Exception as error:
            raise BadInputError(
                f"input: expected shapes that the model takes, got {shapes}: {one_line(error)}"
            ) from error
        if not outputs:
            raise BadInputError("model: expected floating-point tensors from forward, got none")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing was fused is an error here
            self.fused, self.report = fuse(model, report=True)
        if not any(row.fused for row in self.report):
            why = "; ".join(str(self.report).splitlines())
            raise BadInputError(f"model: expected something to fuse, found nothing: {why}")

    @property
    def training(self) -> bool:
        """Whether this is a measurement of training."""
        return self.stock.training

    def check(self) -> float:
        """How far the two models' results are apart; see :func:`difference`."""
        return difference(self.stock, self.fused, self.inputs, self.training)

    def compare(self, threads: int, seconds: float, tick: Callable[[], None]) -> list[Comparison]:
        """Time both models by turns; in training mode count what they keep for the backward."""
        models = {"stock": self.stock, "fused": self.fused}
        if not self.training:
            with torch.no_grad():
                steps = {n: lambda m=m: m(*self.inputs) for n, m in models.items()}
                return [Comparison("forward", **seconds_by_turns(steps, threads, seconds, tick))]
        steps = {n: training_step(m, self.inputs) for n, m in models.items()}
        times = seconds_by_turns(steps, threads, seconds, tick)
        kept = {n: kept_bytes(m, self.inputs) for n, m in models.items()}
        return [Comparison("training step", **times), Comparison("kept for the backward", **kept)]


def run(
    target: str,
    shapes: list[list[int]],
    dtype: torch.dtype,
    train: bool,
    threads: int,
    seconds: float,
) -> int:
    """Measure and print; returns the exit status, 1 where the results differ.

    Raises:
        BadInputError: see :class:`Bench` and :func:`load_model`.
    """
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        raise BadInputError("bench: expected rich, got no such package: pip install rich") from None
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = load_model(target)
    try:
        model = model.to(dtype)
    except Exception as error:
        raise BadInputError(
            f"dtype: expected one that the model takes, got {one_line(error)}"
        ) from error
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    benches = [Bench(copy.deepcopy(model).eval(), inputs)]
    if train:
        benches.append(Bench(copy.deepcopy(model).train(), inputs))

    console = Console()
    for bench in benches:
        mode = "training" if bench.training else "evaluation"
        console.print(f"{target} in {mode} mode", style="bold")
        _print_report(console, bench.report)
        apart = bench.check()
        what = "outputs and gradients" if bench.training else "outputs"
        console.print(f"  {what} of both, in float64: {apart:.1e} apart (relative)")
        if not apart <= TOLERANCE:
            console.print(f"the results differ by more than {TOLERANCE:.0e}: nothing was timed")
            return 1
    rows: list[Comparison] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("timing", total=2 * ROUNDS * len(benches))
        for bench in benches:
            rows += bench.compare(threads, seconds, lambda: progress.advance(task))
    _print_rows(console, rows, shapes, dtype, threads)
    return 0


def _print_report(console: Any, report: FuseReport) -> None:
    for row in report:
        console.print(f"  {row}", markup=False, highlight=False, soft_wrap=True)


def _print_rows(
    console: Any, rows: list[Comparison], shapes: list[list[int]], dtype: torch.dtype, threads: int
) -> None:
    from rich.table import Table

    sizes = ", ".join("x".join(map(str, shape)) for shape in shapes)
    name = str(dtype).removeprefix("torch.")
    table = Table(title=f"input {sizes}, {name}, {threads} thread{'s' * (threads > 1)}")
    table.add_column("")
    for column in ("stock", "fused", "stock / fused"):
        table.add_column(column, justify="right")
    for row in rows:
        unit, scale = ("MB", 1e-6) if row.what.startswith("kept") else ("us", 1e6)
        values = (f"{scale * value:,.3g} {unit}" for value in (row.stock, row.fused))
        if unit == "us":
            values = (f"{scale * value:,.0f} {unit}" for value in (row.stock, row.fused))
        table.add_row(row.what, *values, f"{row.stock / row.fused:.2f}" if row.fused else "-")
    console.print(table)
