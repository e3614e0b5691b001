"""The named geometries that all agreement tests run over.

Each is small, since every kernel of every ISA meets every one of them in every dtype, and each is
here for what its name says.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fusedcnn.functional import conv_relu_max_pool2d, pack_geometry
from torch import Tensor

Pair = int | tuple[int, int]


class Block(NamedTuple):
    """One conv2d + bias + ReLU + max_pool2d: shapes and all arguments."""

    name: str
    input: tuple[int, ...]  # [N, C, H, W] or [C, H, W]
    out_channels: int
    kernel: Pair = 3
    stride: Pair = 1
    padding: Pair | str = 0
    dilation: Pair = 1
    groups: int = 1
    bias: bool = True
    pool: Pair = 2
    pool_stride: Pair | None = None
    pool_padding: Pair = 0
    pool_dilation: Pair = 1
    ceil_mode: bool = False

    @property
    def weight(self) -> tuple[int, int, int, int]:
        """Shape of the weight."""
        kernel_h, kernel_w = pair(self.kernel)
        return self.out_channels, self.input[-3] // self.groups, kernel_h, kernel_w

    @property
    def conv_arguments(self) -> tuple[Any, ...]:
        """What follows (input, weight, bias) in F.conv2d."""
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def pool_arguments(self) -> tuple[Any, ...]:
        """What follows the input in F.max_pool2d."""
        return self.pool, self.pool_stride, self.pool_padding, self.pool_dilation, self.ceil_mode

    @property
    def fused_keywords(self) -> dict[str, Any]:
        """The pool's arguments under the names that conv_relu_max_pool2d gives them."""
        return {
            "pool_kernel_size": self.pool,
            "pool_stride": self.pool_stride,
            "pool_padding": self.pool_padding,
            "pool_dilation": self.pool_dilation,
            "ceil_mode": self.ceil_mode,
        }

    def pack(self) -> tuple[int, ...]:
        """The operators' packed geometry."""
        return pack_geometry(self.weight[2:], *self.conv_arguments, **self.fused_keywords)

    def conv(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The stock convolution of this block."""
        return F.conv2d(input, weight, bias, *self.conv_arguments)

    def stock(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The stock layers of this block."""
        return stock(input, weight, bias, *self.conv_arguments, **self.fused_keywords)

    def fused(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The fused function with this block's arguments."""
        operands = input, weight, bias
        return conv_relu_max_pool2d(*operands, *self.conv_arguments, **self.fused_keywords)


def pair(value: Pair) -> tuple[int, int]:
    """(h, w) of an argument that may be one int."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def max_pool2d(
    plane: Tensor,
    kernel: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """The stock pool, and which element of its window won, counted row by row.

    The plane has no -inf. Stands in for F.max_pool2d, whose backward writes outside of the plane
    where a window lies wholly in padding (test_stock_faults.py): here padding is made of elements
    that are -inf, so that every window has a winner.
    """
    size = F.max_pool2d(plane.detach().to("meta"), kernel, stride, padding, dilation, ceil_mode)
    step, before, spread = pair(stride or kernel), pair(padding), pair(dilation)
    kernel = pair(kernel)
    # As far as the last window reaches, which may be short of the plane's end.
    after = [
        (size.shape[axis - 2] - 1) * step[axis] + (kernel[axis] - 1) * spread[axis] + 1
        - before[axis] - plane.shape[axis - 2]
        for axis in (0, 1)
    ]  # fmt: skip
    padded = F.pad(plane, (before[1], after[1], before[0], after[0]), value=-math.inf)
    pooled, index = F.max_pool2d(padded, kernel, step, 0, spread, return_indices=True)
    rows, columns = (torch.arange(n, device=plane.device) for n in pooled.shape[-2:])
    row = index // padded.shape[-1] - rows.view(-1, 1) * step[0]
    column = index % padded.shape[-1] - columns * step[1]
    return pooled, row // spread[0] * kernel[1] + column // spread[1]


def stock(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    pool_kernel_size: Pair = 2,
    pool_stride: Pair | None = None,
    pool_padding: Pair = 0,
    pool_dilation: Pair = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """The stock layers under the block's argument names, with `max_pool2d` above as their pool."""
    plane = F.relu(F.conv2d(input, weight, bias, stride, padding, dilation, groups))
    pool = pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode
    return max_pool2d(plane, *pool)[0]


def _simple_cnn() -> list[Block]:
    return [
        block
        for n in (1, 2, 5)
        for block in (
            Block(f"simplecnn1_n{n}", (n, 3, 32, 32), 16, padding=1),
            Block(f"simplecnn2_n{n}", (n, 16, 16, 16), 32, padding=1),
        )
    ]


def _kernel_sizes() -> list[Block]:
    squares = [
        Block(f"kernel{k}x{k}", (2, 3, 14, 13), 5, kernel=k, padding=k // 2) for k in range(1, 12)
    ]
    return [
        *squares,
        Block("kernel1x7", (2, 3, 9, 15), 6, kernel=(1, 7), padding=(0, 3)),
        Block("kernel5x2", (1, 4, 12, 9), 8, kernel=(5, 2), padding=(2, 1)),
        Block("kernel2x9_no_padding", (1, 2, 7, 19), 3, kernel=(2, 9)),
    ]


def _convolution_arguments() -> list[Block]:
    return [
        Block("stride2", (2, 3, 17, 16), 7, stride=2, padding=1),
        Block("stride3x1", (1, 4, 20, 9), 6, stride=(3, 1), padding=(1, 0)),
        Block("stride_beyond_kernel", (1, 3, 20, 23), 5, kernel=2, stride=4),
        Block("stride_beyond_map", (1, 5, 9, 2), 4, (4, 1), (1, 2), (1, 0), (2, 1), pool=1),
        Block("padding2x0", (1, 3, 9, 11), 8, padding=(2, 0)),
        Block("padding_beyond_kernel", (1, 2, 4, 5), 3, kernel=2, padding=4),
        Block("same_odd", (2, 3, 10, 9), 6, kernel=5, padding="same"),
        Block("same_even", (2, 3, 10, 9), 6, kernel=4, padding="same"),
        Block("same_even_by_odd", (1, 3, 8, 11), 6, kernel=(2, 3), padding="same"),
        Block("same_even_dilated", (1, 3, 12, 11), 5, kernel=(2, 4), padding="same", dilation=3),
        Block("valid", (2, 3, 10, 12), 6, padding="valid"),
        Block("dilation2", (2, 3, 13, 12), 6, padding=2, dilation=2),
        Block("dilation3x1_stride2", (1, 3, 19, 12), 6, stride=2, padding=(3, 1), dilation=(3, 1)),
        Block("dilated_row", (2, 3, 9, 14), 6, kernel=(1, 4), padding=(0, 3), dilation=(1, 2)),
        Block("dilated_column", (2, 3, 14, 9), 6, kernel=(4, 1), padding=(3, 0), dilation=(2, 3)),
        Block("groups2", (2, 6, 10, 10), 8, padding=1, groups=2),
        Block("one_column", (2, 9, 21, 9), 96, (2, 3), 4, 0, (1, 3), groups=3, pool=(2, 1)),
        Block("groups3_wide", (1, 51, 8, 8), 54, padding=1, groups=3),
        Block("depthwise", (2, 17, 10, 10), 17, padding=1, groups=17),
        Block("depth_multiplier3", (1, 5, 9, 12), 15, padding=1, groups=5),
        Block("depthwise_5x5_stride2", (1, 16, 15, 15), 16, 5, 2, 2, groups=16),
        Block("no_bias", (2, 3, 10, 10), 16, padding=1, bias=False),
        Block("no_bias_general", (1, 3, 11, 10), 5, kernel=4, bias=False, pool=3),
        Block("unbatched", (3, 12, 10), 16, padding=1),
        Block("unbatched_general", (4, 13, 9), 6, 5, 2, 2, pool=3, pool_stride=1),
    ]


_WIDE_POOL_OF_PADDING = {
    "pool": 16,
    "pool_stride": 30,
    "pool_padding": 8,
    "pool_dilation": (1, 3),
    "ceil_mode": True,
}


def _pool_arguments() -> list[Block]:
    small = (2, 3, 12, 13)
    return [
        Block("pool1", small, 6, padding=1, pool=1),
        Block("pool1_stride2", small, 6, padding=1, pool=1, pool_stride=2),
        Block("pool3", small, 6, padding=1, pool=3),
        Block("pool3_stride2", small, 6, padding=1, pool=3, pool_stride=2),
        Block("pool3_stride1", small, 6, padding=1, pool=3, pool_stride=1),
        Block("pool2_stride1", small, 16, padding=1, pool_stride=1),
        Block("pool2_padding1", small, 16, padding=1, pool_padding=1),
        Block("pool3_padding1", small, 6, padding=1, pool=3, pool_stride=2, pool_padding=1),
        Block("pool_gapped", small, 6, padding=1, pool_stride=3),
        Block("pool_gapped5x4", (1, 3, 17, 15), 6, padding=1, pool=(2, 3), pool_stride=(5, 4)),
        Block("pool_dilation2", small, 6, padding=1, pool_dilation=2),
        Block("pool_dilation_overlapping", small, 5, pool=3, pool_stride=1, pool_dilation=(2, 3)),
        Block("pool_dilation_padding", small, 5, pool=3, pool_padding=1, pool_dilation=2),
        # The only window of the height or width lies in padding, between whose elements it falls.
        Block("pool_of_padding", (2, 3, 4, 13), 5, padding=(0, 1), pool_padding=1, pool_dilation=3),
        Block("pool_of_padding16", (1, 2, 9, 3), 4, 3, padding=(1, 0), **_WIDE_POOL_OF_PADDING),
        Block("pool3x1", small, 6, padding=1, pool=(3, 1)),
        Block("pool1x4_stride2x3", small, 6, padding=1, pool=(1, 4), pool_stride=(2, 3)),
        Block("pool_rectangular", small, 6, pool=(4, 2), pool_stride=(1, 2), pool_padding=(2, 1)),
        Block("ceil_even", (2, 3, 12, 12), 16, padding=1, ceil_mode=True),
        Block("ceil_odd", (2, 3, 11, 13), 16, padding=1, ceil_mode=True),
        Block("ceil_pool3_stride2", small, 6, padding=1, pool=3, pool_stride=2, ceil_mode=True),
        Block(
            "ceil_padding", (1, 3, 9, 10), 6, pool=3, pool_stride=2, pool_padding=1, ceil_mode=True
        ),
        # The last window would start in the padding: torch drops it.
        Block(
            "ceil_dropped_window", (1, 2, 6, 8), 5, 1, pool_stride=3, pool_padding=1, ceil_mode=True
        ),
        Block("window15x17", (1, 2, 17, 19), 4, padding=1, pool=(15, 17), pool_stride=1),
        Block("window256", (1, 2, 17, 18), 4, padding=1, pool=16, pool_stride=1),
        Block("window289", (1, 2, 20, 19), 5, padding=1, pool=17, pool_stride=2),
        Block("window19x20_padded", (1, 2, 16, 19), 3, 2, pool=(19, 20), pool_padding=(9, 10)),
        Block("global_pool", (3, 3, 9, 7), 20, padding=1, pool=(9, 7)),
    ]


def _large_windows() -> list[Block]:
    """Pools as large as the map, or larger: over images, over text, overlapping, dilated."""
    return [
        Block("global_pool14", (3, 16, 14, 14), 32, padding=1, pool=14),
        Block("global_pool32x30", (2, 3, 32, 30), 16, padding=1, pool=(32, 30)),
        Block("global_pool_few", (1, 4, 29, 34), 3, padding=1, pool=(29, 34)),
        Block("global_pool_depthwise", (9, 17, 11, 12), 17, padding=1, groups=17, pool=(11, 12)),
        Block("global_pool_shared_out", (1, 16, 32, 31), 32, padding=1, pool=(32, 31)),
        Block("window_beyond_map", (1, 2, 6, 6), 3, padding=1, pool=600, pool_padding=300),
        Block("text_kernel", (2, 1, 40, 12), 20, kernel=(3, 12), pool=(38, 1)),
        Block("text_column", (2, 8, 60, 1), 5, kernel=(3, 1), pool=(58, 1)),
        Block(
            "text_column_padded",
            (2, 8, 60, 1),
            16,
            (3, 1),
            padding=(1, 0),
            pool=(60, 1),
            pool_padding=(30, 0),
        ),
        Block("text_row", (2, 8, 1, 300), 16, kernel=(1, 3), pool=(1, 298)),
        Block(
            "large_overlapping",
            (1, 3, 24, 40),
            12,
            padding=1,
            pool=(9, 8),
            pool_stride=(2, 1),
            pool_padding=4,
        ),
        Block(
            "large_dilated",
            (1, 2, 31, 30),
            6,
            padding=1,
            pool=(9, 7),
            pool_stride=(1, 3),
            pool_padding=3,
            pool_dilation=(2, 3),
        ),
    ]


def _networks() -> list[Block]:
    """Blocks of well-known networks, with fewer pixels or channels where theirs are many."""
    return [
        Block("lenet5_1", (2, 1, 32, 32), 6, kernel=5),
        Block("lenet5_2", (2, 6, 14, 14), 16, kernel=5),
        Block("alexnet1", (1, 3, 67, 67), 16, 11, 4, 2, pool=3, pool_stride=2),
        Block("alexnet2", (1, 16, 13, 13), 24, 5, 1, 2, pool=3, pool_stride=2),
        Block("resnet_stem", (1, 3, 38, 38), 16, 7, 2, 3, pool=3, pool_stride=2, pool_padding=1),
        Block("vgg64", (1, 64, 14, 14), 64, padding=1),
    ]


def _specialised() -> list[Block]:
    """3x3 stride 1 with 2x2 pools: odd and even sizes, tails of every vector width, paddings."""
    maps = [
        Block(f"map{h}x{w}_p{p}", (1, 3, h, w), 16, padding=p)
        for h, w, p in (
            (2, 2, 1),
            (2, 5, 1),
            (3, 2, 1),
            (3, 3, 1),
            (4, 4, 0),
            (5, 4, 0),
            (5, 5, 1),
            (7, 18, 1),
            (4, 4, 2),
            (1, 1, 2),
            (1, 9, 2),
            (6, 1, 2),
            (9, 33, 0),
            (8, 16, 2),
            (6, 67, 1),
        )
    ]
    channels = [
        Block(f"channels{c}to{out}", (2, c, 10, 12), out, padding=1)
        for c, out in ((1, 1), (1, 16), (2, 8), (3, 5), (3, 17), (4, 33), (5, 3), (8, 12))
    ]
    wide = [
        Block(f"channels{c}to{out}", (1, c, 8, 6), out, padding=1)
        for c, out in ((15, 31), (16, 16), (17, 17), (20, 7), (31, 48), (33, 64), (64, 40))
    ]
    wide_maps = [
        Block(f"wide_map{h}x{w}_p{p}", (1, 16, h, w), 17, padding=p)
        for h, w, p in (
            (4, 4, 0),
            (4, 4, 1),
            (5, 7, 1),
            (6, 9, 0),
            (7, 6, 2),
            (9, 10, 1),
            (11, 13, 0),
            (12, 12, 2),
            (13, 34, 1),
            (4, 67, 1),
            (18, 5, 2),
            (10, 16, 1),
            (8, 33, 1),
        )
    ]
    return maps + channels + wide + wide_maps


BLOCKS: list[Block] = [
    *_simple_cnn(),
    *_kernel_sizes(),
    *_convolution_arguments(),
    *_pool_arguments(),
    *_large_windows(),
    *_networks(),
    *_specialised(),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype: float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def by_name(name: str) -> Block:
    """The block of this name."""
    return next(block for block in BLOCKS if block.name == name)
