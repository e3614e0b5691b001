// What the grad_weight kernels for a 3x3 convolution of stride 1 under a 2x2 pool of stride 2
// share: images are cut into tiles of windows, the tiles of all images are divided into slabs, and
// sums of a slab are taken in float.
#pragma once

#include "cuda/kernels/backward_weight_slabs.h"
#include "cuda/kernels/block_3x3.h"

namespace fusedcnn::cuda {
namespace {

struct WeightTileSizes : MapSizes {
  SlabSums sums;
  int tile_h, tile_w;    // windows of a tile
  int tiles_h, tiles_w;  // of an image
  int channel_blocks;    // of output channels
  int64_t units, slabs;  // tiles of all images
};

// All but the slabs, for tiles of tile_h x tile_w windows and blocks of `block_channels` output
// channels.
inline WeightTileSizes weight_tile_sizes(const Geometry& g, int tile_h, int tile_w,
                                         int block_channels) {
  WeightTileSizes s{};
  static_cast<MapSizes&>(s) = map_sizes(g);
  s.sums = {s.out_channels, 9 * s.channels + 1, 0};
  s.tile_h = tile_h, s.tile_w = tile_w;
  s.tiles_h = parts(s.out_h, tile_h);
  s.tiles_w = parts(s.out_w, tile_w);
  s.channel_blocks = parts(s.out_channels, block_channels);
  s.units = g.batch * s.tiles_h * s.tiles_w;
  return s;
}

// Bytes of a slab's sums.
inline int64_t slab_bytes(const WeightTileSizes& sizes) {
  return static_cast<int64_t>(sizes.out_channels) * sizes.sums.row * 4;
}

inline void set_slabs(WeightTileSizes* sizes, int64_t wanted) {
  sizes->slabs = sizes->sums.slabs = slab_count(wanted, sizes->units, slab_bytes(*sizes));
}

}  // namespace
}  // namespace fusedcnn::cuda
