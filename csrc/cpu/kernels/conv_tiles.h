// The general forward's convolution: a few output channels at a time, over phase planes (plan.h),
// where every tap is a contiguous run of places.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/phase_planes.h"
#include "cpu/kernels/simd.h"
#include "cpu/plan.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Register tile: kTileChannels x kTileVectors accumulators, one vector of input per column and one
// broadcast weight. 32 registers: 8 x 3 + 3 + 1 = 28; a tap costs 3 loads and 8 broadcasts for 24
// FMAs, well under the two loads a cycle that two FMA ports would outrun. 16 registers: 4 x 3.
constexpr int kTileChannels = kRegisters >= 32 ? 8 : 4;
constexpr int kTileVectors = 3;
// Products summed in one chain. Longer sums are taken in runs of this length and added up, since
// one long chain of additions would round several times more than the stock layers do.
constexpr int64_t kChain = 64;

// One call owns R output channels x V vectors of places in one pool phase:
//   out[r][v] = sum over c, t of weight[c][t][r] * planes[c * channel_size + offset[t]]
// plus what out holds, where `add`, plus bias[r], where bias is not null: the bias comes last,
// since partial sums that carry it round more. planes: [channels][channel_size], at the first
// place. weight: [channels][taps][kTileChannels]. out: [R][out_stride].
template <typename T, int R, int V>
FUSEDCNN_NOINLINE void conv_tile(const T* planes, int64_t channel_size, int64_t channels,
                                 const int64_t* offset, int64_t taps, const T* weight,
                                 const T* bias, bool add, T* out, int64_t out_stride) {
  Vector<T> acc[R][V];
  FUSEDCNN_UNROLL
  for (int r = 0; r < R; ++r) {
    FUSEDCNN_UNROLL
    for (int v = 0; v < V; ++v) acc[r][v] = Vector<T>{};
  }
  for (int64_t c = 0; c < channels; ++c, planes += channel_size) {
    for (int64_t t = 0; t < taps; ++t, weight += kTileChannels) {
      const T* from = planes + offset[t];
      Vector<T> x[V];
      FUSEDCNN_UNROLL
      for (int v = 0; v < V; ++v) x[v] = load(from + v * kLanes<T>);
      FUSEDCNN_UNROLL
      for (int r = 0; r < R; ++r) {
        const Vector<T> w = broadcast(weight[r]);
        FUSEDCNN_UNROLL
        for (int v = 0; v < V; ++v) acc[r][v] += w * x[v];
      }
    }
  }
  FUSEDCNN_UNROLL
  for (int r = 0; r < R; ++r) {
    FUSEDCNN_UNROLL
    for (int v = 0; v < V; ++v) {
      T* to = out + r * out_stride + v * kLanes<T>;
      Vector<T> sum = add ? load(to) + acc[r][v] : acc[r][v];
      if (bias) sum += bias[r];
      store(to, sum);
    }
  }
}

template <typename T>
using ConvTile = void (*)(const T*, int64_t, int64_t, const int64_t*, int64_t, const T*, const T*,
                          bool, T*, int64_t);

template <typename T, int R>
ConvTile<T> conv_tile_for(int64_t vectors) {
  static constexpr ConvTile<T> tiles[] = {conv_tile<T, R, 1>, conv_tile<T, R, 2>,
                                          conv_tile<T, R, 3>};
  static_assert(sizeof tiles / sizeof *tiles == kTileVectors);
  return tiles[vectors - 1];
}

template <typename T>
ConvTile<T> conv_tile_for(int64_t channels, int64_t vectors) {
  switch (channels) {
    case 1: return conv_tile_for<T, 1>(vectors);
    case 2: return conv_tile_for<T, 2>(vectors);
    case 3: return conv_tile_for<T, 3>(vectors);
    case 4: return conv_tile_for<T, 4>(vectors);
    case 5: return conv_tile_for<T, 5>(vectors);
    case 6: return conv_tile_for<T, 6>(vectors);
    case 7: return conv_tile_for<T, 7>(vectors);
    default: return conv_tile_for<T, 8>(vectors);
  }
}

// Everything one call shares between its tasks. packed: [groups][blocks][channels][taps]
// [kTileChannels].
template <typename T>
struct ForwardShared {
  const ForwardPlan& plan;
  const T* packed;
  const T* bias;   // [groups][blocks][kTileChannels], zeros where there is none
  int64_t blocks;  // of kTileChannels output channels, in one group
};

// Lays out weights and bias, in the calling thread's scratch.
template <typename S>
ForwardShared<Accumulator<S>> share_weights(const ForwardArgs& args, const ThreadPool& pool,
                                            const ForwardPlan& plan) {
  using T = Accumulator<S>;
  const Geometry& g = args.geometry;
  const int64_t channels = g.in_channels_per_group(), out_channels = g.out_channels_per_group();
  const int64_t blocks = (out_channels + kTileChannels - 1) / kTileChannels;
  const int64_t block_size = channels * g.taps() * kTileChannels;
  T* packed = static_cast<T*>(
      scratch(Slot::kWeights, g.groups * blocks * (block_size + kTileChannels) * sizeof(T)));
  T* bias = packed + g.groups * blocks * block_size;
  const S* weight = static_cast<const S*>(args.weight);
  parallel_tasks(pool, g.groups * blocks, [&](int64_t index) {
    const int64_t group = index / blocks, first = index % blocks * kTileChannels;
    T* to = packed + index * block_size;
    for (int64_t r = 0; r < kTileChannels; ++r) {
      const bool real = first + r < out_channels;
      const int64_t oc = group * out_channels + first + r;
      bias[index * kTileChannels + r] =
          real && args.bias ? widen(static_cast<const S*>(args.bias)[oc * args.bias_stride]) : T(0);
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t t = 0; t < g.taps(); ++t) {
          const int64_t at = oc * args.weight_strides.n + c * args.weight_strides.c +
                             t / g.w.kernel * args.weight_strides.h +
                             t % g.w.kernel * args.weight_strides.w;
          to[(c * g.taps() + t) * kTileChannels + r] = real ? widen(weight[at]) : T(0);
        }
      }
    }
  });
  return {plan, packed, bias, blocks};
}

// A task's planes and convolution scratch, and what they need before the first band.
template <typename T>
struct BandScratch {
  T* in_order;  // pack_band's
  T* planes;    // [channels][channel_size]
  T* conv;      // [kTileChannels][conv phases][conv_size]
  int64_t conv_channel;

  BandScratch(const ForwardPlan& plan, int64_t channels) {
    constexpr int kN = kLanes<T>;
    const int64_t rows_size = plan.plane_rows * packed_row(plan, kN);
    // Vector loads reach past the last place by less than a tile.
    const int64_t slack = kTileVectors * kN;
    in_order = static_cast<T*>(
        scratch(Slot::kPlanes, (rows_size + channels * plan.channel_size + slack) * sizeof(T)));
    planes = in_order + rows_size;
    conv_channel = plan.conv_phases() * plan.conv_size;
    conv = static_cast<T*>(scratch(Slot::kConv, kTileChannels * conv_channel * sizeof(T)));
    memset(in_order, 0, rows_size * sizeof(T));
    memset(planes + channels * plan.channel_size, 0, slack * sizeof(T));
  }

  // Lays out one group of image n for the band from pooled row `first_out` on.
  template <typename S>
  void pack(const ForwardPlan& plan, const ForwardArgs& args, const Geometry& g, int64_t n,
            int64_t group, int64_t first_out) {
    const int64_t channels = g.in_channels_per_group();
    RangeCheck<T> unused(0);
    for (int64_t c = 0; c < channels; ++c) {
      const S* image = static_cast<const S*>(args.input) + n * args.input_strides.n +
                       (group * channels + c) * args.input_strides.c;
      pack_band<S, T>(plan, g, image, args.input_strides, first_out, planes + c * plan.channel_size,
                      in_order, unused);
    }
  }

  // conv: the first `rows` pooled rows of all pool phases of block `index`, which counts through
  // [groups][blocks] and has `in_block` output channels.
  FUSEDCNN_NOINLINE void convolve(const ForwardShared<T>& shared, const Geometry& g, int64_t index,
                                  int64_t in_block, int64_t rows) const {
    constexpr int kN = kLanes<T>;
    const ForwardPlan& plan = shared.plan;
    const int64_t channels = g.in_channels_per_group();
    const int64_t run = larger<int64_t>(1, kChain / g.taps());  // input channels of one chain
    const T* weight = shared.packed + index * channels * g.taps() * kTileChannels;
    const T* bias = shared.bias + index * kTileChannels;
    for (int64_t phase = 0; phase < plan.conv_phases(); ++phase) {
      const int64_t places =
          (rows - 1 + plan.h.conv_extra[phase / plan.w.conv_phases]) * plan.pitch + g.w.out +
          plan.w.conv_extra[phase % plan.w.conv_phases];
      const int64_t vectors = (places + kN - 1) / kN;
      T* to = conv + phase * plan.conv_size;
      for (int64_t v = 0; v < vectors; v += kTileVectors) {
        const auto tile = conv_tile_for<T>(in_block, smaller<int64_t>(kTileVectors, vectors - v));
        for (int64_t c = 0; c < channels; c += run) {
          tile(planes + c * plan.channel_size + v * kN, plan.channel_size,
               smaller(run, channels - c), plan.tap_offset.get() + phase * g.taps(), g.taps(),
               weight + c * g.taps() * kTileChannels, c + run < channels ? nullptr : bias, c > 0,
               to + v * kN, conv_channel);
        }
      }
      // The last row is pooled in whole vectors, which may end behind the tiles.
      for (int64_t r = 0; r < in_block; ++r) {
        store(to + r * conv_channel + vectors * kN, Vector<T>{});
      }
    }
  }
};

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
