"""Compile a trained FusedSimpleCNN ahead of time into a package that classifies images.

    python examples/train_cifar10.py --epochs 2
    python examples/serve/export.py runs/drawn-fused-seed0 classifier.pt2
    python examples/serve/export.py runs/drawn-fused-seed0 avx2.pt2 --cpu avx2

The package takes uint8 images [N, 3, 32, 32], N from 1 on, and answers with the class and its
probability: normalisation and class names are inside. classify.py beside this file runs it, and so
does main.cpp, without Python.

Exit status: 0 done; 1 not compiled; 2 bad input.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import fusedcnn
import torch
from torch import Tensor, nn

TRAINED_BY = "fusedcnn examples/train_cifar10.py"
FORMAT = "fusedcnn examples/serve, version 1"

# Inductor compiles for the machine that it runs on unless told otherwise. The time is spent in
# fusedcnn and torch, which look at the CPU when they run; vectors of 32 bytes in the rest gain
# little. simdlen: the width of the vectors in Inductor's own loops in bits; 1: none.
CPUS: dict[str, dict[str, Any]] = {
    "any": {"cpp.march": "x86-64", "cpp.simdlen": 1},
    "avx2": {"cpp.march": "x86-64", "cpp.simdlen": 256},
}


class BadInput(Exception):  # noqa: N818
    """Ends the script with one line and exit status 2."""


class Classifier(nn.Module):
    """From uint8 images [N, C, H, W] to their classes [N], int64, and how sure the model is [N]."""

    def __init__(self, model: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", mean.view(-1, 1, 1))
        self.register_buffer("scale", 1 / std.view(-1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model((images - self.mean) * self.scale)
        probability, label = logits.softmax(1).max(1)
        return label, probability


def load_checkpoint(path: Path) -> tuple[Classifier, list[str]]:
    """Read a checkpoint of train_cifar10.py, or that of a folder; and the names of the classes."""
    path = path / "checkpoint.pt" if path.is_dir() else path
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["format"]
        if not found.startswith(TRAINED_BY):
            raise ValueError(f"the format is {found!r}")
        about = state["data"]
        model = fusedcnn.FusedSimpleCNN(num_classes=len(about["class_names"]))
        model.load_state_dict(state["model"])
        return Classifier(model, about["mean"], about["std"]).eval(), about["class_names"]
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # torch.load raises all sorts
        line = (str(error) or type(error).__name__).splitlines()[0]
        raise BadInput(f"{path}: expected a checkpoint of train_cifar10.py: {line}") from error


def export(classifier: nn.Module, names: Sequence[str], output: Path, cpu: str = "any") -> None:
    """Write the package, with all that has to be checked before it is loaded."""
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    metadata = {
        "format": FORMAT,
        "fusedcnn": fusedcnn.__version__,
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "cpu": cpu,
        "image": ", ".join(map(str, images.shape[1:])),
        "classes": "\n".join(names),
    }
    with torch.no_grad():
        program = torch.export.export(classifier, (images,), dynamic_shapes=shapes)
        configs = {"aot_inductor.metadata": metadata, **CPUS[cpu]}
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(output), inductor_configs=configs
        )


def refuse(message: str) -> NoReturn:
    """Replaces argparse's way out, which prints more than a line."""
    raise BadInput(message)


def run(arguments: Sequence[str] | None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="of train_cifar10.py, or its folder")
    parser.add_argument("output", type=Path, help="the package, ending in .pt2")
    parser.add_argument(
        "--cpu", choices=CPUS, default="any", help="where it is to run: x86-64 (default), or AVX2"
    )
    parser.error = refuse
    options = parser.parse_args(arguments)
    if options.output.suffix != ".pt2":
        raise BadInput(f"output: expected a name ending in .pt2, got {options.output}")
    if not os.access(options.output.absolute().parent, os.W_OK):
        raise BadInput(f"output: cannot write into the folder of {options.output}")
    if platform.machine() != "x86_64":
        raise BadInput(f"expected an x86-64 machine, got {platform.machine()}")
    classifier, names = load_checkpoint(options.checkpoint)
    export(classifier, names, options.output, options.cpu)
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB")
    print(f"its operators: {fusedcnn.build_info()['library']}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            run(arguments)
        return 0
    except BadInput as error:
        status, line = 2, str(error)
    except Exception as error:  # compilers and exporters raise all sorts
        status, line = 1, (str(error) or type(error).__name__).splitlines()[0]
    print(f"export.py: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
