"""The command line: ``python -m fusedcnn info`` and ``python -m fusedcnn bench``."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from fusedcnn import _C, _first_use
from fusedcnn._info import build_info
from fusedcnn.bench import BadInputError, run

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def _print_kernels(kernels: list[dict]) -> None:
    for pass_name in dict.fromkeys(kernel["pass"] for kernel in kernels):
        names = [kernel["name"] for kernel in kernels if kernel["pass"] == pass_name]
        print(f"           {pass_name:<12} {', '.join(names)}")


def _print_info(info: dict) -> None:
    print(f"fusedcnn {info['version']} ({info['compiler']}), torch {info['torch']}")
    print(f"library  {info['library']}")
    for isa in info["isas"]:
        usable = "usable by" if isa["supported"] else "not supported by"
        state = "selected on" if isa["selected"] else usable
        print(f"isa      {isa['name']:<9} {state} this machine")
        _print_kernels([kernel for kernel in info["kernels"] if kernel["isa"] == isa["name"]])
    cuda = info["cuda"]
    if cuda["loaded"]:
        print(f"cuda     {cuda['toolkit']:<9} for {', '.join(cuda['architectures'])}")
        _print_kernels(cuda["kernels"])
        for device in cuda["devices"]:
            print(f"gpu      cuda:{device['index']:<4} {device['device']}: {device['state']}")
            for kernel, why in (device["skipped"] | device["failed"]).items():
                failed = "failed: " if kernel in device["failed"] else "not checked: "
                print(f"           {kernel}: {failed}{why}")
            if device["stock"]:
                print(f"           stock layers: {device['stock']}")
    else:
        print(f"cuda     {'built' if cuda['built'] else 'absent':<9} not loaded: {cuda['reason']}")
    for device, what in info["devices"].items():
        print(f"device   {device:<9} {what}")


def _shape(text: str) -> list[int]:
    sizes = [int(size) for size in text.split(",")]  # a ValueError is argparse's to report
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected sizes of at least 1, got {text!r}")
    return sizes


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedcnn",
        description="Conv2d + bias + ReLU + MaxPool2d in one pass, for PyTorch.",
    )
    parser.add_argument("--version", action="version", version=f"fusedcnn {_C.version}")
    commands = parser.add_subparsers(dest="command", metavar="{info,bench}")
    info = commands.add_parser("info", help="what was built and what runs on this machine")
    info.add_argument("--json", action="store_true", help="as JSON")
    bench = commands.add_parser(
        "bench",
        help="your own model before and after fuse: what is fused, times, memory",
        description="Compare a model's results before and after fuse, then time both on this CPU.",
    )
    bench.add_argument(
        "model", help="package.module:Name or path/to/file.py:Name; a class or function is called"
    )
    bench.add_argument(
        "--input", type=_shape, required=True, action="append", metavar="64,3,32,32",
        help="shape of the input; once for each argument of forward",
    )  # fmt: skip
    bench.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    bench.add_argument("--train", action="store_true", help="training steps, too")
    bench.add_argument("--threads", type=_positive, help="default: torch's")
    bench.add_argument(
        "--seconds", type=float, default=1.0, help="each contender's running time (default: 1)"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
    elif options.command == "bench":
        try:
            return run(
                options.model, options.input, DTYPES[options.dtype], options.train,
                options.threads or torch.get_num_threads(), options.seconds,
            )  # fmt: skip
        except BadInputError as error:
            print(f"python -m fusedcnn bench: {error}", file=sys.stderr)
            return 2
    else:
        _first_use.find_everywhere()
        info = build_info()
        if options.json:
            print(json.dumps(info, indent=2))
        else:
            _print_info(info)
    return 0


if __name__ == "__main__":
    sys.exit(main())
