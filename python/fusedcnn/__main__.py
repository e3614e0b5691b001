"""``python -m fusedcnn info``: build_info for people."""

from __future__ import annotations

import argparse
import json

from fusedcnn._ops import build_info


def _print_info(info: dict) -> None:
    print(f"fusedcnn {info['version']} ({info['compiler']}), torch {info['torch']}")
    print(f"library  {info['library']}")
    for isa in info["isas"]:
        state = "selected" if isa["selected"] else "usable" if isa["supported"] else "not supported"
        names: dict[str, list[str]] = {}
        for kernel in info["kernels"]:
            if kernel["isa"] == isa["name"]:
                names.setdefault(kernel["pass"], []).append(kernel["name"])
        print(f"isa      {isa['name']:<9} {state} by this machine" if state != "selected" else
              f"isa      {isa['name']:<9} selected on this machine")  # fmt: skip
        for pass_name, kernels in names.items():
            print(f"           {pass_name:<12} {', '.join(kernels)}")
    cuda = info["cuda"]
    if cuda["loaded"]:
        names = {}
        for kernel in cuda["kernels"]:
            names.setdefault(kernel["pass"], []).append(kernel["name"])
        print(f"cuda     {cuda['toolkit']:<9} for {', '.join(cuda['architectures'])}")
        for pass_name, kernels in names.items():
            print(f"           {pass_name:<12} {', '.join(kernels)}")
    else:
        print(f"cuda     {'built' if cuda['built'] else 'absent':<9} not loaded: {cuda['reason']}")
    for device, what in info["devices"].items():
        print(f"device   {device:<9} {what}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m fusedcnn")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="what was built and what runs on this machine")
    info.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(arguments)
    if options.json:
        print(json.dumps(build_info(), indent=2))
    else:
        _print_info(build_info())


if __name__ == "__main__":
    main()
