"""What the benchmarks' command lines have in common. Everything is refused before the run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from limits import available_cores

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# The images of a case are drawn, copied and computed in float64 too: some gigabytes at this size.
MAX_BATCH = 65536


class Run(NamedTuple):
    """Images per call, and the threads that compute them."""

    batch: int
    threads: int


def add_batch_arguments(
    parser: argparse.ArgumentParser,
    batch_sizes: list[int] | None,
    small_batch: int,
    default: str = "1 and the block's own, see --list",
) -> None:
    """Add --batch-sizes and --threads, which :func:`pair_runs` puts together.

    Args:
        parser: to add to.
        batch_sizes: the default, or None where the caller chooses.
        small_batch: up to so many images are computed on one thread unless asked otherwise, as
            where requests are served one by one.
        default: what the help says of the caller's choice.
    """
    cores = available_cores()
    if batch_sizes:
        default = " ".join(map(str, batch_sizes))
    # fmt: off
    parser.add_argument(
        "--batch-sizes", nargs="+", type=integer(1, MAX_BATCH), default=batch_sizes, metavar="N",
        help=f"images per call, 1 to {MAX_BATCH} (default: {default})")
    parser.add_argument(
        "--threads", nargs="+", type=integer(1, cores), metavar="N",
        help=f"1 to {cores} on this machine, for all batch sizes or one for each (default: 1 for "
             f"batches of up to {small_batch}, {default_threads()} for larger ones)")
    # fmt: on


def add_timing_arguments(parser: argparse.ArgumentParser, *, min_time: float, rounds: int) -> None:
    """Add --min-time, --rounds and --json."""
    # fmt: off
    parser.add_argument(
        "--min-time", type=seconds, default=min_time, metavar="S",
        help="seconds for which each contender of a case is timed, all rounds together "
             "(default: %(default)s)")
    parser.add_argument(
        "--rounds", type=integer(2, 1000), default=rounds, metavar="N",
        help="turns of each contender (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    # fmt: on


def default_threads() -> int:
    """Threads of a large batch where none are asked for."""
    return min(torch.get_num_threads(), available_cores())


def pair_runs(batch_sizes: list[int], threads: list[int] | None, small_batch: int) -> list[Run]:
    """Put --batch-sizes and --threads together, each pair once.

    Args:
        batch_sizes: images per call.
        threads: one number, or one for each batch size; None: see :func:`add_batch_arguments`.
        small_batch: see there.

    Raises:
        ValueError: as many threads as neither one nor the batch sizes.
    """
    if threads is None:
        threads = [1 if batch <= small_batch else default_threads() for batch in batch_sizes]
    elif len(threads) == 1:
        threads = threads * len(batch_sizes)
    if len(threads) != len(batch_sizes):
        raise ValueError(
            f"argument --threads: expected 1 number or {len(batch_sizes)}, one for each of "
            f"--batch-sizes, got {len(threads)}"
        )
    return list(dict.fromkeys(map(Run, batch_sizes, threads)))


def integer(low: int, high: int) -> Callable[[str], int]:
    """Return an argument type: integers from low to high."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"expected an integer from {low} to {high}, got {text!r}"
            )
        return value

    return parse


def seconds(text: str) -> float:
    """Argument type: a time."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"expected seconds, over 0 and up to 3600, got {text!r}")
    return value


def check_writable(argument: str, path: Path) -> None:
    """Raise before the run what would fail after it; leaves the file as it is."""
    existed = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise ValueError(
            f"argument {argument}: cannot write {str(path)!r}: {error.strerror}"
        ) from None
    if not existed:
        path.unlink()
