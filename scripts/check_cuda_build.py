"""Compiles and links the CUDA kernels, and fails when one of them spills registers.

    python scripts/check_cuda_build.py [--architectures 80 90] [--build FOLDER]

Needs nvcc, cmake and ninja; neither a GPU nor torch. The kernels are linked alone, with every
symbol resolved, and so are the probe, which uses every instruction that device.h offers, and the
kernels' self-test for a GPU. Registers and spills are read from what ptxas says of each kernel; a
spill sends accumulators through memory, which no test would notice. Kernels that may spill are
listed below.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# Bytes of spill stores that a kernel may have, of those that may have any.
MAY_SPILL: dict[str, int] = {}

_ENTRY = re.compile(r"Compiling entry function '(?P<symbol>\w+)' for '(?P<architecture>\w+)'")
_SPILLS = re.compile(r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (?P<registers>\d+) registers")


class Kernel(NamedTuple):
    """What ptxas said of one instance of a kernel."""

    name: str
    architecture: str
    registers: int
    spill_stores: int
    spill_loads: int


def build(folder: Path, architectures: list[str]) -> str:
    """Configure and build; the log. Exits with it when that fails."""
    configure = [
        "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DFUSEDCNN_KERNELS_ONLY=ON",
        "-DFUSEDCNN_CUDA=ON", "-DFUSEDCNN_CUDA_VERBOSE=ON", "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(f'{a}-real' for a in architectures)}",
    ]  # fmt: skip
    log = ""
    # --clean-first: what was compiled before has said its piece in another log.
    compile = ["cmake", "--build", str(folder), "--clean-first", "--target"]
    compile += ["fusedcnn_cuda", "fusedcnn_cuda_probe", "fusedcnn_cuda_gputest"]
    for command in (configure, compile):
        process = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        log += process.stdout
        if process.returncode != 0:
            sys.exit(f"{' '.join(command)}\n{log}")
    return log


def kernels(log: str) -> list[Kernel]:
    """Every kernel that ptxas reports on."""
    symbols = sorted({match["symbol"] for match in _ENTRY.finditer(log)})
    names = subprocess.run(
        ["c++filt", "-p", *symbols], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    # "void fusedcnn::cuda::(anonymous namespace)::kernel<float>" -> "kernel<float>"
    short = {
        symbol: re.sub(r"fusedcnn::cuda::|\(anonymous namespace\)::|^void ", "", name)
        for symbol, name in zip(symbols, names, strict=True)
    }
    found = []
    parts = _ENTRY.split(log)[1:]  # symbol, architecture, what follows, ...
    for symbol, architecture, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        spills, registers = _SPILLS.search(text), _REGISTERS.search(text)
        if not spills or not registers:
            sys.exit(f"{short[symbol]}: ptxas reported no registers or spills:\n{text}")
        found.append(
            Kernel(
                short[symbol],
                architecture,
                int(registers["registers"]),
                int(spills["stores"]),
                int(spills["loads"]),
            )
        )
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+", default=["80", "90"])
    parser.add_argument("--build", type=Path, help="build folder to use (default: a new one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = build(options.build or Path(folder), options.architectures)
    found = kernels(log)
    seen = {kernel.architecture for kernel in found}
    wanted = {f"sm_{architecture}" for architecture in options.architectures}
    if seen != wanted:
        sys.exit(f"expected kernels for {sorted(wanted)}, found some for {sorted(seen)}")
    by_name = defaultdict(list)
    for kernel in found:
        by_name[kernel.name.split("<")[0]].append(kernel)
    spilling = []
    for name, instances in sorted(by_name.items()):
        allowed = MAY_SPILL.get(name, 0)
        most = max(kernel.spill_stores for kernel in instances)
        registers = sorted({kernel.registers for kernel in instances})
        print(
            f"{name}: {len(instances)} compiled, {registers[0]} to {registers[-1]} registers, "
            f"spills up to {most} bytes (allowed: {allowed})"
        )
        spilling += [k for k in instances if k.spill_stores > allowed]
    if unknown := set(MAY_SPILL) - set(by_name):
        sys.exit(f"MAY_SPILL names kernels that were not compiled: {sorted(unknown)}")
    for kernel in spilling:
        print(
            f"SPILLS: {kernel.name} for {kernel.architecture}: {kernel.spill_stores} bytes of "
            f"stores, {kernel.spill_loads} of loads, {kernel.registers} registers"
        )
    if spilling:
        sys.exit(f"{len(spilling)} of {len(found)} kernels spill more than they may")


if __name__ == "__main__":
    main()
