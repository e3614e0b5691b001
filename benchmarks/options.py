"""The command line of bench_block.py. Everything that can be refused is refused here."""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import fusedcnn
import torch
from arguments import (
    MAX_BATCH,
    Run,
    add_batch_arguments,
    add_timing_arguments,
    check_writable,
    pair_runs,
    seconds,
)
from cases import CASES
from contenders import CONTENDERS, contenders_on
from kernel_forcing import force_kernel
from precision import PRECISIONS, Precision

SMALL_BATCH = 4  # see arguments.py
BATCH_SIZES = {"cpu": [4, 64], "cuda": [4, 1024, 4096]}
PICTURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        cases: names from cases.py.
        contenders: names from contenders.py.
        runs: batch sizes, each with the threads of every contender; each case is run at each.
        precision: of everybody.
        device: where.
        isa: forced upon fusedcnn, or "".
        kernel: forced upon fusedcnn, or "".
        min_time: seconds for which each contender of a case is timed, over all rounds.
        rounds: turns of each contender.
        time_limit: seconds after which no further case is begun, or None.
        json: where to write everything, or None.
        plot: where to draw the times, or None.
    """

    cases: list[str]
    contenders: list[str]
    runs: list[Run]
    precision: Precision
    device: torch.device
    isa: str
    kernel: str
    min_time: float
    rounds: int
    time_limit: float | None
    json: Path | None
    plot: Path | None


def parse(arguments: list[str] | None) -> Options:
    """Read the command line; on bad arguments, say what is wrong and exit with status 2."""
    parser = _parser()
    values = vars(parser.parse_args(arguments))
    if values.pop("list"):
        _print_list()
        parser.exit()
    values["precision"] = PRECISIONS[values["precision"]]
    try:
        device = values["device"] = _device(values["device"])
        values["contenders"] = _contenders(values["contenders"], device)
        _check_precision(values["precision"], device)
        # On a GPU a batch of any size is one thread's to launch.
        small = SMALL_BATCH if device.type == "cpu" else MAX_BATCH
        batch_sizes = values.pop("batch_sizes") or BATCH_SIZES[device.type]
        values["runs"] = pair_runs(batch_sizes, values.pop("threads"), small)
        if values["isa"] and device.type != "cpu":
            raise ValueError(f"argument --isa: expected none on {device}, got {values['isa']!r}")
        with force_kernel(device, values["kernel"], values["isa"]):
            pass  # raises for unknown names
        for name in ("json", "plot"):
            if values[name]:
                check_writable(f"--{name}", values[name])
        if values["plot"]:
            _check_plot(values["plot"])
    except (ValueError, RuntimeError) as error:  # the latter: kernels that are not loaded
        parser.error(str(error))
    return Options(**values)


def _parser() -> argparse.ArgumentParser:
    cases = [case.name for case in CASES]
    contenders = [contender.name for contender in CONTENDERS]
    batch_sizes = "; ".join(f"{k}: {' '.join(map(str, v))}" for k, v in BATCH_SIZES.items())
    parser = argparse.ArgumentParser(
        description="Time the fused block beside its peers; about two minutes on two cores."
    )
    # fmt: off
    add = parser.add_argument
    add("--list", action="store_true",
        help="print the names of cases, contenders, ISAs and kernels, and end")
    add("--cases", nargs="+", choices=cases, default=cases, metavar="CASE",
        help="see --list (default: all)")
    add("--contenders", nargs="+", choices=contenders, metavar="NAME",
        help="see --list (default: all that run on the device)")
    add("--precision", choices=PRECISIONS, default="float32",
        help="of parameters and images; tf32: float32 whose products may round their operands, "
             "which float32 itself forbids to all (default: %(default)s)")
    add("--device", default="cpu", metavar="DEVICE",
        help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--isa", default="", help="force fusedcnn's instruction set; see --list")
    add("--kernel", default="", help="force fusedcnn's kernel; see --list")
    add("--plot", type=Path, metavar="FILE.png", help="draw the times; needs matplotlib")
    # fmt: on
    add(
        "--time-limit",
        type=seconds,
        metavar="S",
        help="begin no further case after so many seconds; the report says which are missing",
    )
    add_batch_arguments(parser, None, SMALL_BATCH, batch_sizes)
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


def _contenders(names: list[str] | None, device: torch.device) -> list[str]:
    if names is None:
        return contenders_on(device.type)
    for contender in CONTENDERS:
        why_not = contender.why_not_on(device.type)
        if contender.name in names and why_not:
            raise ValueError(
                f"argument --contenders: {contender.name} cannot run on {device}: {why_not}"
            )
    return names


def _check_precision(precision: Precision, device: torch.device) -> None:
    name = precision.name
    if precision.tf32 and device.type != "cuda":
        raise ValueError(f"argument --precision: {name} needs --device cuda, got {device}")
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < precision.capability:
            needed = ".".join(map(str, precision.capability))
            raise ValueError(
                f"argument --precision: {name} needs a GPU of compute capability {needed}, "
                f"{device} has {found[0]}.{found[1]}"
            )


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
        needs = {kind: contender.why_not_on(kind) for kind in ("cpu", "cuda")}
        alone = [kind for kind in needs if not needs[kind]]
        only = f" ({alone[0]} only)" if len(alone) == 1 else ""
        print(f"  {contender.name:<16} {contender.note}{only}")
    print("precisions:")
    for precision in PRECISIONS.values():
        print(f"  {precision.name:<16} {precision.note}")
    info = fusedcnn.build_info()
    print("isas:   ", " ".join(isa["name"] for isa in info["isas"] if isa["supported"]))
    print("kernels:", " ".join(dict.fromkeys(kernel["name"] for kernel in info["kernels"])))
    cuda = info["cuda"]
    names = " ".join(dict.fromkeys(kernel["name"] for kernel in cuda["kernels"]))
    print("CUDA kernels:", names or f"none: {cuda['reason']}")
