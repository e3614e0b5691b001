"""Ten-class 32x32 images: CIFAR-10's binary files, or images drawn here when there are none."""

from __future__ import annotations

import fnmatch
import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

NUM_CLASSES = 10
SIZE = 32
PIXEL_BYTES = 3 * SIZE * SIZE
RECORD_BYTES = 1 + PIXEL_BYTES


class DataError(ValueError):
    """A folder or file that does not hold what CIFAR-10's format says; the message is one line."""


class Images(NamedTuple):
    """Images and what they show.

    Attributes:
        images: uint8 [N, 3, 32, 32], red, green, blue.
        labels: int64 [N], 0 to 9.
    """

    images: Tensor
    labels: Tensor


class Dataset(NamedTuple):
    """Training and test images, and what is known about them.

    Attributes:
        train: the images to learn from.
        test: the images to measure with.
        class_names: ten names, by label.
        source: for people, where the images are from.
        fingerprint: equal for equal images in equal order, and for those only.
    """

    train: Images
    test: Images
    class_names: list[str]
    source: str
    fingerprint: str

    def first(self, train_images: int, test_images: int) -> Dataset:
        """The first so many training and test images."""
        return self._replace(
            train=Images(*(tensor[:train_images] for tensor in self.train)),
            test=Images(*(tensor[:test_images] for tensor in self.test)),
            fingerprint=f"{self.fingerprint}, first {train_images} + {test_images}",
        )


# ---- CIFAR-10's binary format --------------------------------------------------------------------


def read_cifar10(folder: Path) -> Dataset:
    """Read the ``data_batch_*.bin`` and the ``test_batch.bin`` of a folder.

    A file is a row of 3073-byte records: one byte for the label, then 1024 bytes each of red, green
    and blue, row by row (https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version").
    ``batches.meta.txt``, where present, holds the class names, one a line.

    Args:
        folder: holds the files; any number of training batches, read in order of their numbers.

    Raises:
        DataError: a file is missing, cannot be read, is empty or cut short, or has a label over 9.
    """
    try:
        names = fnmatch.filter(os.listdir(folder), "data_batch_*.bin")
    except OSError as error:
        raise DataError(
            f"expected a folder with CIFAR-10's binary files, got {folder}: {error.strerror}"
        ) from error
    if not names:
        raise DataError(f"expected data_batch_*.bin files in {folder}, got none")
    # Shorter names first, so that data_batch_10 comes after data_batch_2.
    names.sort(key=lambda name: (len(name), name))
    parts = [read_batch(folder / name) for name in names]
    train = Images(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    test = read_batch(folder / "test_batch.bin")
    return Dataset(
        train,
        test,
        _read_class_names(folder / "batches.meta.txt"),
        f"CIFAR-10 files of {folder.name}",
        _fingerprint(*train, *test),
    )


def read_batch(path: Path) -> Images:
    """Read one file of CIFAR-10's binary format.

    Raises:
        DataError: it is missing, cannot be read, is empty or cut short, or has a label over 9.
    """
    try:
        data = bytearray(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if not data or len(data) % RECORD_BYTES:
        raise DataError(
            f"{path}: expected one or more records of {RECORD_BYTES} bytes, got {len(data)} bytes"
            + (f" ({len(data) / RECORD_BYTES:.2f} records)" if data else "")
        )
    records = torch.frombuffer(data, dtype=torch.uint8).view(-1, RECORD_BYTES)
    labels = records[:, 0].long()
    bad = (labels >= NUM_CLASSES).nonzero()
    if len(bad):
        record = int(bad[0])
        raise DataError(
            f"{path}: expected labels 0 to {NUM_CLASSES - 1}, "
            f"got {int(labels[record])} in record {record}"
        )
    return Images(records[:, 1:].reshape(-1, 3, SIZE, SIZE), labels)


def _read_class_names(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return [f"class {label}" for label in range(NUM_CLASSES)]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    names = [line.strip() for line in lines if line.strip()]
    if len(names) != NUM_CLASSES:
        raise DataError(f"{path}: expected {NUM_CLASSES} class names, got {len(names)}")
    return names


def _fingerprint(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{list(tensor.shape)}".encode())
        digest.update(memoryview(tensor.contiguous().numpy()).cast("B"))
    return digest.hexdigest()


# ---- drawn images --------------------------------------------------------------------------------
#
# Each class is a figure given by a function of coordinates in which the figure has radius 1. It
# returns a signed distance: below 0 inside the figure, above 0 outside.


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(y, 0.866 * x.abs() - 0.5 * y) - 0.5


def _cross(x: Tensor, y: Tensor) -> Tensor:
    upright = torch.maximum(x.abs() - 0.3, y.abs() - 1)
    level = torch.maximum(x.abs() - 1, y.abs() - 0.3)
    return torch.minimum(upright, level)


def _stripes(along: Tensor) -> Tensor:
    return 0.2 * torch.sin(2 * math.pi * along)


def _dots(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x - x.round(), y - y.round()) - 0.3


FIGURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda x, y: torch.hypot(x, y) - 0.9,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.8).abs() - 0.2,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.8,
    "triangle": _triangle,
    "cross": _cross,
    "level stripes": lambda x, y: _stripes(y),
    "upright stripes": lambda x, y: _stripes(x),
    "slanted stripes": lambda x, y: _stripes((x + y) * 0.7071),
    "checkerboard": lambda x, y: 0.2 * torch.sin(math.pi * x) * torch.sin(math.pi * y),
    "dots": _dots,
}


def draw_dataset(train_images: int | None = None, test_images: int | None = None) -> Dataset:
    """Draw ten classes of figures and textures; the same call draws the same images.

    Args:
        train_images: how many training images; default: 10,000.
        test_images: how many test images, drawn apart from the training images; default: 2,000.
    """
    train_images = 10_000 if train_images is None else train_images
    test_images = 2_000 if test_images is None else test_images
    return Dataset(
        # The training and the test images come from two seeds, and from no setting of a run: runs
        # that differ in their seed stay comparable.
        draw_images(train_images, seed=1),
        draw_images(test_images, seed=2),
        list(FIGURES),
        "images drawn by examples/cifar10.py",
        # Not a hash of the pixels: a CPU with other vector instructions may round a few otherwise.
        f"drawn, version 1, {train_images} + {test_images}",
    )


def draw_images(count: int, seed: int) -> Images:
    """Draw ``count`` images in random order, with equally many of each class to within one.

    Place, size, turn, colours, contrast, light and noise are random, so that no pixel and no colour
    gives a class away.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % NUM_CLASSES
    labels = labels[torch.randperm(count, generator=generator)]
    # In parts, since the float images take a hundred times the memory of one part's result.
    parts = [_draw_part(part, generator) for part in labels.split(1000)]
    return Images(torch.cat(parts), labels)


def _draw_part(labels: Tensor, generator: torch.Generator) -> Tensor:
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        values = torch.rand(count, *(shape or (1, 1)), generator=generator)
        return low + (high - low) * values

    # Each image's own coordinates, [count, 32, 32].
    size = uniform(5, 11)
    row = (torch.arange(SIZE).view(1, SIZE, 1) - uniform(10, 21)) / size
    column = (torch.arange(SIZE).view(1, 1, SIZE) - uniform(10, 21)) / size
    angle = uniform(-0.3, 0.3)
    x = angle.cos() * column + angle.sin() * row
    y = angle.cos() * row - angle.sin() * column

    distance = torch.empty(count, SIZE, SIZE)
    for label, figure in enumerate(FIGURES.values()):
        members = labels == label
        distance[members] = figure(x[members], y[members])
    cover = (0.5 - distance * size).clamp(0, 1).unsqueeze(1)  # edges one pixel soft

    # Two colours apart by a random contrast, a slope of light, and noise.
    background = uniform(0.1, 0.9, 3, 1, 1)
    contrast = uniform(-1, 1, 3, 1, 1)
    contrast *= uniform(0.15, 0.7, 1, 1, 1) / contrast.abs().amax(1, keepdim=True)
    light = (uniform(-0.15, 0.15) * row + uniform(-0.15, 0.15) * column).unsqueeze(1)
    noise = torch.randn(count, 3, SIZE, SIZE, generator=generator) * uniform(0.02, 0.2, 1, 1, 1)
    image = background + contrast * cover + light + noise
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)


# ---- batches -------------------------------------------------------------------------------------


class Batches:
    """Images in memory on one device, served as normalised batches.

    They stay bytes: a quarter of the memory of floats, and normalising a batch after gathering it
    takes no longer than gathering floats.
    """

    def __init__(self, images: Images, mean: Tensor, std: Tensor, device: torch.device) -> None:
        self.images = images.images.to(device)
        self.labels = images.labels.to(device)
        self.mean = mean.view(1, 3, 1, 1).to(device)
        self.scale = 1 / std.view(1, 3, 1, 1).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 images [N, 3, 32, 32] and int64 labels [N] for an int64 index [N]."""
        images = (self.images.index_select(0, index) - self.mean).mul_(self.scale)
        return images, self.labels.index_select(0, index)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of uint8 [N, 3, H, W], in units of a byte's step.

    Computed from counts of the 256 values: exact, and without a float copy of the images.
    """
    values = torch.arange(256, dtype=torch.float64)
    means, stds = [], []
    for channel in range(3):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        mean = (counts @ values) / counts.sum()
        means.append(mean)
        stds.append((counts @ (values - mean).square() / counts.sum()).sqrt())
    # The floor keeps images of a single colour from dividing by zero.
    return torch.stack(means).float(), torch.stack(stds).clamp_min(1).float()
