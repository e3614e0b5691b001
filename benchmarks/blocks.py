"""Blocks of real networks: convolution, bias, ReLU and max pooling, by name."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import fusedcnn
import torch
from fusedcnn._ops import Geometry
from fusedcnn.functional import pack_geometry
from torch import Tensor, nn

Pair = tuple[int, int]


@dataclass(frozen=True)
class Block:
    """One block's sizes; every pair is (height, width).

    Attributes:
        name: on the command line and in the JSON.
        title: for people.
        in_channels: of the input; a block of 1 or 3 channels is a network's first and reads images,
            which need no gradient.
        size: of the input.
        out_channels: of the convolution.
        kernel_size: of the convolution, like the four that follow.
        stride: see above.
        padding: see above.
        dilation: see above.
        groups: see above.
        pool_kernel_size: of the pool, like all that follow.
        pool_stride: see above; None: ``pool_kernel_size``.
        pool_padding: see above.
        pool_dilation: see above.
        ceil_mode: see above.
        batch: images of a training step, no more than keeps a call within some 100 ms.
    """

    name: str
    title: str
    in_channels: int
    size: Pair
    out_channels: int
    kernel_size: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    pool_kernel_size: Pair = (2, 2)
    pool_stride: Pair | None = None
    pool_padding: Pair = (0, 0)
    pool_dilation: Pair = (1, 1)
    ceil_mode: bool = False
    batch: int = 64

    @property
    def image(self) -> tuple[int, int, int]:
        """(C, H, W) of the input."""
        return (self.in_channels, *self.size)

    @property
    def reads_images(self) -> bool:
        """Whether the input is data, which needs no gradient, and no activation."""
        return self.in_channels in (1, 3)

    def stock(self) -> nn.Sequential:
        """The block from stock layers; its fused form has the same state_dict keys."""
        pool = nn.MaxPool2d(
            self.pool_kernel_size,
            self.pool_stride,
            self.pool_padding,
            self.pool_dilation,
            ceil_mode=self.ceil_mode,
        )
        return nn.Sequential(self._convolution(), nn.ReLU(), pool)

    def fused(self) -> nn.Sequential:
        """The same block, fused."""
        block = fusedcnn.ConvReLUMaxPool2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            **self._pool_arguments(),
        )
        return nn.Sequential(block)

    def geometry(self) -> Geometry:
        """The operators' ``geometry``."""
        return pack_geometry(
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            **self._pool_arguments(),
        )

    @functools.cached_property
    def flops(self) -> int:
        """FLOPs per image of the direct convolution: a multiply and an add for each tap."""
        with torch.device("meta"):
            outputs = self._convolution()(torch.empty(self.image)).numel()
        taps = self.kernel_size[0] * self.kernel_size[1]
        return 2 * outputs * (self.in_channels // self.groups) * taps

    @functools.cached_property
    def output(self) -> torch.Size:
        """(out_channels, H, W) after the pool.

        Raises:
            RuntimeError, ValueError: the sizes do not go together.
        """
        with torch.device("meta"):
            output: Tensor = self.stock()(torch.empty(self.image))
        return output.shape

    def describe(self) -> dict[str, object]:
        """The sizes as plain values, ready for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _convolution(self) -> nn.Conv2d:
        return nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )

    def _pool_arguments(self) -> dict[str, object]:
        return {
            "pool_kernel_size": self.pool_kernel_size,
            "pool_stride": self.pool_stride,
            "pool_padding": self.pool_padding,
            "pool_dilation": self.pool_dilation,
            "ceil_mode": self.ceil_mode,
        }


def _square(
    name: str,
    title: str,
    channels: tuple[int, int],
    size: int,
    kernel: int,
    *,
    batch: int,
    stride: int = 1,
    padding: int = 0,
    pool: tuple[int, int, int] = (2, 2, 0),
) -> Block:
    """A block of square sizes; ``pool`` is kernel size, stride and padding."""
    return Block(
        name=name,
        title=title,
        in_channels=channels[0],
        size=(size, size),
        out_channels=channels[1],
        kernel_size=(kernel, kernel),
        stride=(stride, stride),
        padding=(padding, padding),
        pool_kernel_size=(pool[0], pool[0]),
        pool_stride=(pool[1], pool[1]),
        pool_padding=(pool[2], pool[2]),
        batch=batch,
    )


# Overlapping windows, as in AlexNet.
POOL3 = (3, 2, 0)

# fmt: off
BLOCKS = (
    _square("simplecnn-1", "SimpleCNN, first block", (3, 16), 32, 3, padding=1, batch=64),
    _square("simplecnn-2", "SimpleCNN, second block", (16, 32), 16, 3, padding=1, batch=64),
    _square("lenet-1", "LeNet-5, first block", (1, 6), 32, 5, batch=64),
    _square("lenet-2", "LeNet-5, second block", (6, 16), 14, 5, batch=64),
    _square("alexnet-1", "AlexNet, first convolution", (3, 64), 224, 11, stride=4, padding=2,
            pool=POOL3, batch=16),
    _square("alexnet-2", "AlexNet, second convolution", (64, 192), 27, 5, padding=2, pool=POOL3,
            batch=16),
    _square("alexnet-5", "AlexNet, fifth convolution", (256, 256), 13, 3, padding=1, pool=POOL3,
            batch=16),
    _square("stem", "7x7 stem of a ResNet", (3, 64), 224, 7, stride=2, padding=3, pool=(3, 2, 1),
            batch=8),
    _square("vgg11-1", "VGG-11, stage 1", (3, 64), 224, 3, padding=1, batch=4),
    _square("vgg11-2", "VGG-11, stage 2", (64, 128), 112, 3, padding=1, batch=4),
    _square("vgg11-3", "VGG-11, last of stage 3", (256, 256), 56, 3, padding=1, batch=4),
    _square("vgg11-4", "VGG-11, last of stage 4", (512, 512), 28, 3, padding=1, batch=4),
    _square("vgg11-5", "VGG-11, last of stage 5", (512, 512), 14, 3, padding=1, batch=4),
    _square("cifar-1", "CIFAR net, first block", (3, 64), 32, 3, padding=1, batch=64),
    _square("cifar-2", "CIFAR net, second block", (64, 128), 16, 3, padding=1, batch=64),
    _square("cifar-3", "CIFAR net, third block", (128, 256), 8, 3, padding=1, batch=64),
    _square("gray-1", "28x28 grayscale net, first block", (1, 32), 28, 3, padding=1, batch=64),
    _square("gray-2", "28x28 grayscale net, second block", (32, 64), 14, 3, padding=1, batch=64),
)
# fmt: on

BY_NAME = {block.name: block for block in BLOCKS}
SIMPLECNN_1, SIMPLECNN_2 = BY_NAME["simplecnn-1"], BY_NAME["simplecnn-2"]
