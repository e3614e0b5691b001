// The backward of a block with batch normalisation around the stock convolution
// (core/batch_norm.h). With g a pooled value's gradient where ReLU is on, e its extremum, and x_hat
// = (e - mean) * invstd:
//
// 1. Each tile's sums of g and g * (e - mean) by channel.
// 2. The tiles' sums put together: grad_bn_bias = sum g, grad_bn_weight = sum g * x_hat, and what
//    step 3 needs of a channel.
// 3. The gradient of the plane in place of y: with scale = bn_weight * invstd,
//      scale * (g of the windows that an element won)
//      - scale * grad_bn_bias / M - scale * invstd * grad_bn_weight / M * (y - mean).
//
// Under 2x2 windows in a half type step 1 moves 5 bytes for each window, and step 3 2 bytes in, 2
// out and 3/4 of a window's for each element: 6 an element in all, where the stock layers move 15.

#include "cuda/batch_norm.h"
#include "cuda/kernels/gather.h"
#include "cuda/kernels/gradient_sums.h"

namespace fusedcnn::cuda {
namespace {

// A block adds a channel's parts. numbers: of each channel scale, slope, level and mean, where the
// plane's gradient is scale * g + level + slope * (y - mean).
template <typename S>
FUSEDCNN_KERNEL(kLibraryThreads)
batch_norm_gradients_kernel(NormBackwardArgs args, const GradientSums* parts, int64_t count,
                            double per_output, bool own, Accumulator<S>* numbers) {
  using T = Accumulator<S>;
  SharedMemory memory;
  const Shared<double> warps = memory.array<double>(kLibraryThreads / kWarp);
  const int64_t channels = args.block.geometry.out_channels;
  for (int64_t channel = block_index(); channel < channels; channel += grid_blocks()) {
    const GradientSums* const its = parts + channel * count;
    double bias = 0, weight = 0;
    for (int64_t i = thread_index(); i < count; i += kLibraryThreads) {
      bias += its[i].bias, weight += its[i].weight;
    }
    bias = sum_over_block(bias, warps);
    weight = sum_over_block(weight, warps);
    if (thread_index() != 0) continue;
    const T mean = load_constant(static_cast<const T*>(args.mean) + channel * args.mean_stride);
    const T var = load_constant(static_cast<const T*>(args.var) + channel * args.var_stride);
    const double invstd = 1 / square_root(var + args.eps);
    weight *= invstd;
    store_affine<S>(own, args.grad_bn_weight, channel, static_cast<T>(weight));
    store_affine<S>(own, args.grad_bn_bias, channel, static_cast<T>(bias));
    const double scale =
        invstd * load_affine<S>(own, args.affine.weight, channel * args.affine.weight_stride, T(1));
    T* const to = numbers + channel * kNumbers;
    to[0] = static_cast<T>(scale);
    to[1] = static_cast<T>(-scale * invstd * weight * per_output);
    to[2] = static_cast<T>(-scale * bias * per_output);
    to[3] = mean;
  }
}

// The plane's gradient, of the sums of what its elements' windows send them.
template <typename T>
struct Normalised {
  const T* numbers;

  template <int V, typename S>
  FUSEDCNN_DEVICE Pack<V, S> operator()(const Pack<V, S>& sums, const S* plane,
                                        int64_t channel) const {
    const Pack<V, S> elements = load_pack<V>(plane);
    Pack<V, S> result;
    FUSEDCNN_UNROLL
    for (int v = 0; v < V; ++v) {
      T its[kNumbers];
      load_numbers(numbers, channel + v, its);
      const T rest = multiply_add(its[1], widen(elements.values[v]) - its[3], its[2]);
      result.values[v] = narrow<S>(multiply_add(its[0], widen(sums.values[v]), rest));
    }
    return result;
  }
};

// ---- host ---------------------------------------------------------------------------------------

template <typename S, typename C>
void backward_typed(const NormBackwardArgs& args, const Execution& execution) {
  using T = Accumulator<S>;
  const Geometry& g = args.block.geometry;
  char* const memory = static_cast<char*>(execution.workspace);
  auto* const parts = reinterpret_cast<GradientSums*>(
      memory + plane_order_bytes(g, args.block.type, args.block.wide_code));
  T* const numbers = reinterpret_cast<T*>(parts) + sum_bytes<GradientSums>(g) / sizeof(T);
  const int64_t count = gradient_sums<S, C>("batch_norm_sums", args, parts, execution);
  launch("batch_norm_gradients", batch_norm_gradients_kernel<S>, blocks_for(g.out_channels),
         kLibraryThreads, shared_bytes<double>(kLibraryThreads / kWarp), execution, args, parts,
         count, per_output(g), own_affine(args.affine, args.block.type), numbers);
  if (args.block.plane) {
    gather<S, C>("batch_norm_grad_plane", in_plane_order(args.block, execution),
                 Normalised<T>{numbers}, execution);
  }
}

}  // namespace

int64_t batch_norm_backward_workspace(const NormBackwardArgs& args) {
  const Geometry& g = args.block.geometry;
  return plane_order_bytes(g, args.block.type, args.block.wide_code) + sum_bytes<GradientSums>(g) +
         numbers_bytes(g, args.block.type);
}

void batch_norm_backward(const NormBackwardArgs& args, const Execution& execution) {
  for_storage(args.block.type, [&](auto storage) {
    using S = decltype(storage);
    args.block.wide_code ? backward_typed<S, int32_t>(args, execution)
                         : backward_typed<S, uint8_t>(args, execution);
  });
}

}  // namespace fusedcnn::cuda
