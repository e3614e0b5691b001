"""Compile FusedSimpleCNN ahead of time, for a C++ program without Python.

Usage::

    python examples/aoti_cpp/export.py --output simple_cnn.pt2
    python examples/aoti_cpp/export.py --checkpoint runs/drawn-fused-seed0/checkpoint.pt \
        --output simple_cnn.pt2

The package holds the compiled model with its parameters and takes batches of any size. The program
in main.cpp beside this file runs it; CMakeLists.txt says how that is built.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import fusedcnn
import torch


def export(model: torch.nn.Module, output: Path) -> None:
    """Write the model, in evaluation mode, as an AOTInductor package."""
    model.eval()
    images = torch.zeros(4, 3, 32, 32)
    with torch.no_grad():
        program = torch.export.export(
            model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
        )
        torch._inductor.aoti_compile_and_package(program, package_path=str(output))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="of train_cifar10.py; default: no training")
    parser.add_argument("--output", type=Path, required=True, help="the package, ending in .pt2")
    options = parser.parse_args()
    if options.output.suffix != ".pt2":
        parser.error(f"--output: expected a name ending in .pt2, got {options.output}")
    model = fusedcnn.FusedSimpleCNN()
    if options.checkpoint is not None:
        state = torch.load(options.checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
    export(model, options.output)
    print(f"{options.output}; its operators are in {fusedcnn.build_info()['library']}")


if __name__ == "__main__":
    main()
