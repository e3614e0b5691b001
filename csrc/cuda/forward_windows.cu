#include "cuda/kernels.h"
#include "cuda/kernels/forward_windows.h"

namespace fusedcnn::cuda {

void forward_windows(const ForwardArgs& args, const Execution& execution) {
  using Wide = WindowsTile<2, 16, 16>;  // 32x32 images, 16 output channels; large maps
  using Square = WindowsTile<4, 8, 8>;  // 16x16 images, 32 output channels
  using Few = WindowsTile<2, 8, 8>;     // the same for fewer output channels
  using Small = WindowsTile<8, 4, 4>;   // 8x8 images, 64 output channels
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

}  // namespace fusedcnn::cuda
