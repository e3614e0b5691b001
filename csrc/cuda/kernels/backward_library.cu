// The backward around the stock convolution: the gradient of a convolution's output, which is that
// of the pooled output where a window's winner is, and zero elsewhere (gather.h).
//
// Of an element under 2x2 windows in a half type it moves 2 bytes out and 3/4 in, 0.9 ps at 3 TB/s,
// in which 132 multiprocessors at 1.75 GHz issue 27 instructions of a lane; of a float 52. sm_90's
// code has some 250 for a vector of 8 channels, 31 an element. A thread that owns a pixel finds its
// windows once for 16 channels: 50 an element of a half type that crosses over, and 38 of a float
// in planes of channels.

#include "cuda/kernels/gather.h"

namespace fusedcnn::cuda {

void backward_library(const BackwardArgs& args, const Execution& execution) {
  for_storage(args.type, [&](auto storage) {
    using S = decltype(storage);
    args.wide_code ? gather<S, int32_t>("backward_library", args, AsTheyAre{}, execution)
                   : gather<S, uint8_t>("backward_library", args, AsTheyAre{}, execution);
  });
}

}  // namespace fusedcnn::cuda
