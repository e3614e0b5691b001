"""Classify images with a package of export.py.

    python examples/serve/classify.py classifier.pt2 images.npy
    OMP_NUM_THREADS=1 python examples/serve/classify.py classifier.pt2 images.npy --time 1000

IMAGES: uint8 [N, 3, 32, 32], as numpy.save writes them. For each, a line with its class and how
sure the model is. main.cpp beside this file does the same without Python.

Exit status: 0 done; 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

try:
    import fusedcnn  # its operators are what the package calls
    import numpy as np
    import torch
except ImportError as error:
    print(f"classify.py: {error}: pip install fusedcnn numpy", file=sys.stderr)
    sys.exit(2)

FORMAT = "fusedcnn examples/serve, version 1"


class BadInput(Exception):  # noqa: N818
    """Ends the script with one line and exit status 2."""


def read_metadata(path: Path) -> dict[str, str]:
    """Read what export.py wrote into the package, and check that the package can run here.

    Loading runs code of the package: all that may be wrong is found before.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:  # torch does not look at checksums
                raise BadInput(f"{path}: wrong checksum of {damaged}")
            files = [name for name in archive.namelist() if name.endswith("wrapper_metadata.json")]
            metadata = json.loads(archive.read(files[0])) if files else {}
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    except (zipfile.BadZipFile, ValueError) as error:
        raise BadInput(f"{path}: expected a package of export.py: {error}") from error
    here = {
        "format": FORMAT,
        "fusedcnn": fusedcnn.__version__,
        "torch": ".".join(torch.__version__.split(".")[:2]),
    }
    for key, value in here.items():
        if key not in metadata:
            raise BadInput(f"{path}: expected a package of export.py, got another one")
        if metadata[key] != value:
            raise BadInput(f"{path}: made for {key} {metadata[key]}, this is {value}")
    capability = torch.backends.cpu.get_cpu_capability()
    if metadata["cpu"] != "any" and not (
        metadata["cpu"] == "avx2" and capability.startswith("AVX")
    ):
        raise BadInput(f"{path}: made for CPUs with {metadata['cpu']}, this one has {capability}")
    return metadata


def read_images(path: Path, image: str) -> torch.Tensor:
    """Read images whose sizes are ``image``, such as "3, 32, 32"."""
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise BadInput(f"{path}: expected an array of numpy.save, whole") from error
    got = f"{array.dtype} {[*array.shape]}"
    if array.dtype != np.uint8 or not got.endswith(f", {image}]") or array.ndim != 4:
        raise BadInput(f"{path}: expected uint8 [N, {image}], got {got}")
    if not len(array):
        raise BadInput(f"{path}: expected an image or more, got none")
    return torch.from_numpy(np.ascontiguousarray(array))


def refuse(message: str) -> NoReturn:
    """Replaces argparse's way out, which prints more than a line."""
    raise BadInput(message)


def run(arguments: Sequence[str] | None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path)
    parser.add_argument("images", type=Path, help="uint8 [N, 3, 32, 32], as numpy.save writes them")
    parser.add_argument("--batch", type=int, default=64, help="images of a call; default: 64")
    parser.add_argument("--time", type=int, metavar="CALLS", help="time the first batch instead")
    parser.error = refuse
    options = parser.parse_args(arguments)
    if options.batch < 1 or (options.time is not None and options.time < 1):
        raise BadInput("--batch, --time: expected a number from 1 on")
    metadata = read_metadata(options.package)
    names = metadata["classes"].split("\n")
    batches = read_images(options.images, metadata["image"]).split(options.batch)
    # torch._inductor.aoti_load_package makes the same, and besides runs the C++ compiler to learn
    # what the CPU can do. Calls through `loader.run` take and return lists of tensors; the object
    # that aoti_load_package returns flattens and restores nested arguments at each call.
    loader = torch._C._aoti.AOTIModelPackageLoader(str(options.package), "model", False, 1, -1)
    if options.time is not None:
        times = []
        for _ in range(10 + options.time):
            started = time.perf_counter_ns()
            loader.run([batches[0]])
            times.append((time.perf_counter_ns() - started) / 1e3)
        timed = times[10:]
        line = f"{len(batches[0])} images, {torch.get_num_threads()} threads: median "
        print(f"{line}{statistics.median(timed):.1f} us, least {min(timed):.1f} us")
        return
    for batch in batches:
        for label, probability in zip(*loader.run([batch]), strict=True):
            print(f"{names[label]}\t{probability:.3f}")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    try:
        run(arguments)
        return 0
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left of the answer
        line = f"cannot write the answer: {error.strerror}"
    except (BadInput, RuntimeError) as error:  # torch's, of a package that it cannot load
        line = str(error).splitlines()[0]
    print(f"classify.py: {line}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
