#include "cuda/kernels.h"
#include "cuda/kernels/forward_windows.h"

namespace fusedcnn::cuda {
namespace {

template <bool Chains>
void forward_windows_tiled(const ForwardArgs& args, const Execution& execution) {
  // 32x32 images, 16 output channels; large maps. Half as high with twice the registers, so that a
  // multiprocessor has several blocks.
  using Wide = WindowsTile<2, Chains ? 8 : 16, 16, Chains>;
  using Square = WindowsTile<4, 8, 8, Chains>;  // 16x16 images, 32 output channels
  using Few = WindowsTile<2, 8, 8, Chains>;     // the same for fewer output channels
  using Small = WindowsTile<8, 4, 4, Chains>;   // 8x8 images, 64 output channels
  const int64_t wide = image_work<Wide>(args.geometry), square = image_work<Square>(args.geometry),
                few = image_work<Few>(args.geometry), small = image_work<Small>(args.geometry);
  // The least work; among equals the larger tile, whose halo is smaller.
  if (wide <= square && wide <= few && wide <= small) {
    launch_forward_windows<Wide>(args, execution);
  } else if (square <= few && square <= small) {
    launch_forward_windows<Square>(args, execution);
  } else if (few <= small) {
    launch_forward_windows<Few>(args, execution);
  } else {
    launch_forward_windows<Small>(args, execution);
  }
}

}  // namespace

void forward_windows(const ForwardArgs& args, const Execution& execution) {
  if (args.geometry.in_channels <= kChainSlices * kSlice) {
    forward_windows_tiled<false>(args, execution);
  } else {
    forward_windows_tiled<true>(args, execution);
  }
}

}  // namespace fusedcnn::cuda
