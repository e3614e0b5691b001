// The forward on tensor cores in full float32: three products in tf32.
#include "cuda/kernels/forward_tensor_cores.h"

namespace fusedcnn::cuda {
namespace {

// As forward_cuda_cores_3x3_cycles.
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

}  // namespace

const char* why_not_tensor_cores_3xtf32(const Problem& problem, const Target& target) {
  if (problem.type != DataType::kFloat32) return "not float32";
  // Where tensor cores multiply tf32 at eight times the rate of CUDA cores. sm_86, sm_89 and sm_120
  // do so at the same rate; of others it is not known.
  if (target.device.capability != 80 && target.device.capability != 90) {
    return "neither sm_80 nor sm_90";
  }
  if (const char* reason = why_not_sm_80(target.device)) return reason;
  if (const char* reason = why_not_3x3_block(problem)) return reason;
  const int64_t shared =
      with_mma_tile<8, 3>(problem.geometry, [](auto tile) { return decltype(tile)::shared(); });
  if (shared > target.device.shared_bytes) return kTooLittleShared;
  // Counts, on either side: a margin for what they leave out.
  if (10 * forward_cuda_cores_3x3_cycles(problem) <
      13 * forward_tensor_cores_3xtf32_cycles(problem)) {
    return "CUDA cores take less than 1.3 times as long";
  }
  return nullptr;
}

void forward_tensor_cores_3xtf32(const ForwardArgs& args, const Execution& execution) {
  forward_tensor_cores_planes<float, 8, 3>(args, execution);
}

}  // namespace fusedcnn::cuda
