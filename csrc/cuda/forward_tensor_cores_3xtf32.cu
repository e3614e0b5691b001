#include "cuda/kernels.h"
#include "cuda/kernels/forward_tensor_cores_3x3.h"

namespace fusedcnn::cuda {

int64_t forward_tensor_cores_3xtf32_cycles(const Problem& problem) {
  const Geometry& g = problem.geometry;
  return with_mma_tile<8, 3>(g, [&](auto tile) {
    using Tile = decltype(tile);
    const TileGrid grid = tile_grid(g, Tile::kTileH, Tile::kTileW, Tile::kChannels);
    const int64_t slices = (g.in_channels + Tile::kPlanes - 1) / Tile::kPlanes;
    // Of a warp's step: 24 MTiles products, six in ten cycles; and a fifth more for what stands
    // around the steps and does not hide behind them.
    constexpr int64_t kStep = 24 * Tile::kMTiles * 10 / 6 * 6 / 5;
    return grid.per_image * Tile::kWarps * slices * Tile::kSteps * kStep;
  });
}

int64_t forward_tensor_cores_3xtf32_shared(const Problem& problem) {
  return with_mma_tile<8, 3>(problem.geometry, [](auto tile) { return decltype(tile)::shared(); });
}

void forward_tensor_cores_3xtf32(const ForwardArgs& args, const Execution& execution) {
  forward_tensor_cores_3x3_planes<float, 8, 3>(args, execution);
}

}  // namespace fusedcnn::cuda
