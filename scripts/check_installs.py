"""Installs the package in every way that it promises, each in a virtual environment of its own.

    python scripts/check_installs.py [SCENARIO ...]

Scenarios (all of them by default; each takes one to three minutes and about a gigabyte):

    fresh          an empty environment: the isolated build asks for torch, because there is none
    installed      torch is there: the isolated build does not ask for a second one; done twice, as
                   the second build finds the first one's folder
    no_isolation   --no-build-isolation, with the build tools installed beside torch
    editable       -e, imported from elsewhere
    sdist          an sdist, a wheel made from it, installed where neither sources nor build exist

``--torch VERSION`` is the torch to install (default 2.13.0). Packages come from wherever pip is
configured to look.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from environments import ROOT, CommandError, Environment, run

BUILD_TOOLS = ["scikit-build-core>=1.0", "pybind11>=2.13", "ninja>=1.11", "cmake>=3.21"]

# Run in the new environment, from a folder that holds nothing.
QUICK_OP = """
import torch, fusedcnn
import torch.nn.functional as F
x = torch.randn(2, 3, 12, 10, requires_grad=True)
conv = torch.nn.Conv2d(3, 16, 3, padding=1)
want = F.max_pool2d(F.relu(conv(x)), 2)
got = fusedcnn.conv_relu_max_pool2d(x, conv.weight, conv.bias, padding=1)
torch.testing.assert_close(got, want)
parameters = (x, conv.weight, conv.bias)
for one, other in zip(torch.autograd.grad(got.sum(), parameters),
                      torch.autograd.grad(want.sum(), parameters)):
    torch.testing.assert_close(one, other)
print("operator agrees with the stock layers, torch", torch.__version__)
print("imported from", fusedcnn.__file__)
"""

IN_SDIST = (
    "CMakeLists.txt",
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "build_backend/fusedcnn_build.py",
    "build_backend/torch_location.py",
    "cmake/cuda.cmake",
    "csrc/core/geometry.h",
    "csrc/cpu/CMakeLists.txt",
    "csrc/cpu/registry.cpp",
    "csrc/ops/conv_relu_max_pool2d.cpp",
    "csrc/python/module.cpp",
    "python/fusedcnn/__init__.py",
    "python/fusedcnn/py.typed",
)
# What a wheel may hold, beside its .dist-info folder.
IN_WHEEL = re.compile(
    r"fusedcnn/(?:[\w/]+\.py|py\.typed|libfusedcnn(?:_cuda)?\.so|_C\.[\w.-]+\.so)$"
)


def expect(condition: object, message: str) -> None:
    """Raise CommandError with the message unless the condition holds."""
    if not condition:
        raise CommandError(message)


class Workplace:
    """A temporary folder with a copy of the sources and as many environments as asked for."""

    def __init__(self, folder: Path, torch: str) -> None:
        self.folder = folder
        self.torch = f"torch=={torch}"
        self.constraint = folder / "constraint.txt"
        self.constraint.write_text(f"{self.torch}\n")

    def sources(self) -> Path:
        """A copy of the files that git knows or would add."""
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        copy = self.folder / "source"
        for file in filter(None, run(*command, cwd=ROOT).split("\0")):
            if (ROOT / file).is_file():
                (copy / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, copy / file)
        return copy

    def environment(self, name: str, *packages: str) -> Environment:
        """A new environment with these packages, in which nothing installs another torch."""
        constraint = str(self.constraint)
        # The second is for isolated builds, in newer versions of pip.
        return Environment(self.folder / name, *packages, PIP_CONSTRAINT=constraint,
                           PIP_BUILD_CONSTRAINT=constraint)  # fmt: skip


def check_operator(environment: Environment) -> None:
    """Run the operator and the information command."""
    print(environment.run("-c", QUICK_OP).rstrip())
    info = environment.run("-m", "fusedcnn", "info")
    expect("selected" in info, f"python -m fusedcnn info selected no ISA:\n{info}")


def installs_of_torch(log: str) -> int:
    """How often pip, in a log, installed torch: into the environment or an isolated build's."""
    return len(re.findall(r"Installing collected packages:.*\btorch\b", log))


def fresh(place: Workplace) -> None:
    """An empty environment."""
    environment = place.environment("env")
    log = environment.pip("install", "-v", place.sources())
    isolated, target = log.split("Preparing metadata", 1)
    expect(installs_of_torch(isolated) == 1, "the isolated build did not ask for torch")
    expect(installs_of_torch(target) == 1, "torch was not installed as a dependency")
    check_operator(environment)


def installed(place: Workplace) -> None:
    """An environment that has torch."""
    environment = place.environment("env", place.torch)
    sources = place.sources()
    again = ["--force-reinstall", "--no-deps"]
    for name, options in (("first", again), ("second", again), ("with dependencies", [])):
        log = environment.pip("install", "-v", *options, sources)
        expect(not installs_of_torch(log), f"{name} build: installed a second torch")
        expect(name == "first" or "no work to do" in log, f"{name} build: compiled again")
        check_operator(environment)


def no_isolation(place: Workplace) -> None:
    """Build tools and torch in the environment itself."""
    environment = place.environment("env", place.torch, *BUILD_TOOLS)
    environment.pip("install", "--no-build-isolation", place.sources())
    check_operator(environment)


def editable(place: Workplace) -> None:
    """An editable install, whose Python files are the sources'."""
    environment = place.environment("env", place.torch)
    sources = place.sources()
    log = environment.pip("install", "-v", "-e", sources)
    expect(not installs_of_torch(log), "installed a second torch")
    check_operator(environment)
    module = sources / "python" / "fusedcnn" / "__init__.py"
    module.write_text(module.read_text() + "\nEDITED = True\n")
    environment.run("-c", "import fusedcnn; assert fusedcnn.EDITED")
    print("an edit of a Python file is seen without installing again")


def sdist(place: Workplace) -> None:
    """An sdist, a wheel from it, and the wheel alone in another environment."""
    sources = place.sources()
    builder = place.environment("builder", place.torch, "build")
    builder.run("-m", "build", "--sdist", "--outdir", place.folder / "dist", sources)
    (archive,) = (place.folder / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    missing = [name for name in IN_SDIST if name not in names]
    expect(not missing, f"the sdist lacks {', '.join(missing)}")
    stray = [name for name in names if re.search(r"(^|/)(build|\.git|\.ci|__pycache__)/", name)]
    expect(not stray, f"the sdist holds {', '.join(sorted(stray)[:5])}")
    print(f"{archive.name}: {len(names)} files, {archive.stat().st_size // 1024} KiB")

    shutil.rmtree(sources)
    builder.pip("wheel", "--no-deps", "-w", place.folder / "dist", archive)
    (wheel,) = (place.folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as unzipped:
        names = [name for name in unzipped.namelist() if not name.endswith("/")]
        unzipped.extractall(place.folder / "wheel")
    stray = [n for n in names if not IN_WHEEL.match(n) and ".dist-info/" not in n]
    expect(not stray, f"the wheel holds {', '.join(stray)}")
    expect(any(n.endswith("licenses/LICENSE") for n in names), "the wheel lacks its licence")
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size // 1024} KiB")

    for library in sorted((place.folder / "wheel").rglob("*.so")):
        check_library(place, library)
    target = place.environment("env", place.torch)
    target.pip("install", "--no-deps", wheel)
    shutil.rmtree(place.folder / "builder")
    shutil.rmtree(place.folder / "wheel")
    check_operator(target)


def check_library(place: Workplace, library: Path) -> None:
    """A shared library names no folder of the machine that built it, but in device line tables."""
    dynamic = run("readelf", "-dW", library, cwd=place.folder)
    for line in dynamic.splitlines():
        if "(RPATH)" in line or "(RUNPATH)" in line:
            expect("[$ORIGIN]" in line, f"{library.name}: run path {line.strip()}")
        if "(NEEDED)" in line:
            expect("/" not in line.split("[", 1)[1], f"{library.name}: {line.strip()}")
    if library.name == "libfusedcnn_cuda.so":
        # The line tables of its device code name the sources; nvcc has no option to map folders.
        print(f"{library.name}: {library.stat().st_size // 1024} KiB")
        return
    content = library.read_bytes()
    # pip builds in folders of its own, all of them under the temporary folder.
    for folder in (place.folder, Path(tempfile.gettempdir()), ROOT, Path.home()):
        if folder == Path("/"):
            continue
        found = re.search(re.escape(os.fsencode(folder)) + rb"/[\x20-\x7e]*", content)
        expect(not found, f"{library.name}: holds the path {found and found[0].decode()}")
    print(f"{library.name}: {library.stat().st_size // 1024} KiB, no build path in it")


SCENARIOS: dict[str, Callable[[Workplace], None]] = {
    scenario.__name__: scenario for scenario in (fresh, installed, no_isolation, editable, sdist)
}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--torch", default="2.13.0", help="version to install (default 2.13.0)")
    options = parser.parse_args()
    if unknown := set(options.scenarios) - set(SCENARIOS):
        parser.error(f"expected scenarios out of {', '.join(SCENARIOS)}, got {', '.join(unknown)}")
    failed = []
    for name in options.scenarios or SCENARIOS:
        print(f"---- {name}: {SCENARIOS[name].__doc__}", flush=True)
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="fusedcnn-install-") as folder:
            try:
                SCENARIOS[name](Workplace(Path(folder).resolve(), options.torch))
            except CommandError as error:
                print(f"FAILED: {error}")
                failed.append(name)
        print(f"---- {name}: {'FAILED' if name in failed else 'ok'} "
              f"({time.monotonic() - start:.0f} s)", flush=True)  # fmt: skip
    print(f"failed: {', '.join(failed)}" if failed else "all installs work")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
