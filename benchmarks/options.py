"""The command line of all scripts. Everything that can be refused is refused here."""

from __future__ import annotations

import argparse
import ast
import os
import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from blocks import BLOCKS, CASES, MORE_CASES, Block
from contenders import CONTENDERS
from fusedcnn.bench import one_line
from timing import PRECISIONS, force_kernel

NAMES = {
    "cases": CASES | MORE_CASES, "blocks": BLOCKS, "contenders": CONTENDERS,
    "precisions": PRECISIONS,
}  # fmt: skip
# The images of a case are drawn, copied and computed in float64 too: some gigabytes at this size.
MAX_BATCH = 65536
CORES = len(os.sched_getaffinity(0))  # that this process may use
DEFAULT_THREADS = min(torch.get_num_threads(), CORES)


class Run(NamedTuple):
    """Images per call, and the threads that compute them."""

    batch: int
    threads: int


class Parser(argparse.ArgumentParser):
    """The options of all scripts, to which each adds its own.

    What is wrong is said in one line, and ends the program with status 2.
    """

    def __init__(self, description: str, *, min_time: float, rounds: int) -> None:
        super().__init__(description=description, allow_abbrev=False)
        # fmt: off
        add = self.add_argument
        add("--list", action="store_true", help=f"print all {', '.join(NAMES)}, and end")
        add("--batch-sizes", nargs="+", type=_integer(1, MAX_BATCH), metavar="N",
            help=f"images per call, 1 to {MAX_BATCH}")
        add("--threads", nargs="+", type=_integer(1, CORES), metavar="N",
            help=f"1 to {CORES} on this machine, for all batch sizes or one for each (default: 1 "
                 f"for few images, {DEFAULT_THREADS} for many)")
        add("--min-time", type=_seconds, default=min_time, metavar="S",
            help="seconds for which each contender is timed, all rounds together "
                 "(default: %(default)s)")
        add("--rounds", type=_integer(2, 1000), default=rounds, metavar="N",
            help="turns of each contender (default: %(default)s)")
        add("--time-limit", type=_seconds, metavar="S",
            help="begin nothing further after so many seconds; the report says what is missing")
        add("--json", type=_writable, metavar="FILE",
            help="write medians and quartiles as JSON, after every result")
        # fmt: on
        self.set_defaults(
            device=torch.device("cpu"), precisions=["float32"], contenders=None, isa=[], kernel=[]
        )

    def add_kernels(self) -> None:
        """Add what decides where and how everybody computes."""
        # fmt: off
        add = self.add_argument
        add("--device", type=_device, metavar="DEVICE", help="cpu, cuda or cuda:N (default: cpu)")
        add("--precision", "--dtype", dest="precisions", nargs="+", choices=PRECISIONS,
            metavar="PRECISION", help=f"of parameters and images: {', '.join(PRECISIONS)} (default:"
                                      " float32, in which nobody may round to tf32)")
        add("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME", help="see --list")
        add("--isa", nargs="+", metavar="ISA",
            help="instruction set of fusedcnn's kernels (default: the widest)")
        add("--kernel", nargs="+", metavar="KERNEL",
            help="of fusedcnn; `python -m fusedcnn info` lists these and instruction sets")
        # fmt: on

    def add_own_block(self) -> None:
        """Add what describes a block that --list lacks: see :meth:`own_block`."""
        # fmt: off
        add = self.add_argument_group("a block of your own").add_argument
        add("--shape", type=_shape, metavar="[Nx]CxHxW",
            help="of the input, such as 64x3x32x32; without N, --batch-sizes say how many images")
        add("--conv", type=_arguments("out_channels", "kernel_size", "stride", "padding"),
            metavar="ARGUMENTS",
            help="of torch.nn.Conv2d after in_channels, such as '16, 3, padding=1'")
        add("--pool", type=_arguments("kernel_size", "stride", "padding", "dilation"),
            metavar="ARGUMENTS", help="of torch.nn.MaxPool2d (default: 2)")
        # fmt: on

    def read(self, arguments: list[str] | None) -> Namespace:
        """Read the command line; None stands for sys.argv's."""
        options = self.parse_args(arguments)
        if options.list:
            for title, entries in NAMES.items():
                print(f"{title}:")
                for name, one in entries.items():
                    print(f"  {name:<16} {one.title}")
            self.exit()
        device = options.device
        options.precisions = [PRECISIONS[name] for name in options.precisions]
        for one in options.precisions:
            if one.tf32 and device.type != "cuda":
                self.error(f"argument --precision: {one.name} needs --device cuda, got {device}")
            if device.type == "cuda" and torch.cuda.get_device_capability() < one.capability:
                self.error(
                    f"argument --precision: {one.name} needs a GPU of compute capability "
                    f"{one.capability}, {device} has {torch.cuda.get_device_capability()}"
                )
        if options.isa and device.type != "cpu":
            self.error(f"argument --isa: expected none on {device}, got {options.isa}")
        for isa in options.isa or [None]:
            for kernel in options.kernel or [""]:
                try:
                    with force_kernel(device, kernel, isa):
                        pass
                except (ValueError, RuntimeError) as error:  # the latter: CUDA kernels not loaded
                    self.error(str(error))
        for name in options.contenders or ():
            if why_not := CONTENDERS[name].why_not_on(device.type):
                self.error(f"argument --contenders: {name} cannot run on {device}: {why_not}")
        return options

    def expect_one(self, options: Namespace, *names: str) -> None:
        """Refuse several values of options of which the script takes one."""
        for name in names:
            if len(getattr(options, name)) > 1:
                self.error(f"argument --{name}: expected one here, got {getattr(options, name)}")

    def pair_runs(self, options: Namespace, batch_sizes: list[int], small_batch: int) -> list[Run]:
        """Put --batch-sizes and --threads together, each pair once.

        Args:
            options: of the command line.
            batch_sizes: where none were asked for.
            small_batch: up to so many images are computed on one thread unless asked otherwise, as
                where requests are served one by one. On a GPU one thread launches any batch.
        """
        batch_sizes = options.batch_sizes or batch_sizes
        threads = options.threads or [
            1 if batch <= small_batch or options.device.type == "cuda" else DEFAULT_THREADS
            for batch in batch_sizes
        ]
        if len(threads) == 1:
            threads = threads * len(batch_sizes)
        if len(threads) != len(batch_sizes):
            self.error(
                f"argument --threads: expected 1 number or {len(batch_sizes)}, one for each of "
                f"--batch-sizes, got {len(threads)}"
            )
        return list(dict.fromkeys(map(Run, batch_sizes, threads)))

    def own_block(self, options: Namespace) -> Block:
        """Return the block that --shape, --conv and --pool describe.

        --shape may say how many images.
        """
        if options.names:
            self.error(f"argument --shape: expected no block names, got {options.names}")
        if options.conv is None:
            self.error("argument --conv: needed with --shape")
        *batch, channels, height, width = options.shape
        if batch and options.batch_sizes:
            self.error("argument --batch-sizes: not allowed where --shape has four sizes")
        options.batch_sizes = batch or options.batch_sizes
        name = f"{channels}x{height}x{width}"
        pool = options.pool or {"kernel_size": 2}
        block = Block(name, "own sizes", (channels, height, width), options.conv, pool)
        try:
            block.fused()(torch.empty(0, *block.image))  # raises where they do not go together
        except (RuntimeError, ValueError, TypeError) as error:
            self.error(f"arguments --shape, --conv, --pool: {one_line(error)}")
        return block


def _integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or not low <= int(text) <= high:
            raise ArgumentTypeError(f"expected an integer from {low} to {high}, got {text!r}")
        return int(text)

    return parse


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 3600:
        raise ArgumentTypeError(f"expected seconds, over 0 and up to 3600, got {text!r}")
    return value


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2,3}", text):
        raise ArgumentTypeError(
            f"expected sizes over 0 as CxHxW or NxCxHxW, such as 64x3x32x32, got {text!r}"
        )
    return tuple(map(int, text.split("x")))


def _arguments(*names: str) -> Callable[[str], dict[str, Any]]:
    """Return an argument type: a call's arguments, the positional ones under these names."""

    def parse(text: str) -> dict[str, Any]:
        try:
            call = ast.parse(f"layer({text})", mode="eval").body
            values = {one.arg: ast.literal_eval(one.value) for one in call.keywords}
            positional = [ast.literal_eval(value) for value in call.args]
            return dict(zip(names[: len(positional)], positional, strict=True)) | values
        except (SyntaxError, ValueError, AttributeError):
            raise ArgumentTypeError(
                f"expected arguments such as '16, 3, padding=1', got {text!r}"
            ) from None

    return parse


def _writable(text: str) -> Path:
    try:
        open(text, "a").close()  # fails here or not at all
    except OSError as error:
        raise ArgumentTypeError(f"cannot write {text!r}: {error.strerror}") from None
    return Path(text)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ArgumentTypeError(f"got {text!r}, but torch sees {count} CUDA devices here")
        torch.cuda.set_device(device.index or 0)  # streams, graphs and waiting are of this one
    return device
