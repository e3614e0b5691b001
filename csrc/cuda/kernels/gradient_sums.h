// Sums by channel of pooled values' gradients where ReLU is on: a convolution's grad_bias, and what
// batch normalisation needs. Each tile's, in a workspace; batch_norm_sums.h has their order.
#pragma once

#include <type_traits>

#include "cuda/kernels/batch_norm_sums.h"

namespace fusedcnn::cuda {
namespace {

// Of one channel, or of a part of it.
struct BiasSum {
  double bias;  // sum g
};
struct GradientSums {
  double bias;    // sum g
  double weight;  // sum g * (e - mean)
};

struct SumSizes {
  Tiles tiles;  // of the pooled values
  Sharing sharing;
  int64_t parts;         // of each channel: tiles
  bool aligned = false;  // whether V channels are loaded at once
};

// The order of the sums must not depend on where memory begins, so a thread's channels do not.
template <int V, typename S>
FUSEDCNN_DEVICE Pack<V, S> load_vector(const S* from, bool aligned) {
  if constexpr (V > 1) {
    if (!aligned) {
      Pack<V, S> result;
      FUSEDCNN_UNROLL
      for (int v = 0; v < V; ++v) result.values[v] = load_constant(from + v);
      return result;
    }
  }
  return load_pack<V>(from);
}

// V channels a thread. Sums: what is wanted; for BiasSum, args holds nothing but the block.
template <typename S, typename C, int V, typename Sums>
FUSEDCNN_KERNEL_RESIDENT(kLibraryThreads, 3)
gradient_sums_kernel(NormBackwardArgs args, SumSizes sizes, Sums* parts) {
  using T = Accumulator<S>;
  constexpr bool kWeight = std::is_same<Sums, GradientSums>::value;
  // Pixels whose loads are under way together: four, of three vectors each, would spill.
  constexpr int kAtOnce = kWeight && V > 2 ? 3 : 4;
  const Tiles& tiles = sizes.tiles;
  const Lanes lanes = lanes_of<V>(sizes.sharing);
  const int tile_sums = (V * lanes.rows) << tiles.channel_bits;
  SharedMemory memory;
  const Shared<T> bias_sums = memory.array<T>(tile_sums);
  const Shared<T> weight_sums = memory.array<T>(kWeight ? tile_sums : 0);
  const Strides &grad_strides = args.block.grad_output_strides,
                &code_strides = args.block.code_strides;
  for (int64_t task = block_index(); task < tiles.tasks; task += grid_blocks()) {
    const Tile tile = tile_of<V>(tiles, task);
    for (int group = 0; group < tile.channels; group += lanes.channel_step) {
      const int c = group + lanes.channel;
      const bool real = c < tile.channels;
      const int64_t channel = tile.channel + (real ? c : 0);
      const S* const grads =
          static_cast<const S*>(args.block.grad_output) + channel * grad_strides.c;
      const C* const codes = static_cast<const C*>(args.block.code) + channel * code_strides.c;
      const S* const extrema =
          static_cast<const S*>(args.extremum) + channel * args.extremum_strides.c;
      T mean[V], bias_sum[V], weight_sum[V];
      FUSEDCNN_UNROLL
      for (int v = 0; v < V; ++v) {
        mean[v] = bias_sum[v] = weight_sum[v] = 0;
        if constexpr (kWeight) {
          if (!real) continue;
          mean[v] =
              load_constant(static_cast<const T*>(args.mean) + (channel + v) * args.mean_stride);
        }
      }
      for (int p = lanes.pixel; real && p < tile.pixels; p += kAtOnce * lanes.pixel_step) {
        Pack<V, S> grad[kAtOnce], extremum[kAtOnce];
        Pack<V, C> code[kAtOnce];
        FUSEDCNN_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          const int at = p + i * lanes.pixel_step;
          grad[i] = extremum[i] = {};
          FUSEDCNN_UNROLL
          for (int v = 0; v < V; ++v) code[i].values[v] = kOff<C>;
          if (at >= tile.pixels) continue;
          const Pixel pixel = pixel_of(tiles, tile, at);
          code[i] = load_vector<V>(codes + offset_of(code_strides, tile.n, pixel), sizes.aligned);
          grad[i] = load_vector<V>(grads + offset_of(grad_strides, tile.n, pixel), sizes.aligned);
          if constexpr (kWeight) {
            extremum[i] = load_vector<V>(extrema + offset_of(args.extremum_strides, tile.n, pixel),
                                         sizes.aligned);
          }
        }
        FUSEDCNN_UNROLL
        for (int i = 0; i < kAtOnce; ++i) {
          FUSEDCNN_UNROLL
          for (int v = 0; v < V; ++v) {
            if (code[i].values[v] == kOff<C>) continue;
            const T value = widen(grad[i].values[v]);
            bias_sum[v] += value;
            if constexpr (kWeight) {
              weight_sum[v] =
                  multiply_add(value, widen(extremum[i].values[v]) - mean[v], weight_sum[v]);
            }
          }
        }
      }
      hand_in(lanes, c, real, bias_sum, bias_sums);
      if constexpr (kWeight) hand_in(lanes, c, real, weight_sum, weight_sums);
    }
    sync_threads();
    for (int c = thread_index(); c < tile.channels; c += kLibraryThreads) {
      Sums& sums = parts[(tile.channel + c) * sizes.parts + part_of(tiles, tile)];
      sums.bias = sum_of_rows(bias_sums, c, lanes.rows);
      if constexpr (kWeight) sums.weight = sum_of_rows(weight_sums, c, lanes.rows);
    }
    sync_threads();  // the next tile overwrites them
  }
}

// ---- host ---------------------------------------------------------------------------------------

// Channels of a thread that takes several: 8 bytes of a half type, 16 of others.
constexpr int kMostSumVector = 4;
template <typename S>
constexpr int kSumVector = sizeof(S) == 8 ? 2 : kMostSumVector;

// Sixteen elements a thread, or eight vectors. Along the pixels a warp has one channel.
inline SumSizes sum_sizes(const Geometry& g, bool along_channels, int vector) {
  SumSizes sizes{
      tiles_of(g.batch, g.out_channels, g.h.out, g.w.out, vector,
               along_channels ? kChannelBits - bits_for(vector, 30) : kThreadBits - kWarpBits,
               kThreadBits + (vector == 1 ? 4 : 3)),
      {along_channels, 0},
      0};
  const Tiles& tiles = sizes.tiles;
  sizes.sharing.bits = along_channels                 ? tiles.channel_bits
                       : tiles.pixel_bits < kWarpBits ? tiles.pixel_bits
                                                      : kWarpBits;
  sizes.parts = parts_of(tiles, g.batch);
  return sizes;
}

// Bytes of a workspace for the parts of any layout.
template <typename Sums>
int64_t sum_bytes(const Geometry& g) {
  int64_t most = sum_sizes(g, false, 1).parts;
  for (int vector = 1; vector <= kMostSumVector; vector *= 2) {
    const int64_t parts = sum_sizes(g, true, vector).parts;
    if (parts > most) most = parts;
  }
  return g.out_channels * most * static_cast<int64_t>(sizeof(Sums));
}

template <typename S, typename C, int V, typename Sums>
int64_t launch_gradient_sums(const char* name, const NormBackwardArgs& args, const SumSizes& sizes,
                             Sums* parts, const Execution& execution) {
  const int arrays = std::is_same<Sums, GradientSums>::value ? 2 : 1;
  const int64_t sums = int64_t{V * sizes.sharing.rows()} << sizes.tiles.channel_bits;
  launch(name, gradient_sums_kernel<S, C, V, Sums>, blocks_for(sizes.tiles.tasks), kLibraryThreads,
         arrays * shared_bytes<Accumulator<S>>(sums), execution, args, sizes, parts);
  return sizes.parts;
}

// Fills parts[out channels][parts]; returns the number of parts.
template <typename S, typename C, typename Sums>
int64_t gradient_sums(const char* name, const NormBackwardArgs& args, Sums* parts,
                      const Execution& execution) {
  const Geometry& g = args.block.geometry;
  const Strides &grads = args.block.grad_output_strides, &codes = args.block.code_strides,
                &extrema = args.extremum_strides;
  if constexpr (sizeof(C) == 1) {
    constexpr int64_t kSize = sizeof(S), kV = kSumVector<S>, kBytes = kV * kSize;
    const bool norm = args.extremum;
    if (codes.c == 1 && grads.c == 1 && (!norm || extrema.c == 1) && g.out_channels % kV == 0) {
      SumSizes sizes = sum_sizes(g, true, kV);
      sizes.aligned =
          aligned(args.block.code, 1, kV, {codes.n, codes.h, codes.w}) &&
          aligned(args.block.grad_output, kSize, kBytes, {grads.n, grads.h, grads.w}) &&
          (!norm || aligned(args.extremum, kSize, kBytes, {extrema.n, extrema.h, extrema.w}));
      return launch_gradient_sums<S, C, kV>(name, args, sizes, parts, execution);
    }
  }
  return launch_gradient_sums<S, C, 1>(name, args, sum_sizes(g, codes.c == 1, 1), parts, execution);
}

}  // namespace
}  // namespace fusedcnn::cuda
