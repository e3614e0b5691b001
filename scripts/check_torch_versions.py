"""Builds one wheel and runs the tests with it on several versions of torch.

    python scripts/check_torch_versions.py [VERSION ...] [-- PYTEST_ARGUMENT ...]

The wheel is built against the torch of the running Python. Each version (default: 2.10.0, 2.11.0
and the newest) gets a virtual environment of its own. Torch is installed without its dependencies
and gets only those that `import torch` needs; a CUDA build does not import without the CUDA
libraries, which then follow (several gigabytes). ``--keep DIR`` keeps the environments there and
uses those of an earlier run again. Prints what ran where; fails when one of them failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from importlib.metadata import requires
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEFAULT = ["2.10.0", "2.11.0", "newest"]
# What `import torch` needs beside itself, in every build.
PURE = ["filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "setuptools"]


def run(*command: object, cwd: Path = ROOT, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command and capture its output; raises CalledProcessError after printing it."""
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_CONSTRAINT")}
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if check and process.returncode:
        print(process.stdout)
        process.check_returncode()
    return process


# Their one release for one torch; the tests that use them are skipped without.
OF_ONE_TORCH = ("torchvision", "timm")


def test_requirements() -> list[str]:
    """Requirements of the package's `test` extra, less those that would replace torch."""
    listed = requires("fusedcnn") or []
    found = [r.split(";")[0].strip() for r in listed if r.endswith('extra == "test"')]
    return [r for r in found if not r.startswith(OF_ONE_TORCH)]


def build_wheel(folder: Path) -> Path:
    """Build the wheel with the running Python's torch and tools."""
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT)
    (wheel,) = folder.glob("fusedcnn-*.whl")
    return wheel


def make_environment(folder: Path, version: str) -> Path:
    """Python of an environment with this torch, which imports."""
    python = folder / "bin" / "python"
    torch = "torch" if version == "newest" else f"torch=={version}"
    if not python.exists():
        run(sys.executable, "-m", "venv", folder)
    if run(python, "-c", "import torch", check=False).returncode == 0:
        return python
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", torch)
    run(python, "-m", "pip", "install", "-q", *PURE)
    if run(python, "-c", "import torch", check=False).returncode:
        print(f"  {torch} does not import alone; installing all that it requires", flush=True)
        run(python, "-m", "pip", "install", "-q", torch)
        run(python, "-c", "import torch")
    return python


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=", ".join(DEFAULT))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="folder for the environments")
    own, tests = sys.argv[1:], []
    if "--" in own:
        own, tests = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    results: dict[str, str] = {}
    failed = False
    with tempfile.TemporaryDirectory(prefix="fusedcnn-versions-") as temporary:
        place = (options.keep or Path(temporary)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        (Path(temporary) / "wheel").mkdir()
        wheel = build_wheel(Path(temporary) / "wheel")
        built = run(sys.executable, "-c", "import torch; print(torch.__version__)").stdout.split()[
            -1
        ]
        print(f"{wheel.name}, built against torch {built}", flush=True)
        for version in options.versions or DEFAULT:
            python = make_environment(place / f"torch-{version}", version)
            run(python, "-m", "pip", "install", "-q", *test_requirements())
            run(python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel)
            found = run(python, "-c", "import torch; print(torch.__version__)").stdout.split()[-1]
            print(f"torch {found}:", flush=True)
            process = run(python, "-m", "pytest", "-q", ROOT / "tests", *tests, check=False)
            failed |= process.returncode != 0
            if process.returncode:
                print(process.stdout)
            results[found] = process.stdout.strip().splitlines()[-1]
            print(f"  {results[found]}", flush=True)
    print(f"one wheel built against torch {built}:")
    for version, result in results.items():
        print(f"  torch {version}: {result}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
