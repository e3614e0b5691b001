#include "cuda/kernels.h"
#include "cuda/kernels/forward_cuda_cores_3x3.h"

namespace fusedcnn::cuda {
namespace {

// Calls body(Tile{}) with the tile of the least work for a geometry; among equals the larger one,
// whose halo is smaller.
template <bool Chains, typename Body>
auto with_tile(const Geometry& g, const Body& body) {
  // 32x32 images, 16 output channels; large maps. Half as high with twice the registers, so that a
  // multiprocessor has several blocks.
  using Wide = WindowsTile<2, Chains ? 8 : 16, 16, Chains>;
  using Square = WindowsTile<4, 8, 8, Chains>;  // 16x16 images, 32 output channels
  using Few = WindowsTile<2, 8, 8, Chains>;     // the same for fewer output channels
  using Small = WindowsTile<8, 4, 4, Chains>;   // 8x8 images, 64 output channels
  const int64_t wide = image_work<Wide>(g), square = image_work<Square>(g),
                few = image_work<Few>(g), small = image_work<Small>(g);
  if (wide <= square && wide <= few && wide <= small) return body(Wide{});
  if (square <= few && square <= small) return body(Square{});
  return few <= small ? body(Few{}) : body(Small{});
}

template <typename Body>
auto with_windows_tile(const Geometry& g, const Body& body) {
  return g.in_channels <= kChainSlices * kSlice ? with_tile<false>(g, body)
                                                : with_tile<true>(g, body);
}

}  // namespace

int64_t forward_cuda_cores_3x3_cycles(const Problem& problem) {
  const Geometry& g = problem.geometry;
  return with_windows_tile(g, [&](auto tile) {
    // 128 multiply-adds a cycle, four for each window and tap; and a seventh more for the other
    // instructions of the loop around them (forward_cuda_cores_3x3.h).
    return image_work<decltype(tile)>(g) * 4 * 9 * g.in_channels / 128 * 8 / 7;
  });
}

void forward_cuda_cores_3x3(const ForwardArgs& args, const Execution& execution) {
  with_windows_tile(args.geometry, [&](auto tile) {
    launch_forward_cuda_cores_3x3<decltype(tile)>(args, execution);
  });
}

}  // namespace fusedcnn::cuda
