// The backward around the stock convolution: the gradient of a convolution's output, which is that
// of the pooled output where a window's winner is, and zero elsewhere (gather.h); and grad_bias,
// from the pooled outputs, of which there are fewer than the plane has elements.
//
// Of an element under 2x2 windows in a half type it moves 2 bytes out and 3/4 in, 0.9 ps at 3 TB/s,
// in which 132 multiprocessors at 1.75 GHz issue 27 instructions of a lane; of a float 52. sm_90's
// code has some 250 for a vector of 8 channels, 31 an element. A thread that owns a pixel finds its
// windows once for 16 channels: 38 an element of a float in planes of channels.

#include "cuda/kernels/gather.h"
#include "cuda/kernels/gradient_sums.h"

namespace fusedcnn::cuda {
namespace {

// A block adds a channel's parts.
template <typename S>
FUSEDCNN_KERNEL(kLibraryThreads)
grad_bias_kernel(BackwardArgs args, const BiasSum* parts, int64_t count) {
  SharedMemory memory;
  const Shared<double> warps = memory.array<double>(kLibraryThreads / kWarp);
  const int64_t channels = args.geometry.out_channels;
  for (int64_t channel = block_index(); channel < channels; channel += grid_blocks()) {
    double bias = 0;
    for (int64_t i = thread_index(); i < count; i += kLibraryThreads) {
      bias += parts[channel * count + i].bias;
    }
    bias = sum_over_block(bias, warps);
    if (thread_index() == 0) {
      static_cast<S*>(args.grad_bias)[channel] = narrow<S>(static_cast<Accumulator<S>>(bias));
    }
  }
}

template <typename S, typename C>
void backward_typed(const BackwardArgs& args, const Execution& execution) {
  const Geometry& g = args.geometry;
  if (args.plane) {
    gather<S, C>("backward_library", in_plane_order(args, execution), AsTheyAre{}, execution);
  }
  if (!args.grad_bias) return;
  auto* const parts = reinterpret_cast<BiasSum*>(static_cast<char*>(execution.workspace) +
                                                 plane_order_bytes(g, args.type, args.wide_code));
  NormBackwardArgs block{};
  block.block = args;
  const int64_t count = gradient_sums<S, C>("grad_bias_sums", block, parts, execution);
  launch("grad_bias", grad_bias_kernel<S>, blocks_for(g.out_channels), kLibraryThreads,
         shared_bytes<double>(kLibraryThreads / kWarp), execution, args,
         static_cast<const BiasSum*>(parts), count);
}

}  // namespace

int64_t backward_library_workspace(const Problem& problem) {
  const Geometry& g = problem.geometry;
  return plane_order_bytes(g, problem.type, problem.wide_code) + sum_bytes<BiasSum>(g);
}

void backward_library(const BackwardArgs& args, const Execution& execution) {
  for_storage(args.type, [&](auto storage) {
    using S = decltype(storage);
    args.wide_code ? backward_typed<S, int32_t>(args, execution)
                   : backward_typed<S, uint8_t>(args, execution);
  });
}

}  // namespace fusedcnn::cuda
