"""The command line of bench_kernels.py. Everything that can be refused is refused here."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fusedcnn
from arguments import (
    DTYPES,
    Run,
    add_batch_arguments,
    add_timing_arguments,
    check_writable,
    integer,
    pair_runs,
)
from blocks import BLOCKS, BY_NAME, Block, Pair
from contenders import contenders_on
from fusedcnn._ops import force
from passes import PASSES

SMALL_BATCH = 1  # see arguments.py
MAX_CHANNELS = 65536
LAYOUTS = ("contiguous", "channels_last")

# Options that describe a block of the user's own: argument, field of Block, help.
SIZES = (
    ("--kernel-size", "kernel_size", "of the convolution"),
    ("--stride", "stride", "of the convolution"),
    ("--padding", "padding", "zeros on both sides of the image"),
    ("--dilation", "dilation", "of the convolution"),
    ("--pool", "pool_kernel_size", "size of the pooling window"),
    ("--pool-stride", "pool_stride", "of the pool (default: the window's size)"),
    ("--pool-padding", "pool_padding", "of the pool"),
    ("--pool-dilation", "pool_dilation", "of the pool"),
)

DEFAULTS = {
    "passes": [p.name for p in PASSES],
    "contenders": ["fused", "eager", "eager-cl"],
    "dtypes": ["float32"],
    "layouts": ["contiguous"],
}
# The stock layers are timed in both layouts, each beside the fused block's one.
SUMMARY_IGNORES = ("kernel", "passes", "layouts")


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        summary: the blocks beside the stock layers, instead of kernel by kernel.
        blocks: each with the runs at which it is timed.
        dtypes: names of tensors' dtypes.
        layouts: of input, weight and gradient.
        passes: names from passes.py.
        isas: instruction sets whose kernels are timed; one with ``summary``.
        kernels: names; [] for all.
        contenders: names from contenders.py, of the summary.
        min_time: seconds for which each contender is timed, over all rounds.
        rounds: turns of each contender.
        json: where to write everything, or None.
    """

    summary: bool
    blocks: list[tuple[Block, list[Run]]]
    dtypes: list[str]
    layouts: list[str]
    passes: list[str]
    isas: list[str]
    kernels: list[str]
    contenders: list[str]
    min_time: float
    rounds: int
    json: Path | None


def parse(arguments: list[str] | None) -> Options:
    """Read the command line; on bad arguments, say what is wrong and exit with status 2."""
    parser = _parser()
    values = vars(parser.parse_args(arguments))
    if values.pop("list"):
        _print_list()
        parser.exit()
    try:
        _refuse_unused(values)
        blocks = _blocks(values)
        batch_sizes, threads = values.pop("batch_sizes"), values.pop("threads")
        values["blocks"] = [
            (block, pair_runs(batch_sizes or _batch_sizes(block), threads, SMALL_BATCH))
            for block in blocks
        ]
        values["isas"] = values.pop("isa") or [_selected_isa()]
        values["kernels"] = values.pop("kernel") or []
        for name, default in DEFAULTS.items():
            values[name] = values[name] or default
        for isa in values["isas"]:
            for kernel in values["kernels"] or [""]:
                with force(isa, kernel):
                    pass  # raises for unknown names
        if values["json"]:
            check_writable("--json", values["json"])
    except ValueError as error:
        parser.error(str(error))
    return Options(**values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time kernels by name on any block, or (--blocks) real blocks beside the stock "
        "layers.",
        allow_abbrev=False,
    )
    # fmt: off
    add = parser.add_argument
    add("names", nargs="*", metavar="BLOCK",
        help="see --list (default: SimpleCNN's two; with --blocks all)")
    add("--list", action="store_true",
        help="print the names of blocks, passes, ISAs, kernels and contenders, and end")
    add("--blocks", dest="summary", action="store_true",
        help="time whole forward and backward passes beside the stock layers")
    add("--isa", nargs="+", metavar="ISA", help="see --list (default: the widest)")
    add("--kernel", nargs="+", metavar="KERNEL", help="see --list (default: all)")
    add("--passes", nargs="+", choices=[p.name for p in PASSES], metavar="PASS",
        help="see --list (default: all)")
    add("--contenders", nargs="+", choices=contenders_on("cpu"), metavar="NAME",
        help="of --blocks, see --list (default: fused eager eager-cl)")
    add("--dtype", dest="dtypes", nargs="+", choices=DTYPES, metavar="DTYPE",
        help=f"{', '.join(DTYPES)} (default: float32)")
    add("--layout", dest="layouts", nargs="+", choices=LAYOUTS, metavar="LAYOUT",
        help=f"{', '.join(LAYOUTS)} (default: contiguous)")
    # fmt: on
    add_batch_arguments(parser, None, SMALL_BATCH)
    add_timing_arguments(parser, min_time=0.1, rounds=5)
    # fmt: off
    add = parser.add_argument_group("a block of your own; sizes are N or HxW").add_argument
    add("--shape", type=_shape, metavar="[Nx]CxHxW",
        help="of the input, such as 64x3x32x32; without N, --batch-sizes say how many images")
    add("--out-channels", type=integer(1, MAX_CHANNELS), metavar="N",
        help="of the convolution; needed with --shape")
    add("--groups", type=integer(1, MAX_CHANNELS), metavar="N",
        help="of the convolution (default: 1)")
    for argument, field, text in SIZES:
        value = getattr(Block, field, None)  # the field's default
        shown = f" (default: {value[0]})" if value else ""
        low = 0 if "padding" in field else 1
        add(argument, dest=field, type=_pair(low), metavar="SIZE", help=text + shown)
    add("--ceil-mode", action="store_true", help="round the pooled size up")
    # fmt: on
    return parser


def _blocks(values: dict[str, Any]) -> list[Block]:
    """Take the block names, or the block described by sizes, out of the values."""
    names, shape = values.pop("names"), values.pop("shape")
    fields = ["out_channels", "groups", "ceil_mode", *(field for _, field, _ in SIZES)]
    given = {f: value for f in fields if (value := values.pop(f)) not in (None, False)}
    if shape is None:
        if given:
            raise ValueError(
                "argument --shape: needed where sizes are given: " + ", ".join(sorted(given))
            )
        names = names or (list(BY_NAME) if values["summary"] else ["simplecnn-1", "simplecnn-2"])
        unknown = [name for name in names if name not in BY_NAME]
        if unknown:
            raise ValueError(f"argument BLOCK: expected one of {', '.join(BY_NAME)}, got {unknown}")
        return [BY_NAME[name] for name in dict.fromkeys(names)]
    if names:
        raise ValueError(f"argument --shape: expected no block names beside it, got {names}")
    if "out_channels" not in given:
        raise ValueError("argument --out-channels: needed with --shape")
    *batch, channels, height, width = shape
    if batch:
        if values["batch_sizes"]:
            raise ValueError("argument --batch-sizes: not allowed where --shape has four sizes")
        values["batch_sizes"] = batch
    name = "x".join(map(str, (channels, height, width)))
    block = Block(
        f"{name}->{given['out_channels']}", "own sizes", channels, (height, width), **given
    )
    try:
        _ = block.output  # raises where the sizes do not go together
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"argument --shape: {error}") from None
    return [block]


def _batch_sizes(block: Block) -> list[int]:
    return list(dict.fromkeys([1, block.batch]))


def _selected_isa() -> str:
    return next(isa["name"] for isa in fusedcnn.build_info()["isas"] if isa["selected"])


def _refuse_unused(values: dict[str, Any]) -> None:
    """Refuse what the chosen mode would ignore."""
    unused = SUMMARY_IGNORES if values["summary"] else ("contenders",)
    for name in unused:
        if values[name]:
            mode = "with" if values["summary"] else "without"
            argument = name.removesuffix("s") if name == "layouts" else name
            raise ValueError(f"argument --{argument}: not allowed {mode} --blocks")
    for name in ("isa", "dtypes"):
        if values["summary"] and len(values[name] or ()) > 1:
            argument = name.removesuffix("s")
            raise ValueError(f"argument --{argument}: expected one with --blocks")


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){2,3}", text):
        raise argparse.ArgumentTypeError(
            f"expected sizes over 0 as CxHxW or NxCxHxW, such as 64x3x32x32, got {text!r}"
        )
    return tuple(map(int, text.split("x")))


def _pair(low: int) -> Callable[[str], Pair]:
    """Return an argument type: one size or two, from low."""

    def pair(text: str) -> Pair:
        sizes = text.split("x")
        if not re.fullmatch(r"\d+(x\d+)?", text) or min(map(int, sizes)) < low:
            raise argparse.ArgumentTypeError(
                f"expected N or HxW from {low}, such as 3 or 3x5, got {text!r}"
            )
        return (int(sizes[0]), int(sizes[-1]))

    return pair


def _print_list() -> None:
    print("blocks:")
    for block in BLOCKS:
        sizes = f"{block.in_channels}->{block.out_channels} at {block.size[0]}x{block.size[1]}"
        print(f"  {block.name:<12} {sizes:<20} batch {block.batch:<3} {block.title}")
    print("passes:    ", " ".join(p.name for p in PASSES))
    info = fusedcnn.build_info()
    print("isas:      ", " ".join(isa["name"] for isa in info["isas"] if isa["supported"]))
    for name in dict.fromkeys(p.kernels for p in PASSES):
        kernels = (k["name"] for k in info["kernels"] if k["pass"] == name)
        print(f"kernels of {name}:", " ".join(dict.fromkeys(kernels)))
    print("contenders:", " ".join(contenders_on("cpu")))
