"""The command line of all scripts. Everything that can be refused is refused here."""

from __future__ import annotations

import argparse
import ast
import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fusedcnn
import torch
from blocks import BLOCKS, CASES, Block
from contenders import CONTENDERS
from timing import PRECISIONS, Clock, Precision, available_cores, first_line, force_kernel

# The images of a case are drawn, copied and computed in float64 too: some gigabytes at this size.
MAX_BATCH = 65536


class Run(NamedTuple):
    """Images per call, and the threads that compute them."""

    batch: int
    threads: int


class Options(argparse.Namespace):
    """The checked arguments under their names, ``device`` and ``precisions`` as objects."""

    def pair_runs(self, batch_sizes: list[int], small_batch: int) -> list[Run]:
        """Put --batch-sizes and --threads together, each pair once.

        Args:
            batch_sizes: where none were asked for.
            small_batch: up to so many images are computed on one thread unless asked otherwise, as
                where requests are served one by one. On a GPU one thread launches any batch.
        """
        batch_sizes = self.batch_sizes or batch_sizes
        threads = self.threads or [
            1 if batch <= small_batch or self.device.type == "cuda" else _default_threads()
            for batch in batch_sizes
        ]
        if len(threads) == 1:
            threads = threads * len(batch_sizes)
        if len(threads) != len(batch_sizes):
            raise ValueError(
                f"argument --threads: expected 1 number or {len(batch_sizes)}, one for each of "
                f"--batch-sizes, got {len(threads)}"
            )
        return list(dict.fromkeys(map(Run, batch_sizes, threads)))

    def clock(self, threads: int) -> Clock:
        """How long each contender of a race is timed."""
        return Clock(threads, self.rounds, self.min_time)

    def expect_one(self, *names: str) -> None:
        """Refuse several values of options of which the script takes one."""
        for name in names:
            if len(getattr(self, name)) > 1:
                raise ValueError(f"argument --{name}: expected one here, got {getattr(self, name)}")


class Parser(argparse.ArgumentParser):
    """The options of all scripts, to which each adds its own."""

    def __init__(self, description: str, *, min_time: float, rounds: int) -> None:
        super().__init__(description=description, allow_abbrev=False)
        cores = available_cores()
        # fmt: off
        add = self.add_argument
        add("--list", action="store_true", help="print all names that can be asked for, and end")
        add("--batch-sizes", nargs="+", type=_integer(1, MAX_BATCH), metavar="N",
            help=f"images per call, 1 to {MAX_BATCH}")
        add("--threads", nargs="+", type=_integer(1, cores), metavar="N",
            help=f"1 to {cores} on this machine, for all batch sizes or one for each (default: 1 "
                 f"for few images, {_default_threads()} for many)")
        add("--min-time", type=_seconds, default=min_time, metavar="S",
            help="seconds for which each contender is timed, all rounds together "
                 "(default: %(default)s)")
        add("--rounds", type=_integer(2, 1000), default=rounds, metavar="N",
            help="turns of each contender (default: %(default)s)")
        add("--time-limit", type=_seconds, metavar="S",
            help="begin nothing further after so many seconds; the report says what is missing")
        add("--json", type=Path, metavar="FILE",
            help="write medians and quartiles as JSON, after every result")
        # fmt: on
        self.set_defaults(device="cpu", precisions=["float32"], contenders=None, isa=[], kernel=[])

    def add_kernels(self) -> None:
        """Add what decides where and how everybody computes."""
        # fmt: off
        add = self.add_argument
        add("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cpu)")
        add("--precision", "--dtype", dest="precisions", nargs="+", choices=PRECISIONS,
            metavar="PRECISION", help=f"of parameters and images: {', '.join(PRECISIONS)} (default:"
                                      " float32, in which nobody may round to tf32)")
        add("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME", help="see --list")
        add("--isa", nargs="+", metavar="ISA",
            help="instruction set of fusedcnn's kernels; see --list (default: the widest)")
        add("--kernel", nargs="+", metavar="KERNEL", help="of fusedcnn; see --list")
        # fmt: on

    def add_own_block(self) -> None:
        """Add what describes a block that --list lacks: see :func:`own_block`."""
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

    def read(self, arguments: list[str] | None, finish: Callable[[Options], object]) -> Options:
        """Read the command line; on bad arguments, say what is wrong and exit with status 2.

        Args:
            arguments: None for sys.argv's.
            finish: completes the script's own options; raises ValueError.
        """
        options = self.parse_args(arguments, namespace=Options())
        if options.list:
            _print_list()
            self.exit()
        try:
            options.device = _device(options.device)
            options.precisions = [_precision(p, options.device) for p in options.precisions]
            _check_names(options)
            finish(options)
            if options.json:
                options.json.open("a").close()  # fails here or not at all
        except (ValueError, RuntimeError) as error:  # the latter: kernels that are not loaded
            self.error(str(error))
        except OSError as error:
            self.error(f"argument --json: cannot write {str(options.json)!r}: {error.strerror}")
        return options


def own_block(options: Options) -> Block:
    """Return the block that --shape, --conv and --pool describe; --shape may say how many images.

    Raises:
        ValueError: one is missing, or they do not go together.
    """
    if options.names:
        raise ValueError(f"argument --shape: expected no block names, got {options.names}")
    if options.conv is None:
        raise ValueError("argument --conv: needed with --shape")
    *batch, channels, height, width = options.shape
    if batch and options.batch_sizes:
        raise ValueError("argument --batch-sizes: not allowed where --shape has four sizes")
    options.batch_sizes = batch or options.batch_sizes
    name = f"{channels}x{height}x{width}"
    pool = options.pool or {"kernel_size": 2}
    try:
        block = Block(name, "own sizes", (channels, height, width), options.conv, pool)
        _ = block.output, block.fused()  # raise where the sizes do not go together
    except (ArithmeticError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        text = "a stride of 0" if isinstance(error, ZeroDivisionError) else first_line(error)
        raise ValueError(f"arguments --shape, --conv, --pool: {text}") from None
    return block


# ---- types and checks ----------------------------------------------------------------------------


def _default_threads() -> int:
    return min(torch.get_num_threads(), available_cores())


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


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"argument --device: expected cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(
                f"argument --device: got {text!r}, but torch sees {count} CUDA devices here"
            )
        torch.cuda.set_device(device.index or 0)  # streams, graphs and waiting are of this one
    return device


def _precision(name: str, device: torch.device) -> Precision:
    precision = PRECISIONS[name]
    if precision.tf32 and device.type != "cuda":
        raise ValueError(f"argument --precision: {name} needs --device cuda, got {device}")
    if device.type == "cuda" and torch.cuda.get_device_capability() < precision.capability:
        raise ValueError(
            f"argument --precision: {name} needs a GPU of compute capability "
            f"{precision.capability}, {device} has {torch.cuda.get_device_capability()}"
        )
    return precision


def _check_names(options: Options) -> None:
    if options.isa and options.device.type != "cpu":
        raise ValueError(f"argument --isa: expected none on {options.device}, got {options.isa}")
    for isa in options.isa or [None]:
        for kernel in options.kernel or [""]:
            with force_kernel(options.device, kernel, isa):
                pass  # raises for unknown names
    for name in options.contenders or ():
        if why_not := CONTENDERS[name].why_not_on(options.device.type):
            raise ValueError(
                f"argument --contenders: {name} cannot run on {options.device}: {why_not}"
            )


def _print_list() -> None:
    named = {"cases": CASES, "blocks": BLOCKS, "contenders": CONTENDERS, "precisions": PRECISIONS}
    for title, entries in named.items():
        print(f"{title}:")
        for name, one in entries.items():
            print(f"  {name:<16} {one.title}")
    info = fusedcnn.build_info()
    print("isas:", *(isa["name"] for isa in info["isas"] if isa["supported"]))
    for title, kernels in (("kernels", info["kernels"]), ("CUDA kernels", info["cuda"]["kernels"])):
        for of_pass in dict.fromkeys(kernel["pass"] for kernel in kernels):
            names = dict.fromkeys(k["name"] for k in kernels if k["pass"] == of_pass)
            print(f"{title} of {of_pass}:", *names)
    print("CUDA:", info["cuda"]["reason"] or "loaded")
