"""``python -m fusedcnn bench``: a user's own model, before and after :func:`fusedcnn.fuse`."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
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
ESTIMATE_CALLS = 3
# Timing may take this many times the time that was asked for: warming up costs some, and so do
# calls longer than a turn. On a machine that is busy with something else it then ends early, but
# not before the quartiles of the rounds mean something.
PATIENCE = 4
ENOUGH_ROUNDS = 5


class BadInputError(Exception):
    """What the user gave cannot be measured; the message says why in one line."""


class Comparison(NamedTuple):
    """One row of the result: medians over the rounds."""

    what: str
    stock: float  # seconds, or bytes
    fused: float


def one_line(error: BaseException) -> str:
    """The class and the first line of an error's message."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


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
        from_file = where.endswith(".py")
        found: Any = _import_file(Path(where)) if from_file else importlib.import_module(where)
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
    if callable(found) and not isinstance(found, nn.Module):
        try:
            found = found()
        except Exception as error:
            raise BadInputError(
                f"model: expected {name!r} to need no arguments, got {one_line(error)}"
            ) from error
    if not isinstance(found, nn.Module):
        kind = type(found).__name__
        raise BadInputError(f"model: expected {name!r} to be or make an nn.Module, got {kind}")
    return found


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


def time_by_turns(
    steps: Mapping[str, Callable[[], Any]],
    threads: int,
    seconds: float,
    rounds: int = ROUNDS,
    turn: Callable[[str], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time every contender once a round, in a new order each round, so that drift hits all alike.

    On a CUDA device torch's Timer waits for the device.

    Args:
        steps: what to time, by contender.
        threads: of torch.
        seconds: for which each contender runs at least, all rounds together.
        rounds: fewer where turns take much longer than ``seconds`` says.
        turn: makes the context of a contender's turn; entering and leaving it are off the clock.

    Returns:
        Seconds per call, one value a round, of each contender that did not fail; and by name, why
        the others did.
    """
    timers = {
        name: Timer("step()", globals={"step": step}, num_threads=threads)
        for name, step in steps.items()
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    errors: dict[str, str] = {}

    def take_turn(name: str, calls: int) -> float:
        with turn(name):
            try:
                return timers[name].timeit(calls).mean  # warms up by itself
            except Exception as error:  # whatever a compiled or recorded call may raise
                errors[name] = one_line(error)
                del times[name]
                return 1.0

    estimates = {name: take_turn(name, ESTIMATE_CALLS) for name in steps}
    calls = {name: max(1, round(seconds / rounds / one)) for name, one in estimates.items()}
    order = list(steps)
    shuffle = random.Random(0).shuffle  # so that nobody always follows the same neighbour
    deadline = time.monotonic() + PATIENCE * seconds * len(steps)
    for done in range(rounds):
        if done >= ENOUGH_ROUNDS and time.monotonic() > deadline:
            break
        shuffle(order)
        for name in order:
            if name in times:
                values = times[name]
                values.append(take_turn(name, calls[name]))
    return times, errors


def fuse_and_check(model: nn.Module, inputs: list[Tensor]) -> tuple[nn.Module, FuseReport, float]:
    """Fuse a copy of the model, in its mode.

    Returns:
        The copy; what was fused or left alone; and the :func:`difference` of the two.

    Raises:
        BadInputError: the model refuses the inputs, returns no tensor, cannot compute in float64 or
            cannot be trained, or nothing in it is fused.
    """
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
        fused, report = fuse(model, report=True)
    if not any(row.fused for row in report):
        why = "; ".join(str(report).splitlines())
        raise BadInputError(f"model: expected something to fuse, found nothing: {why}")
    try:
        return fused, report, difference(model, fused, inputs, model.training)
    except Exception as error:
        what = "forward and backward" if model.training else "forward"
        raise BadInputError(
            f"model: expected one whose {what} run in float64 too, got {one_line(error)}"
        ) from error


def compare(
    models: dict[str, nn.Module],
    inputs: list[Tensor],
    threads: int,
    seconds: float,
    turn: Callable[[str], contextlib.AbstractContextManager[Any]],
) -> list[Comparison]:
    """Time both models by turns; in training mode count what they keep for the backward."""
    train = models["stock"].training
    if train:
        steps = {name: training_step(model, inputs) for name, model in models.items()}
    else:
        steps = {name: lambda model=model: model(*inputs) for name, model in models.items()}
    with torch.set_grad_enabled(train):
        times, errors = time_by_turns(steps, threads, seconds, turn=turn)
    if errors:
        raise BadInputError(f"model: expected it to run, got {next(iter(errors.values()))}")
    medians = {name: statistics.median(values) for name, values in times.items()}
    if not train:
        return [Comparison("forward", **medians)]
    kept = {name: kept_bytes(model, inputs) for name, model in models.items()}
    return [Comparison("training step", **medians), Comparison("kept for the backward", **kept)]


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
        BadInputError: see :func:`load_model`, :func:`fuse_and_check` and :func:`compare`.
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
    stocks = [copy.deepcopy(model).train(training) for training in (False, True)[: 1 + train]]
    checked = [fuse_and_check(stock, inputs) for stock in stocks]
    console = Console()
    for stock, (_, report, apart) in zip(stocks, checked, strict=True):
        mode = "training" if stock.training else "evaluation"
        console.print(f"{target} in {mode} mode", style="bold")
        for row in report:
            console.print(f"  {row}", markup=False, highlight=False, soft_wrap=True)
        what = "outputs and gradients" if stock.training else "outputs"
        console.print(f"  {what} of both, in float64: {apart:.1e} apart (relative)")
        if not apart <= TOLERANCE:
            console.print(f"the results differ by more than {TOLERANCE:.0e}: nothing was timed")
            return 1
    rows: list[Comparison] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("timing", total=2 * (1 + ROUNDS) * len(stocks))

        @contextlib.contextmanager
        def turn(_name: str) -> Iterator[None]:
            yield
            progress.advance(task)

        for stock, (fused, _, _) in zip(stocks, checked, strict=True):
            models = {"stock": stock, "fused": fused}
            rows += compare(models, inputs, threads, seconds, turn)
    sizes = ", ".join("x".join(map(str, shape)) for shape in shapes)
    name = str(dtype).removeprefix("torch.")
    _print_rows(console, rows, f"input {sizes}, {name}, {threads} thread{'s' * (threads > 1)}")
    return 0


def _print_rows(console: Any, rows: list[Comparison], title: str) -> None:
    from rich.table import Table

    table = Table(title=title)
    table.add_column("")
    for column in ("stock", "fused", "stock / fused"):
        table.add_column(column, justify="right")
    for what, *values in rows:
        if what.startswith("kept"):
            cells = [f"{1e-6 * value:,.3g} MB" for value in values]
        else:
            cells = [f"{1e6 * value:,.0f} us" for value in values]
        stock, fused = values
        table.add_row(what, *cells, f"{stock / fused:.2f}" if fused else "-")
    console.print(table)
