"""Fails when an object compiled for one ISA shares a function with the rest of the program.

Each ISA's objects are compiled with that ISA's instructions. An inline function or a template that
such an object emits with weak linkage is merged by the linker with everyone else's copy, and the
copy that stays may be the AVX-512 one: an illegal instruction on older machines, and in code that
has nothing to do with the kernels. So whatever these objects define must be local, or carry their
ISA's namespace in its name.

    python scripts/check_isa_symbols.py BUILD_DIR [--nm aarch64-linux-gnu-nm]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

# The folder that CMake compiles an object library's sources into; see csrc/cpu/CMakeLists.txt.
_OBJECT_FOLDER = re.compile(r"fusedcnn_cpu_(?P<isa>\w+)\.dir$")

# A pointer to the C++ runtime's exception handler, not code, that every object may carry.
_POINTER = "DW.ref."


def isa_objects(build: Path) -> dict[str, list[Path]]:
    """Object files of each ISA under a build folder."""
    objects: dict[str, list[Path]] = {}
    for folder in sorted(build.rglob("fusedcnn_cpu_*.dir")):
        if match := _OBJECT_FOLDER.search(folder.name):
            objects.setdefault(match["isa"], []).extend(sorted(folder.rglob("*.o")))
    return {isa: paths for isa, paths in objects.items() if paths}


def shared_symbols(path: Path, isa: str, nm: str) -> list[str]:
    """Symbols that the object defines for everyone and that do not bear its ISA's name."""
    output = subprocess.run(
        [nm, "--defined-only", "--format=posix", str(path)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    own = f"8fusedcnn3cpu{len(isa)}{isa}"  # fusedcnn::cpu::<isa>, mangled
    shared = []
    for line in output.splitlines():
        name, kind = line.split()[:2]
        if name.startswith(_POINTER):
            continue
        # Lower case is local, except u (unique) and v and w (weak).
        if (kind.isupper() or kind in "uvw") and own not in name:
            shared.append(f"{kind} {name}")
    return shared


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path, help="build folder")
    parser.add_argument("--nm", default="nm", help="nm for the build's target (default: nm)")
    options = parser.parse_args()
    objects = isa_objects(options.build)
    if not objects:
        print(f"{options.build}: no object of an ISA found; is it a build folder?", file=sys.stderr)
        return 2
    bad = 0
    for isa, paths in objects.items():
        for path in paths:
            shared = shared_symbols(path, isa, options.nm)
            bad += len(shared)
            print(f"{isa:<9} {path.name}: {len(shared)} shared symbols")
            for symbol in shared:
                print(f"          {symbol}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
