"""The command line of bench_block.py. Everything that can be refused is refused here."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fusedcnn
import torch
from cases import CASES
from contenders import CONTENDERS
from fusedcnn._ops import force
from limits import available_cores

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
PICTURES = (".png", ".pdf", ".svg")
# The images of a case are drawn, copied and computed in float64 too: some gigabytes at this size.
MAX_BATCH = 65536


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        cases: names from cases.py.
        contenders: names from contenders.py.
        batch_sizes: images per call; each case is run at each of them.
        threads: of every contender.
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
    batch_sizes: list[int]
    threads: int
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
    values["batch_sizes"] = list(dict.fromkeys(values["batch_sizes"]))
    values["dtype"] = DTYPES[values["dtype"]]
    try:
        values["device"] = _device(values["device"])
        with force(values["isa"], values["kernel"]):
            pass  # raises for unknown names
        for name in ("json", "plot"):
            if values[name]:
                _check_writable(f"--{name}", values[name])
        if values["plot"]:
            _check_plot(values["plot"])
    except ValueError as error:
        parser.error(str(error))
    return Options(**values)


def _parser() -> argparse.ArgumentParser:
    cases = [case.name for case in CASES]
    contenders = [contender.name for contender in CONTENDERS]
    cores = available_cores()
    threads = min(torch.get_num_threads(), cores)
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
    add("--batch-sizes", nargs="+", type=_integer(1, MAX_BATCH), default=[64, 256], metavar="N",
        help=f"images per call, 1 to {MAX_BATCH} (default: 64 256)")
    add("--threads", type=_integer(1, cores), default=threads, metavar="N",
        help=f"of every contender, 1 to {cores} on this machine (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32",
        help="of parameters and images (default: %(default)s)")
    add("--device", default="cpu", metavar="DEVICE",
        help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--isa", default="", help="force fusedcnn's instruction set; see --list")
    add("--kernel", default="", help="force fusedcnn's kernel; see --list")
    add("--min-time", type=_seconds, default=0.3, metavar="S",
        help="seconds for which each contender of a case is timed, all rounds together "
             "(default: %(default)s)")
    add("--rounds", type=_integer(2, 1000), default=10, metavar="N",
        help="turns of each contender (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write everything as JSON")
    add("--plot", type=Path, metavar="FILE.png", help="draw the times; needs matplotlib")
    # fmt: on
    return parser


def _integer(low: int, high: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"expected an integer from {low} to {high}, got {text!r}"
            )
        return value

    return integer


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"expected seconds, over 0 and up to 3600, got {text!r}")
    return value


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


def _check_writable(argument: str, path: Path) -> None:
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
