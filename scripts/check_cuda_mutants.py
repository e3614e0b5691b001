"""Fails unless the CUDA kernels' self-test on the CPU catches every fault that is planted here.

Each mutant is one textual change of a kernel's source, of the kind that a GPU would answer with
wrong numbers now and then, or never on the machine at hand. For each, only the changed unit is
compiled anew and the self-test (tests/cuda_on_cpu) must fail. A mutant whose text no longer occurs,
exactly once, in its file is an error too: adapt it, or it checks nothing. White space and the line
breaks of comments do not count, so that formatting the sources changes no mutant.

    python scripts/check_cuda_mutants.py BUILD_DIR [--only NAME] [--sample N --seed S] [--jobs N]

BUILD_DIR is a build of the kernels alone (-DFUSEDCNN_KERNELS_ONLY=ON), whose compile commands are
used; it is not changed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
FORWARD = "kernels/forward_general.cu"
WEIGHT = "kernels/backward_weight_general.cu"
INPUT = "kernels/backward_input_general.cu"
MMA = "kernels/mma.h"
INPUT_MMA = "kernels/backward_input_tensor_cores_3x3.cu"
INPUT_MMA_TILE = "kernels/backward_input_tensor_cores_3x3_tile.h"
POOL = "kernels/block_3x3.h"
INPUT_WINDOWS = "kernels/backward_input_winners_3x3.cu"
WEIGHT_LANES = "kernels/backward_weight_winners_3x3_few_channels.cu"
WEIGHT_MMA = "kernels/backward_weight_tensor_cores_3x3.cu"
WEIGHT_WINDOWS = "kernels/backward_weight_winners_3x3.cu"
FORWARD_MMA = "kernels/forward_tensor_cores.h"
FORWARD_WINDOWS = "kernels/forward_cuda_cores_3x3.cu"
SPLIT = "kernels/split_tf32.h"
_TOKEN = re.compile(r"\w+|\S")
_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)
SECONDS = 600  # that one self-test may take; a mutant that hangs is caught, too


class Mutant(NamedTuple):
    """One fault: `new` in place of `old`, which occurs once in `file`."""

    name: str
    file: str
    old: str
    new: str


MUTANTS = [
    Mutant(
        "forward: no barrier between fetching a slice and using it",
        FORWARD,
        "        sync_threads();\n        FUSEDCNN_UNROLL\n        for (int k = 0; k < kSlice;",
        "        FUSEDCNN_UNROLL\n        for (int k = 0; k < kSlice;",
    ),
    Mutant(
        "forward: no barrier between using a slice and fetching the next",
        FORWARD,
        "        sync_threads();\n        if ((k0 + kSlice) % kChain == 0",
        "        if ((k0 + kSlice) % kChain == 0",
    ),
    Mutant(
        "forward: no barrier before the products are pooled",
        FORWARD,
        "      sync_threads();\n\n      FUSEDCNN_UNROLL\n      for (int j = 0; j < kStates; ++j) {",
        "      FUSEDCNN_UNROLL\n      for (int j = 0; j < kStates; ++j) {",
    ),
    Mutant(
        "forward: the last maximum wins a tie",
        FORWARD,
        "if (value > best[j] || value != value",
        "if (value >= best[j] || value != value",
    ),
    Mutant(
        "forward: NaN is dropped",
        FORWARD,
        "value > best[j] || value != value || winner[j] < 0",
        "value > best[j] || winner[j] < 0",
    ),
    Mutant(
        "forward: the code counts columns by the wrong pitch",
        FORWARD,
        "winner[j] = ph * w.pool_kernel + pw;",
        "winner[j] = ph * h.pool_kernel + pw;",
    ),
    Mutant(
        "forward: ReLU lets 0 through as live",
        FORWARD,
        "const bool off = best[j] <= 0;",
        "const bool off = best[j] < 0;",
    ),
    Mutant(
        "forward: a window without elements gives 0",
        FORWARD,
        "const T value = off && winner[j] >= 0 ? T(0) : best[j];",
        "const T value = off ? T(0) : best[j];",
    ),
    Mutant(
        "forward: pixels right of the image are read",
        FORWARD,
        "if (inside(ih, h.in) && inside(iw, w.in)) {",
        "if (inside(ih, h.in) && inside(iw, w.in + 1)) {",
    ),
    Mutant(
        "forward: tile too short by one row where windows overlap",
        FORWARD,
        "tile.rows = (outputs - 1) * tile.step + (axis.pool_kernel - 1) * tile.spread + 1;",
        "tile.rows = (outputs - 1) * tile.step + (axis.pool_kernel - 1) * tile.spread;",
    ),
    Mutant(
        "forward: no guard at the last output channels",
        FORWARD,
        "          first_channel + r >= sizes.out_channels) {",
        "          first_channel + r > sizes.out_channels) {",
    ),
    Mutant(
        "forward: the bias of the neighbouring channel",
        FORWARD,
        "(channel_base + row0 + r) * args.bias_stride",
        "(channel_base + row0 + (r ^ 1)) * args.bias_stride",
    ),
    Mutant(
        "forward: a launch asks for too little shared memory",
        FORWARD,
        "shared_bytes<T>(Channels * kPitch) +",
        "shared_bytes<T>(Channels * Places) +",
    ),
    Mutant(
        "forward: taps of the next row at the wrong stride",
        FORWARD,
        "c * args.input_strides.c + dh * args.input_strides.h +",
        "c * args.input_strides.c + dh * args.input_strides.w * w.in +",
    ),
    Mutant(
        "forward: each block does one task only",
        FORWARD,
        "task < sizes.tasks; task += grid_blocks()) {",
        "task < sizes.tasks; task += sizes.tasks) {",
    ),
    Mutant(
        "forward windows: the slice in use has not been waited for",
        FORWARD_WINDOWS,
        "wait_copies<1>();",
        "wait_copies<2>();",
    ),
    Mutant(
        "forward windows: no barrier after a slice has arrived",
        FORWARD_WINDOWS,
        "      wait_copies<1>();\n      sync_threads();\n",
        "      wait_copies<1>();\n",
    ),
    Mutant(
        "forward windows: the next slice overwrites the one in use",
        FORWARD_WINDOWS,
        "      sync_threads();  // the next but one overwrites this stage\n",
        "",
    ),
    Mutant(
        "forward windows: one stage for two slices",
        FORWARD_WINDOWS,
        "      fetch(stage ^ 1);",
        "      fetch(stage);",
    ),
    Mutant(
        "forward windows: a halo of nothing on the left",
        FORWARD_WINDOWS,
        "copy_one(c, row, item == kFours ? 0 : Tile::kCols - 1);",
        "copy_one(c, row, item == kFours ? 1 : Tile::kCols - 1);",
    ),
    Mutant(
        "forward windows: rows that padded layouts do not align are read by sixteen bytes",
        FORWARD_WINDOWS,
        "s.in_w % 4 == 0 &&\n      aligned(args.input, 4, 16, {in.n, in.c, in.h})) {",
        "s.in_w % 4 == 0) {",
    ),
    Mutant(
        "forward windows: rows and columns of the filter are exchanged",
        FORWARD_WINDOWS,
        "patch[y + kh][2 * window + x + kw]",
        "patch[y + kw][2 * window + x + kh]",
    ),
    Mutant(
        "forward windows: the second slice's channels are fetched from the first",
        FORWARD_WINDOWS,
        "fetched_channel += kSlice;",
        "fetched_channel += 2 * kSlice;",
    ),
    Mutant(
        "forward windows: all chains but the last are lost",
        FORWARD_WINDOWS,
        "total[i / 8][i / 4 % 2][i % 4] += acc[i / 8][i / 4 % 2][i % 4];\n          acc",
        "acc",
    ),
    Mutant(
        "forward windows: one chain for all channels",
        FORWARD_WINDOWS,
        "next % (kChainSlices * kSlice) == 0 &&",
        "next < kSlice &&",
    ),
    Mutant(
        "forward windows: output channels that there are not are written",
        FORWARD_WINDOWS,
        "if (channel + o >= sizes.out_channels) continue;",
        "if (channel + o > sizes.out_channels) continue;",
    ),
    Mutant(
        "forward windows: codes of the neighbouring window",
        FORWARD_WINDOWS,
        "{{byte(pooled[o][0].code), byte(pooled[o][1].code)}}",
        "{{byte(pooled[o][1].code), byte(pooled[o][0].code)}}",
    ),
    Mutant(
        "forward mma: registers of a weight fragment are swapped",
        FORWARD_MMA,
        "lane / 4 + part % 2 * 8;",
        "lane / 4 + part / 2 * 8;",
    ),
    Mutant(
        "forward mma: columns of the pixels' fragment are swapped",
        FORWARD_MMA,
        "const int b_window = first_window + g / 2 * 4;",
        "const int b_window = first_window + g % 4 * 4;",
    ),
    Mutant(
        "forward mma: rows of the product are taken for its columns",
        FORWARD_MMA,
        "const int window = first_window + 4 * t;",
        "const int window = first_window + 4 * (g / 2);",
    ),
    Mutant(
        "forward mma: the windows' lower pixels are their upper ones",
        FORWARD_MMA,
        "const int at = offset[i] + dy * Tile::kPitch + 2 * j;",
        "const int at = offset[i] + 2 * j;",
    ),
    Mutant(
        "forward mma: output channels g and g + 8 are exchanged",
        FORWARD_MMA,
        "const int m = row / 2, i = row % 2 * 2;",
        "const int m = row / 2, i = (row + 1) % 2 * 2;",
    ),
    Mutant(
        "mma: halves of a word are exchanged",
        MMA,
        "return low.bits | static_cast<uint32_t>(high.bits) << 16;",
        "return high.bits | static_cast<uint32_t>(low.bits) << 16;",
    ),
    Mutant(
        "forward mma: no barrier between a slice and its readers",
        FORWARD_MMA,
        "      sync_threads();\n      if constexpr (Tile::kSplit) {\n        uint32_t any = 0;",
        "      if constexpr (Tile::kSplit) {\n        uint32_t any = 0;",
    ),
    Mutant(
        "forward mma: no barrier before the next weights",
        FORWARD_MMA,
        "      sync_threads();  // the next but one overwrites this stage, the next the weights\n",
        "",
    ),
    Mutant(
        "forward mma: weights of the channel block before",
        FORWARD_MMA,
        "|| weights_of != channel_block) {",
        "|| weights_of < 0) {",
    ),
    Mutant(
        "forward mma: an odd number of channels reads one more",
        FORWARD_MMA,
        "if (real && c + 1 < sizes.channels) high = load_pack<2, S>(from + strides.c);",
        "if (real && c < sizes.channels) high = load_pack<2, S>(from + strides.c);",
    ),
    Mutant(
        "forward mma: what a tap that there is not finds takes part",
        FORWARD_MMA,
        "real[i] = tap < 9;",
        "real[i] = tap < 10;",
    ),
    Mutant(
        "forward mma3: what rounding to tf32 leaves is lost",
        SPLIT,
        "return {hi, bits_from(value - float_from(hi))};",
        "return {hi, 0};",
    ),
    Mutant(
        "forward mma3: the largest floats are rounded to infinity",
        SPLIT,
        "(127 + 49) << 23;",
        "(127 + 128) << 23;",
    ),
    Mutant(
        "forward mma3: extreme pixels that another warp met are multiplied by parts",
        FORWARD_MMA,
        "any |= votes[warp];",
        "any |= votes[0];",
    ),
    Mutant(
        "forward mma3: extreme weights are multiplied by parts",
        FORWARD_MMA,
        "ballot(met || extreme_weights);",
        "ballot(met || (met && extreme_weights));",
    ),
    Mutant(
        "forward mma3: no barrier between a plain slice and the next",
        FORWARD_MMA,
        "          sync_threads();  // as below\n",
        "",
    ),
    Mutant(
        "forward mma3: a plain slice takes the fragment's registers in another order",
        SPLIT,
        "plane % 4) * 4 + plane / 4 * 2;",
        "plane % 4) * 4 + plane / 4;",
    ),
    Mutant(
        "windows: the last maximum wins a tie",
        POOL,
        "if (real && (value > best || value != value))",
        "if (real && (value >= best || value != value))",
    ),
    Mutant(
        "windows: NaN is dropped",
        POOL,
        "if (real && (value > best || value != value))",
        "if (real && value > best)",
    ),
    Mutant(
        "windows: a column that there is not takes part",
        POOL,
        "meet(v1, 1, right);",
        "meet(v1, 1, true);",
    ),
    Mutant(
        "grad_weight: no barrier between a list and its readers",
        WEIGHT,
        "        sync_warp();\n        const int end = list",
        "        const int end = list",
    ),
    Mutant(
        "grad_weight: no barrier before the next list",
        WEIGHT,
        "        sync_warp();  // the next list overwrites this one\n",
        "",
    ),
    Mutant(
        "grad_weight: the list's places count one lane too many",
        WEIGHT,
        "count_bits(live & ((1u << lane) - 1));",
        "count_bits(live & ((2u << lane) - 1));",
    ),
    Mutant(
        "grad_weight: slabs are added in place, in whatever order blocks run",
        WEIGHT,
        "(slab * sizes.groups * sizes.out_channels + oc) * sizes.row;",
        "oc * sizes.row;",
    ),
    Mutant(
        "grad_weight: the last image of a slab is left out",
        WEIGHT,
        "unit < last; ++unit) {",
        "unit < last - 1; ++unit) {",
    ),
    Mutant(
        "grad_weight: half of the lanes' biases",
        WEIGHT,
        "for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {",
        "for (int lanes = kWarp / 4; lanes > 0; lanes /= 2) {",
    ),
    Mutant(
        "grad_weight: gradients flow where ReLU is off",
        WEIGHT,
        "        if (code >= 0) {\n          const T gradient",
        "        if (code >= -1) {\n          const T gradient",
    ),
    Mutant(
        "grad_weight lanes: no barrier between lists and their readers",
        WEIGHT_LANES,
        "          sync_threads();\n        } else {\n          sync_warp();\n        }\n",
        "          sync_threads();\n        }\n",
    ),
    Mutant(
        "grad_weight lanes: no barrier before the next tile",
        WEIGHT_LANES,
        "      sync_threads();  // the next tile overwrites this one\n",
        "",
    ),
    Mutant(
        "grad_weight lanes: the lower pixels of a window are a row too far",
        WEIGHT_LANES,
        "(winner[i] >> 1) * (kPitch - 2);",
        "(winner[i] >> 1) * kPitch;",
    ),
    Mutant(
        "grad_weight lanes: a window that is off counts",
        WEIGHT_LANES,
        "if (begins.values[j] == kNowhere) continue;",
        "if (begins.values[j] > kNowhere) continue;",
    ),
    Mutant(
        "grad_weight lanes: the widest tiles lack their right halo",
        WEIGHT_LANES,
        "  if (cols <= kWarp) return;\n",
        "  if (cols > 0) return;\n",
    ),
    Mutant(
        "grad_weight lanes: the other half-warp's windows are lost",
        WEIGHT_LANES,
        "other < kFewChannelsThreads; other += sizes.lane_channels) {",
        "other < kFewChannelsThreads; other += kWarp) {",
    ),
    Mutant(
        "grad_weight windows: no barrier after a tile has arrived",
        WEIGHT_WINDOWS,
        "first, count, pixels);\n        sync_threads();\n",
        "first, count, pixels);\n",
    ),
    Mutant(
        "grad_weight windows: no barrier before the next tile",
        WEIGHT_WINDOWS,
        "      sync_threads();  // the next tile overwrites this one\n",
        "",
    ),
    Mutant(
        "grad_weight windows: no barrier between codes and their readers",
        WEIGHT_WINDOWS,
        "        sync_warp();\n        const int end",
        "        const int end",
    ),
    Mutant(
        "grad_weight windows: no barrier before the next windows",
        WEIGHT_WINDOWS,
        "        sync_warp();  // the next windows overwrite these\n",
        "",
    ),
    Mutant(
        "grad_weight windows: gradients flow into the bias where ReLU is off",
        WEIGHT_WINDOWS,
        "if (code < 0) gradient = 0;",
        "if (code < -1) gradient = 0;",
    ),
    Mutant(
        "grad_weight windows: the second code meets the third's pixel",
        WEIGHT_WINDOWS,
        "case 2: add(1);",
        "case 2: add(2);",
    ),
    Mutant(
        "grad_weight windows: sums of the other warps are lost",
        WEIGHT_WINDOWS,
        "totals[(o * Slots + i) * kWinnersThreads + other * kWarp + lane];",
        "totals[(o * Slots + i) * kWinnersThreads + warp * kWarp + lane];",
    ),
    Mutant(
        "grad_weight windows: no barrier before the next task's sums",
        WEIGHT_WINDOWS,
        "    sync_threads();  // the next task's sums overwrite these\n",
        "",
    ),
    Mutant(
        "grad_weight mma: no barrier after a tile has arrived",
        WEIGHT_MMA,
        "pixels);\n        sync_threads();\n",
        "pixels);\n",
    ),
    Mutant(
        "grad_weight mma: no barrier before the next tile",
        WEIGHT_MMA,
        "      if (want_weight) sync_threads();  // the next tile overwrites this one\n",
        "",
    ),
    Mutant(
        "grad_weight mma: the lower pixels are the upper ones",
        WEIGHT_MMA,
        "columns[tile][kw][kh + i];",
        "columns[tile][kw][kh];",
    ),
    Mutant(
        "grad_weight mma: a pixel beyond eight is not found behind the free places",
        WEIGHT_MMA,
        "column == 7 ? odd * kSkew<S> : column / 8 * kSkew<S>;",
        "column == 7 ? odd * 0 : column / 8 * kSkew<S>;",
    ),
    Mutant(
        "grad_weight mma: pixels that no window covers take part",
        WEIGHT_MMA,
        "if constexpr (Masked) b[i] &= masks[i];",
        "if constexpr (Masked) b[i] &= masks[i] | ~0u;",
    ),
    Mutant(
        "grad_weight mma: sums of the other warps are lost",
        WEIGHT_MMA,
        "sums[slot + i * sizes.m_warps * kWarp];",
        "sums[slot];",
    ),
    Mutant(
        "grad_weight mma: the second slice of channels is written over the first",
        WEIGHT_MMA,
        "(first + tile * kNTile) * 9 + k]",
        "tile * kNTile * 9 + k]",
    ),
    Mutant(
        "grad_weight finish: no barrier before the warps' sums are read",
        "kernels/backward_weight_slabs.h",
        "    sums[thread_index()] = sum;\n    sync_threads();\n",
        "    sums[thread_index()] = sum;\n",
    ),
    Mutant(
        "grad_weight windows: the second slice of channels is written over the first",
        WEIGHT_WINDOWS,
        "to[9 * first + k]",
        "to[k]",
    ),
    Mutant(
        "grad_weight windows: windows of the next tile count twice",
        WEIGHT_WINDOWS,
        "window < windows && oh < sizes.out_h && ow < sizes.out_w;",
        "window < windows;",
    ),
    Mutant(
        "grad_input: no barrier before the weights are overwritten",
        INPUT,
        "        sync_threads();  // the slice before is no longer read\n",
        "",
    ),
    Mutant(
        "grad_input: no barrier after the weights are fetched",
        INPUT,
        "        sync_threads();\n\n        T acc[kR];",
        "        T acc[kR];",
    ),
    Mutant(
        "grad_input: the first of several windows is missed",
        INPUT,
        "(bottom + axis.pool_stride - 1) / axis.pool_stride;",
        "(bottom + axis.pool_stride) / axis.pool_stride;",
    ),
    Mutant(
        "grad_input: the weights' pitch is the full slice's in a shorter one",
        INPUT,
        "load_row(weights + (t * slice_channels + r) * kR, weight);",
        "load_row(weights + (t * sizes.slice_channels + r) * kR, weight);",
    ),
    Mutant(
        "grad_input: pixels past the last image are written",
        INPUT,
        "    if (!real) continue;\n    FUSEDCNN_UNROLL",
        "    FUSEDCNN_UNROLL",
    ),
    Mutant(
        "grad_input: taps between the convolution's strides count",
        INPUT,
        "if (distance < 0 || distance % axis.stride) return -1;",
        "if (distance < 0) return -1;",
    ),
    Mutant(
        "grad_input mma: no barrier before the gradients are overwritten",
        INPUT_MMA,
        "      sync_threads();  // the slice before is no longer read\n",
        "",
    ),
    Mutant(
        "grad_input mma: no barrier between the gradients and their readers",
        INPUT_MMA,
        "      sync_threads();\n      fetch();\n",
        "      fetch();\n",
    ),
    Mutant(
        "grad_input mma: registers of a gradients' fragment are swapped",
        INPUT_MMA,
        "const int plane = i % 4 / 2 * 4, row = r + i % 2 * patch_row(8);",
        "const int plane = i % 2 * 4, row = r + i % 4 / 2 * patch_row(8);",
    ),
    Mutant(
        "grad_input mma: taps of a row are not turned round",
        INPUT_MMA,
        "places[j + 2 - kw]",
        "places[j + kw]",
    ),
    Mutant(
        "grad_input mma: an even padding is taken for an odd one",
        INPUT_MMA,
        "patch_col(patch) + sizes.padding_w % 2);",
        "patch_col(patch) + 1);",
    ),
    Mutant(
        "grad_input mma: windows beyond the only tile's own are left out",
        INPUT_MMA,
        "s.padding_h > 1 || s.padding_w > 1 ||",
        "",
    ),
    Mutant(
        "grad_input mma: weights of the channel block before",
        INPUT_MMA,
        "if (!kept || weights_of != walk.channel_block()) {",
        "if (!kept || weights_of < 0) {",
    ),
    Mutant(
        "grad_input windows: no barrier between patches that overlap",
        INPUT_WINDOWS,
        "            sync_threads();  // the next turn's patches overlap with these\n",
        "",
    ),
    Mutant(
        "grad_input windows: neighbouring chunks of a row take the same turn",
        INPUT_WINDOWS,
        "(row & 1) + 2 * (chunk & 1)",
        "(row & 1)",
    ),
    Mutant(
        "grad_input windows: the middle weight goes to the other half's column",
        INPUT_WINDOWS,
        "if (left == (dx == 0)) {",
        "if (left == (dx == 1)) {",
    ),
    Mutant(
        "grad_input windows: the next band begins with zeros",
        INPUT_WINDOWS,
        "sums[i] = last_band ? 0.f : sums[2 * sizes.band * row_words + i];",
        "sums[i] = 0;",
    ),
    Mutant(
        "grad_input windows: pixels below the last window are taken to be reached",
        INPUT_WINDOWS,
        "const bool reached = row < area.summed_h && col",
        "const bool reached = col",
    ),
    Mutant(
        "forward mma: pixels are not rounded to tf32",
        FORWARD_MMA,
        "word[i] = to_tf32(float_from(word[i]));",
        "word[i] = word[i];",
    ),
    Mutant(
        "grad_input mma: gradients are not rounded to tf32",
        INPUT_MMA_TILE,
        "const uint32_t rounded = to_tf32(float_from(value))",
        "const uint32_t rounded = value",
    ),
    Mutant(
        "codes: 255 of a byte is taken for an element",
        "kernels/sizes.h",
        "return code == kOff<uint8_t> ? -1 : code;",
        "return code;",
    ),
]


class Build:
    """The compile and link commands of a finished build."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        # Not what lies in the folder: it may hold objects of sources that are no more.
        commands = {}
        for entry in json.loads((self.folder / "compile_commands.json").read_text()):
            command = shlex.split(entry["command"])
            # Relative to the build folder with Ninja, to a folder in it with Make.
            output = Path(entry["directory"], command[command.index("-o") + 1])
            commands[str(output)] = command
        self.compile = {
            Path(command[-1]).name: command
            for target, command in commands.items()
            if "fusedcnn_cuda_on_cpu.dir" in target and command[-1].endswith(".cu")
        }
        self.library = self.folder / "tests/cuda_on_cpu/libfusedcnn_cuda_on_cpu.a"
        self.selftest_objects = [
            target for target in commands if "fusedcnn_cuda_selftest.dir" in target
        ]


def included(file: Path) -> set[Path]:
    """The file and what it includes of csrc, directly or not."""
    found, left = set(), {file}
    while left:
        found |= left
        names = {name for one in left for name in _INCLUDE.findall(one.read_text())}
        left = {ROOT / "csrc" / name for name in names if (ROOT / "csrc" / name).exists()} - found
    return found


def units(header: str) -> list[str]:
    """The kernels' units that a header of csrc/cuda is compiled in.

    Raises:
        SystemExit: there is none.
    """
    units = sorted(CUDA.glob("kernels/*.cu"))
    found = [unit.name for unit in units if CUDA / header in included(unit)]
    return found or sys.exit(f"no unit includes csrc/cuda/{header}")


def places(text: str, source: str) -> list[re.Match[str]]:
    """Where the text's tokens stand in the source, however they are spaced and broken."""
    gap = r"(?:\s|//)"
    pattern = before = ""
    for token in _TOKEN.findall(text):
        if before:
            pattern += gap + ("+" if before[-1].isalnum() and token[0].isalnum() else "*")
        pattern += re.escape(token)
        before = token
    return list(re.finditer(pattern, source))


def plant(mutant: Mutant, folder: Path) -> None:
    """Copy csrc with the one change into `folder`.

    Raises:
        SystemExit: the text does not occur once.
    """
    source = (CUDA / mutant.file).read_text()
    found = places(mutant.old, source)
    if len(found) != 1:
        sys.exit(
            f"{mutant.name}: expected its text once in csrc/cuda/{mutant.file}, found {len(found)}"
        )
    changed = source[: found[0].start()] + mutant.new + source[found[0].end() :]
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "csrc" / "cuda" / mutant.file).write_text(changed)


def build(build_: Build, mutant: Mutant | None, folder: Path) -> Path:
    """The self-test with the mutant's units compiled from `folder`."""
    program = folder / "selftest"
    objects = []
    for unit in units(mutant.file) if mutant else []:
        command = list(build_.compile[unit])
        command[command.index("-o") + 1] = str(folder / f"{unit}.o")
        # The self-test's time is next to nothing beside the compiler's.
        command = ["-O1" if word == "-O3" else word for word in command]
        command = [word.replace(str(ROOT / "csrc"), str(folder / "csrc")) for word in command]
        drop = {"-MD", "-MT", "-MF"}
        command = [
            word
            for previous, word in zip(["", *command], command, strict=False)
            if word not in drop and previous not in drop - {"-MD"}
        ]
        subprocess.run(command, check=True, cwd=folder)
        objects.append(folder / f"{unit}.o")
    # What is linked first wins over the library's own copy of the unit.
    subprocess.run(
        ["c++", *map(str, [*build_.selftest_objects, *objects, build_.library]), "-o", program],
        check=True,
    )
    return program


def passes(program: Path) -> tuple[bool, str]:
    """Whether the self-test passes, and the first thing that it says otherwise."""
    try:
        process = subprocess.run(
            [program, "--quick", "--stop"],
            capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return False, f"hangs: more than {SECONDS} s"
    lines = [line for line in process.stdout.splitlines() if line.startswith("FAILED")]
    said = lines[0] if lines else process.stderr.strip().splitlines()[:1]
    return process.returncode == 0, str(said or f"exit status {process.returncode}")


def check(build_: Build, mutant: Mutant | None) -> tuple[bool, str, float]:
    """Whether the self-test passes with the mutant, what it says, and after how many seconds."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if mutant:
            plant(mutant, folder)
        passed, said = passes(build(build_, mutant, folder))
    return passed, said, time.monotonic() - begin


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path, help="a build of the kernels alone")
    parser.add_argument("--only", help="mutants whose name contains this")
    parser.add_argument("--sample", type=int, help="so many of them, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    build_ = Build(options.build)
    mutants = [m for m in MUTANTS if not options.only or options.only in m.name]
    if not mutants:
        sys.exit(f"--only: no mutant's name contains {options.only!r}")
    if options.sample is not None and options.sample < len(mutants):
        print(f"{options.sample} of {len(mutants)} mutants, seed {options.seed}")
        mutants = random.Random(options.seed).sample(mutants, options.sample)
    passed, said, seconds = check(build_, None)
    if not passed:
        sys.exit(f"the self-test fails without any mutant: {said}")
    print(f"without a mutant: passes, {seconds:.0f} s")
    survivors = []
    with ThreadPoolExecutor(options.jobs) as pool:
        results = pool.map(lambda mutant: check(build_, mutant), mutants)
        for mutant, (passed, said, seconds) in zip(mutants, results, strict=True):
            print(f"{'SURVIVED' if passed else 'caught'} in {seconds:.0f} s: {mutant.name}")
            if passed:
                survivors.append(mutant.name)
            else:
                print(f"    {said[:200]}")
    if survivors:
        sys.exit(f"{len(survivors)} of {len(mutants)} mutants survived")
    print(f"all {len(mutants)} mutants caught")


if __name__ == "__main__":
    main()
