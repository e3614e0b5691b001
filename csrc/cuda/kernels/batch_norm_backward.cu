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
#include "cuda/kernels/batch_norm_sums.h"
#include "cuda/kernels/gather.h"

namespace fusedcnn::cuda {
namespace {

// Of one channel, or of a part of it.
struct GradientSums {
  double bias;    // sum g
  double weight;  // sum g * (e - mean)
};

struct SumSizes {
  Tiles tiles;  // of the pooled values
  Sharing sharing;
  int64_t parts;  // of each channel: tiles
};

template <typename S, typename C>
FUSEDCNN_KERNEL_RESIDENT(kLibraryThreads, 3)
batch_norm_sums_kernel(NormBackwardArgs args, SumSizes sizes, GradientSums* parts) {
  using T = Accumulator<S>;
  constexpr int kAtOnce = 4;
  const Tiles& tiles = sizes.tiles;
  const Lanes lanes = lanes_of<1>(sizes.sharing);
  SharedMemory memory;
  const Shared<T> bias_sums = memory.array<T>(lanes.rows << tiles.channel_bits);
  const Shared<T> weight_sums = memory.array<T>(lanes.rows << tiles.channel_bits);
  const Strides &grad_strides = args.block.grad_output_strides,
                &code_strides = args.block.code_strides;
  for (int64_t task = block_index(); task < tiles.tasks; task += grid_blocks()) {
    const Tile tile = tile_of<1>(tiles, task);
    for (int group = 0; group < tile.channels; group += lanes.channel_step) {
      const int c = group + lanes.channel;
      const bool real = c < tile.channels;
      const int64_t channel = tile.channel + (real ? c : 0);
      const S* const grads =
          static_cast<const S*>(args.block.grad_output) + channel * grad_strides.c;
      const C* const codes = static_cast<const C*>(args.block.code) + channel * code_strides.c;
      const S* const extrema =
          static_cast<const S*>(args.extremum) + channel * args.extremum_strides.c;
      const T mean = load_constant(static_cast<const T*>(args.mean) + channel * args.mean_stride);
      T bias_sum[1] = {0}, weight_sum[1] = {0};
      for (int p = lanes.pixel; real && p < tile.pixels; p += kAtOnce * lanes.pixel_step) {
        T grad[kAtOnce], distance[kAtOnce];
        bool live[kAtOnce];
        FUSEDCNN_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const int at = p + i * lanes.pixel_step;
          live[i] = false;
          grad[i] = distance[i] = 0;
          if (at >= tile.pixels) continue;
          const Pixel pixel = pixel_of(tiles, tile, at);
          live[i] = load_code(codes + offset_of(code_strides, tile.n, pixel)) >= 0;
          grad[i] = widen(load_constant(grads + offset_of(grad_strides, tile.n, pixel)));
          distance[i] =
              widen(load_constant(extrema + offset_of(args.extremum_strides, tile.n, pixel))) -
              mean;
        }
        FUSEDCNN_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          if (!live[i]) continue;
          bias_sum[0] += grad[i];
          weight_sum[0] = multiply_add(grad[i], distance[i], weight_sum[0]);
        }
      }
      hand_in(lanes, c, real, bias_sum, bias_sums);
      hand_in(lanes, c, real, weight_sum, weight_sums);
    }
    sync_threads();
    for (int c = thread_index(); c < tile.channels; c += kLibraryThreads) {
      parts[(tile.channel + c) * sizes.parts + part_of(tiles, tile)] = {
          sum_of_rows(bias_sums, c, lanes.rows), sum_of_rows(weight_sums, c, lanes.rows)};
    }
    sync_threads();  // the next tile overwrites them
  }
}

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

SumSizes sum_sizes(const NormBackwardArgs& args) {
  const Geometry& g = args.block.geometry;
  // Sixteen elements a thread. Along the pixels a warp has one channel.
  const bool along_channels = args.block.code_strides.c == 1;
  SumSizes sizes{tiles_of(g.batch, g.out_channels, g.h.out, g.w.out, 1,
                          along_channels ? kChannelBits : kThreadBits - kWarpBits, kThreadBits + 4),
                 {along_channels, 0},
                 0};
  const Tiles& tiles = sizes.tiles;
  sizes.sharing.bits = along_channels                 ? tiles.channel_bits
                       : tiles.pixel_bits < kWarpBits ? tiles.pixel_bits
                                                      : kWarpBits;
  sizes.parts = parts_of(tiles, g.batch);
  return sizes;
}

template <typename S, typename C>
void backward_typed(const NormBackwardArgs& args, const Execution& execution) {
  using T = Accumulator<S>;
  const Geometry& g = args.block.geometry;
  T* const numbers = static_cast<T*>(execution.workspace);
  auto* const parts = reinterpret_cast<GradientSums*>(static_cast<char*>(execution.workspace) +
                                                      numbers_bytes(g, args.block.type));
  const SumSizes sizes = sum_sizes(args);
  const int64_t shared =
      2 * shared_bytes<T>(int64_t{sizes.sharing.rows()} << sizes.tiles.channel_bits);
  launch("batch_norm_sums", batch_norm_sums_kernel<S, C>, blocks_for(sizes.tiles.tasks),
         kLibraryThreads, shared, execution, args, sizes, parts);
  launch("batch_norm_gradients", batch_norm_gradients_kernel<S>, blocks_for(g.out_channels),
         kLibraryThreads, shared_bytes<double>(kLibraryThreads / kWarp), execution, args, parts,
         sizes.parts, per_output(g), own_affine(args.affine, args.block.type), numbers);
  if (args.block.plane) {
    gather<S, C>("batch_norm_grad_plane", args.block, Normalised<T>{numbers}, execution);
  }
}

}  // namespace

int64_t batch_norm_backward_workspace(const NormBackwardArgs& args) {
  const Geometry& g = args.block.geometry;
  return numbers_bytes(g, args.block.type) +
         g.out_channels * sum_sizes(args).parts * static_cast<int64_t>(sizeof(GradientSums));
}

void batch_norm_backward(const NormBackwardArgs& args, const Execution& execution) {
  for_storage(args.block.type, [&](auto storage) {
    using S = decltype(storage);
    args.block.wide_code ? backward_typed<S, int32_t>(args, execution)
                         : backward_typed<S, uint8_t>(args, execution);
  });
}

}  // namespace fusedcnn::cuda
