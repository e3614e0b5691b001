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
import sys
import tempfile
from importlib.metadata import requires
from pathlib import Path

from environments import ROOT, CommandError, Environment, run

DEFAULT = ["2.10.0", "2.11.0", "newest"]
# What `import torch` needs beside itself, in every build.
PURE = ["filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "setuptools"]
# Their one release for one torch; the tests that use them are skipped without.
OF_ONE_TORCH = ("torchvision", "timm")


def test_requirements() -> list[str]:
    """Requirements of the package's `test` extra, less those that would replace torch."""
    listed = requires("fusedcnn") or []
    found = [r.split(";")[0].strip() for r in listed if r.endswith('extra == "test"')]
    return [r for r in found if not r.startswith(OF_ONE_TORCH)]


def install_torch(environment: Environment, version: str) -> str:
    """Install torch so that it imports; the version."""
    try:
        return environment.torch_version()  # kept from an earlier run
    except CommandError:
        torch = "torch" if version == "newest" else f"torch=={version}"
        environment.pip("install", "-q", "--no-deps", "--upgrade", torch)
        environment.pip("install", "-q", *PURE)
    try:
        return environment.torch_version()
    except CommandError:
        print(f"  {torch} does not import alone; installing all that it requires", flush=True)
        environment.pip("install", "-q", torch)
        return environment.torch_version()


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
    failed = False
    with tempfile.TemporaryDirectory(prefix="fusedcnn-versions-") as temporary:
        place = (options.keep or Path(temporary)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        wheels = Path(temporary) / "wheels"
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, ROOT, cwd=ROOT)
        (wheel,) = wheels.glob("fusedcnn-*.whl")
        print(wheel.name, flush=True)
        for version in options.versions or DEFAULT:
            environment = Environment(place / f"torch-{version}")
            found = install_torch(environment, version)
            environment.pip("install", "-q", *test_requirements())
            environment.pip("install", "-q", "--no-deps", "--force-reinstall", wheel)
            try:
                said = environment.run("-m", "pytest", "-q", ROOT / "tests", *tests, cwd=ROOT)
                print(f"torch {found}: {said.strip().splitlines()[-1]}", flush=True)
            except CommandError as error:
                failed = True
                print(f"torch {found}: FAILED: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
