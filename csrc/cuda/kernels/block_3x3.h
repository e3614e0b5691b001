// What the kernels for a 3x3 convolution of stride 1 under a 2x2 pool of stride 2 share.
#pragma once

#include "cuda/device.h"
#include "cuda/kernel.h"
#include "cuda/kernels/sizes.h"
#include "cuda/launch.h"

namespace fusedcnn::cuda {

namespace {

// Whether the block is a 3x3 convolution of stride 1 under a 2x2 pool of stride 2.
inline const char* why_not_3x3_block(const Problem& problem) {
  const Geometry& g = problem.geometry;
  if (problem.type == DataType::kFloat64) return "float64";
  if (problem.wide_code) return "int32 codes";
  for (const Axis* axis : {&g.h, &g.w}) {
    if (axis->kernel != 3 || axis->stride != 1 || axis->dilation != 1) {
      return "the convolution is not 3x3 with stride 1 and dilation 1";
    }
    if (axis->pool_kernel != 2 || axis->pool_stride != 2 || axis->pool_padding ||
        axis->pool_dilation != 1) {
      return "the pool is not 2x2 with stride 2, without padding";
    }
  }
  // They count images, and tiles of an image, in 32 bits.
  constexpr int64_t kLargest = int64_t{1} << 30;
  if (g.batch >= kLargest) return "2^30 images or more";
  if ((g.outputs() + g.h.out + g.w.out + 1) * g.out_channels >= kLargest) {
    return "an image has some 2^30 outputs or more";
  }
  // Coordinates and places among an output channel's weights, too.
  if (g.in_channels >= kLargest / 64) return "2^24 input channels or more";
  for (const Axis* axis : {&g.h, &g.w}) {
    if (axis->padded() >= kLargest / 4)
      return "an axis has 2^28 elements or more, padding included";
  }
  return g.groups == 1 ? nullptr : "groups";
}

constexpr const char* kTooLittleShared = "the GPU's blocks have too little shared memory";

// Calls body(S{}) with the storage type of a problem that why_not_3x3_block lets through.
template <typename Body>
void for_block_storage(DataType type, const Body& body) {
  switch (type) {
    case DataType::kFloat32: return body(float{});
    case DataType::kBFloat16: return body(BFloat16{});
    case DataType::kFloat16: return body(Float16{});
    case DataType::kFloat64: return;
  }
}

// The pooled value of a window, and which element won: -1 where ReLU is off.
struct Pooled {
  float value;
  int code;
};

// Of one window's convolution outputs, row by row, with their bias. `right` and `below`: whether
// its second column and row exist (ceil_mode); the first always do.
FUSEDCNN_DEVICE Pooled pool_window(float v0, float v1, float v2, float v3, bool right, bool below) {
  float best = v0;
  int winner = 0;
  // The first maximum wins; NaN beats everything, a later NaN too, as in torch.
  const auto meet = [&](float value, int element, bool real) {
    if (real && (value > best || value != value)) best = value, winner = element;
  };
  meet(v1, 1, right);
  meet(v2, 2, below);
  meet(v3, 3, right && below);
  const bool off = best <= 0;  // false for NaN, which ReLU lets through
  return {off ? 0.f : best, off ? -1 : winner};
}

// The same of N whole windows side by side, whose outputs v[window][element] lack the bias.
// Rounding keeps the order, so that the bias can come after the maximum: 15 instructions a window,
// where meeting one element after the other takes 20 or more. Outputs that only the bias's rounding
// makes equal are no tie here: the larger wins. Returns false where the windows have to be met in
// order: for NaN, and for infinity, of which an infinite bias may make NaN.
template <int N>
FUSEDCNN_DEVICE bool pool_plain_windows(const float (&v)[N][4], float bias, Pooled (&to)[N]) {
  bool plain = true;
  FUSEDCNN_UNROLL
  for (int j = 0; j < N; ++j) {
    const float top = max_or_nan(v[j][0], v[j][1]);
    const float best = max_or_nan(top, max_or_nan(v[j][2], v[j][3]));
    const bool above = top == best, left = (above ? v[j][0] : v[j][2]) == best;
    const float value = best + bias;
    to[j] = {max_or_nan(value, 0.f), value <= 0 ? -1 : (above ? 0 : 2) + (left ? 0 : 1)};
    plain = plain && value < infinity<float>();
  }
  return plain;
}

// A problem's sizes.
struct MapSizes {
  int in_h, in_w, conv_h, conv_w, out_h, out_w;
  int padding_h, padding_w;
  int channels, out_channels;
};

// Whether N windows from (oh, ow) on lie within the convolution's outputs.
template <int N>
FUSEDCNN_DEVICE bool windows_are_whole(const MapSizes& sizes, int oh, int ow) {
  const int end = ow + N < sizes.out_w ? ow + N : sizes.out_w;
  return 2 * end <= sizes.conv_w && 2 * oh + 1 < sizes.conv_h;
}

template <int N>
FUSEDCNN_DEVICE void pool_windows_in_order(const float (&v)[N][4], float bias,
                                           const MapSizes& sizes, int oh, int ow, Pooled (&to)[N]) {
  FUSEDCNN_UNROLL
  for (int j = 0; j < N; ++j) {
    to[j] = pool_window(v[j][0] + bias, v[j][1] + bias, v[j][2] + bias, v[j][3] + bias,
                        2 * (ow + j) + 1 < sizes.conv_w, 2 * oh + 1 < sizes.conv_h);
  }
}

// A walk over the tasks of a launch, each a tile of one image's pooled outputs for a block of
// output channels; a block takes every grid_blocks()-th task. Tasks are numbered by image, channel
// block, row and column of tiles, and a step adds up place by place: without divisions on the way.
struct TileGrid {
  int tiles_h, tiles_w, channel_blocks;
  int per_image;  // tasks
  int batch;
  int blocks;                                                // of the launch
  int step_n, step_channel_block, step_tile_h, step_tile_w;  // as many tasks
};
class TileWalk {
 public:
  FUSEDCNN_DEVICE explicit TileWalk(const TileGrid& grid) {
    const int first = static_cast<int>(block_index()), rows = first / grid.tiles_w;
    const int channel_blocks = rows / grid.tiles_h;
    tile_w_ = first % grid.tiles_w;
    tile_h_ = rows % grid.tiles_h;
    channel_block_ = channel_blocks % grid.channel_blocks;
    n_ = channel_blocks / grid.channel_blocks;
  }
  FUSEDCNN_DEVICE bool done(const TileGrid& grid) const { return n_ >= grid.batch; }
  FUSEDCNN_DEVICE void advance(const TileGrid& grid) {
    tile_w_ += grid.step_tile_w;
    tile_h_ += grid.step_tile_h;
    channel_block_ += grid.step_channel_block;
    n_ += grid.step_n;
    if (tile_w_ >= grid.tiles_w) tile_w_ -= grid.tiles_w, ++tile_h_;
    if (tile_h_ >= grid.tiles_h) tile_h_ -= grid.tiles_h, ++channel_block_;
    if (channel_block_ >= grid.channel_blocks) channel_block_ -= grid.channel_blocks, ++n_;
  }
  FUSEDCNN_DEVICE int64_t n() const { return n_; }
  FUSEDCNN_DEVICE int tile_w() const { return tile_w_; }
  FUSEDCNN_DEVICE int tile_h() const { return tile_h_; }
  FUSEDCNN_DEVICE int channel_block() const { return channel_block_; }

 private:
  int n_, channel_block_, tile_h_, tile_w_;
};

// How many parts cover the whole.
inline int parts(int64_t whole, int part) { return static_cast<int>((whole + part - 1) / part); }

inline MapSizes map_sizes(const Geometry& g) {
  const AxisSizes h = sizes_of(g.h), w = sizes_of(g.w);
  return {h.in,
          w.in,
          h.conv,
          w.conv,
          h.out,
          w.out,
          h.padding,
          w.padding,
          static_cast<int>(g.in_channels),
          static_cast<int>(g.out_channels)};
}

// Whether an image's offsets have 32 bits.
inline bool has_small_images(const Strides& strides, const Geometry& g) {
  const int64_t last =
      (g.in_channels - 1) * strides.c + (g.h.in - 1) * strides.h + (g.w.in - 1) * strides.w;
  return last < int64_t{1} << 31;
}

// At most most_blocks blocks: few enough that each takes several tasks of a large batch, and
// fetches one while it computes another.
inline TileGrid tile_grid(const Geometry& g, int tile_h, int tile_w, int channels,
                          int64_t most_blocks) {
  TileGrid grid{};
  grid.tiles_h = parts(g.h.out, tile_h);
  grid.tiles_w = parts(g.w.out, tile_w);
  grid.channel_blocks = parts(g.out_channels, channels);
  grid.per_image = grid.tiles_h * grid.tiles_w * grid.channel_blocks;
  grid.batch = static_cast<int>(g.batch);
  const int64_t blocks = blocks_for(static_cast<int64_t>(grid.batch) * grid.per_image);
  grid.blocks = static_cast<int>(blocks < most_blocks ? blocks : most_blocks);
  // In whole images, so that a block keeps its output channels, whose weights it has.
  if (grid.channel_blocks > 1 && grid.blocks > grid.per_image) {
    grid.blocks -= grid.blocks % grid.per_image;
  }
  grid.step_tile_w = grid.blocks % grid.tiles_w;
  grid.step_tile_h = grid.blocks / grid.tiles_w % grid.tiles_h;
  grid.step_channel_block = grid.blocks / grid.tiles_w / grid.tiles_h % grid.channel_blocks;
  grid.step_n = grid.blocks / grid.per_image;
  return grid;
}

// Whether there is a task for each multiprocessor. Smaller tiles are for problems that have fewer:
// such a task takes less time, though all together take more.
template <typename Tile>
bool fills_gpu(const Geometry& g, int multiprocessors) {
  return g.batch * tile_grid(g, Tile::kTileH, Tile::kTileW, Tile::kChannels, 1).per_image >=
         multiprocessors;
}

}  // namespace
}  // namespace fusedcnn::cuda
