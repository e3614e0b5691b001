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

// A problem's sizes.
struct MapSizes {
  int in_h, in_w, conv_h, conv_w, out_h, out_w;
  int padding_h, padding_w;
  int channels, out_channels;
};

// A walk over the tasks of a launch, each a tile of one image's pooled outputs for a block of
// output channels; a block takes every grid_blocks()-th task. Without 64-bit divisions on the way.
struct TileGrid {
  int tiles_h, tiles_w, channel_blocks;
  int per_image;  // tasks
  int batch;
  int blocks;             // of the launch
  int step_n, step_rest;  // as many tasks: whole images, and what is left
};
class TileWalk {
 public:
  FUSEDCNN_DEVICE explicit TileWalk(const TileGrid& grid)
      : n_(static_cast<int>(block_index()) / grid.per_image),
        rest_(static_cast<int>(block_index()) % grid.per_image) {}
  FUSEDCNN_DEVICE bool done(const TileGrid& grid) const { return n_ >= grid.batch; }
  FUSEDCNN_DEVICE void advance(const TileGrid& grid) {
    n_ += grid.step_n;
    rest_ += grid.step_rest;
    if (rest_ >= grid.per_image) rest_ -= grid.per_image, ++n_;
  }
  FUSEDCNN_DEVICE int64_t n() const { return n_; }
  FUSEDCNN_DEVICE int tile_w(const TileGrid& grid) const { return rest_ % grid.tiles_w; }
  FUSEDCNN_DEVICE int tile_h(const TileGrid& grid) const {
    return rest_ / grid.tiles_w % grid.tiles_h;
  }
  FUSEDCNN_DEVICE int channel_block(const TileGrid& grid) const {
    return rest_ / grid.tiles_w / grid.tiles_h;
  }

 private:
  int n_, rest_;
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
  grid.step_n = grid.blocks / grid.per_image;
  grid.step_rest = grid.blocks % grid.per_image;
  return grid;
}

}  // namespace
}  // namespace fusedcnn::cuda
