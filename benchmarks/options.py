"""The command line of bench_block.py. Everything that can be refused is refused here."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import fusedcnn
import torch
from arguments import (
    DTYPES,
    Run,
    add_batch_arguments,
    add_timing_arguments,
    check_writable,
    pair_runs,
)
from cases import CASES
from contenders import CONTENDERS
from fusedcnn._ops import force

SMALL_BATCH = 4  # see arguments.py
PICTURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        cases: names from cases.py.
        contenders: names from contenders.py.
        runs: batch sizes, each with the threads of every contender; each case is run at each.
        dtype: of parameters and images.
        device: where.
        isa: forced upon fusedcnn, or "".
        kernel: forced upon fusedcnn, or "".
        min_time: seconds for which each contender of a case is timed, over all rounds.
        rounds: turns of each contender.
        json: where to write everything, or None.
        plot: where to draw the times, or None.
    """

    cases: list[str]
    contenders: list[str]
    runs: list[Run]
    dtype: torch.dtype
    device: torch.device
    isa: str
    kernel: str
    min_time: float
    rounds: int
    json: Path | None
    plot: Path | None


def parse(arguments: list[str] | None) -> Options:
    """Read the command line; on bad arguments, say what is wrong and exit with status 2."""
    parser = _parser()
    values = vars(parser.parse_args(arguments))
    if values.pop("list"):
        _print_list()
        parser.exit()
    values["dtype"] = DTYPES[values["dtype"]]
    try:
        values["runs"] = pair_runs(values.pop("batch_sizes"), values.pop("threads"), SMALL_BATCH)
        values["device"] = _device(values["device"])
        with force(values["isa"], values["kernel"]):
            pass  # raises for unknown names
        for name in ("json", "plot"):
            if values[name]:
                check_writable(f"--{name}", values[name])
        if values["plot"]:
            _check_plot(values["plot"])
    except ValueError as error:
        parser.error(str(error))
    return Options(**values)


def _parser() -> argparse.ArgumentParser:
    cases = [case.name for case in CASES]
    contenders = [contender.name for contender in CONTENDERS]
    parser = argparse.ArgumentParser(
        description="Time the fused block beside its peers; about two minutes on two cores."
    )
    # fmt: off
    add = parser.add_argument
    add("--list", action="store_true",
        help="print the names of cases, contenders, ISAs and kernels, and end")
    add("--cases", nargs="+", choices=cases, default=cases, metavar="CASE",
        help="see --list (default: all)")
    add("--contenders", nargs="+", choices=contenders, default=contenders, metavar="NAME",
        help="see --list (default: all)")
    add("--dtype", choices=DTYPES, default="float32",
        help="of parameters and images (default: %(default)s)")
    add("--device", default="cpu", metavar="DEVICE",
        help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--isa", default="", help="force fusedcnn's instruction set; see --list")
    add("--kernel", default="", help="force fusedcnn's kernel; see --list")
    add("--plot", type=Path, metavar="FILE.png", help="draw the times; needs matplotlib")
    # fmt: on
    add_batch_arguments(parser, [4, 64], SMALL_BATCH)
    add_timing_arguments(parser, min_time=0.2, rounds=10)
    return parser


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
    return device


def _check_plot(path: Path) -> None:
    if path.suffix not in PICTURES:
        raise ValueError(
            f"argument --plot: expected a name ending in {', '.join(PICTURES)}, got {str(path)!r}"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("argument --plot: needs matplotlib: pip install 'fusedcnn[plot]'")


def _print_list() -> None:
    print("cases:")
    for case in CASES:
        print(f"  {case.name:<16} {case.title}")
    print("contenders:")
    for contender in CONTENDERS:
        print(f"  {contender.name:<16} {contender.note}")
    info = fusedcnn.build_info()
    print("isas:   ", " ".join(isa["name"] for isa in info["isas"] if isa["supported"]))
    print("kernels:", " ".join(dict.fromkeys(kernel["name"] for kernel in info["kernels"])))
