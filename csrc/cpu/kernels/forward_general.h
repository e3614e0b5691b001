// The general forward kernel: any kernel size, stride, padding, dilation, groups and pool.
//
// A task owns a band of pooled rows of one image. For each group it lays the band's input out in
// phase planes (plan.h), where every tap is a contiguous run over pooled outputs; then a few output
// channels at a time it computes the convolution outputs of every pool phase, and pools them.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/ahead.h"
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

// Convolution outputs that do not exist (the pool's padding) must lose every comparison.
// conv: [conv phases][conv_size] of one output channel.
template <typename T>
void mask_outside(const ForwardPlan& plan, const Geometry& g, int64_t first_out, int64_t rows,
                  T* conv) {
  const T lowest = -static_cast<T>(__builtin_inff());
  for (int64_t jh = 0; jh < plan.h.conv_phases; ++jh) {
    for (int64_t jw = 0; jw < plan.w.conv_phases; ++jw, conv += plan.conv_size) {
      const int64_t cols = g.w.out + plan.w.conv_extra[jw];
      for (int64_t i = 0; i < rows + plan.h.conv_extra[jh]; ++i) {
        const int64_t y =
            (first_out + i) * g.h.pool_stride + plan.h.conv_phase[jh] - g.h.pool_padding;
        const bool outside = y < 0 || y >= g.h.conv;
        T* row = conv + i * plan.pitch;
        for (int64_t k = 0; k < cols; ++k) {
          const int64_t x = k * g.w.pool_stride + plan.w.conv_phase[jw] - g.w.pool_padding;
          if (outside || x < 0 || x >= g.w.conv) row[k] = lowest;
        }
      }
    }
  }
}

// Whether pooled output o's window holds no convolution output at all. Only a dilated window can
// step over the whole input; torch then yields -infinity.
FUSEDCNN_INLINE bool empty_window(const Axis& axis, int64_t o) {
  for (int64_t p = 0; p < axis.pool_kernel; ++p) {
    const int64_t c = o * axis.pool_stride - axis.pool_padding + p * axis.pool_dilation;
    if (c >= 0 && c < axis.conv) return false;
  }
  return true;
}

// Pools one row of one output channel: max, ReLU and code of kLanes places at a time.
// conv: the channel's scratch at the row's first place; output, code: the row in the output
// tensors (code may be null), `stride` elements between pixels.
template <typename S, typename C>
void pool_row(const ForwardPlan& plan, const Geometry& g, const Accumulator<S>* conv, S* output,
              C* code, int64_t stride) {
  using T = Accumulator<S>;
  constexpr int kN = kLanes<T>;
  typedef C CodeVector __attribute__((vector_size(kN * sizeof(C))));
  typedef C CodeUnaligned __attribute__((vector_size(kN * sizeof(C)), aligned(1), may_alias));
  const int64_t window = g.window();
  const bool direct = stride == 1 && sizeof(S) == sizeof(T);
  for (int64_t k = 0; k < g.w.out; k += kN) {
    Vector<T> best = broadcast(-static_cast<T>(__builtin_inff()));
    Vector<Int<T>> winner = {};
    for (int64_t e = 0; e < window; ++e) {
      const Vector<T> value = load(conv + plan.pool_offset[e] + k);
      // The first maximum wins; NaN beats everything, a later NaN too, as in torch.
      const auto wins = (value > best) | (value != value);
      best = wins ? value : best;
      winner = wins ? broadcast(static_cast<Int<T>>(e)) : winner;
    }
    const auto off = best <= Vector<T>{};  // false for NaN, which ReLU lets through
    best = off ? Vector<T>{} : best;
    winner = off ? broadcast(static_cast<Int<T>>(kOff<C>)) : winner;
    const CodeVector codes = __builtin_convertvector(winner, CodeVector);
    if (direct && k + kN <= g.w.out) {
      store(reinterpret_cast<T*>(output) + k, best);
      if (code) *reinterpret_cast<CodeUnaligned*>(code + k) = codes;
      continue;
    }
    T values[kN];
    C bytes[kN];
    memcpy(values, &best, sizeof best);
    memcpy(bytes, &codes, sizeof codes);
    const int64_t count = smaller<int64_t>(kN, g.w.out - k);
    if (stride == 1) {
      convert_run(values, output + k, count);
    } else {
      for (int64_t i = 0; i < count; ++i) output[(k + i) * stride] = narrow<S>(values[i]);
    }
    if (!code) continue;
    for (int64_t i = 0; i < count; ++i) code[(k + i) * stride] = bytes[i];
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

template <typename S, typename C>
void forward_band(const ForwardArgs& args, const ForwardShared<Accumulator<S>>& shared, int64_t n,
                  int64_t first_out) {
  using T = Accumulator<S>;
  constexpr int kN = kLanes<T>;
  const Geometry& g = args.geometry;
  const ForwardPlan& plan = shared.plan;
  const int64_t channels = g.in_channels_per_group(), out_channels = g.out_channels_per_group();
  const int64_t rows = smaller(plan.band, g.h.out - first_out);

  const int64_t rows_size = plan.plane_rows * packed_row(plan, kN);
  // Vector loads reach past the last place by less than a tile.
  const int64_t slack = kTileVectors * kN;
  T* in_order = static_cast<T*>(
      scratch(Slot::kPlanes, (rows_size + channels * plan.channel_size + slack) * sizeof(T)));
  T* planes = in_order + rows_size;
  const int64_t conv_channel = plan.conv_phases() * plan.conv_size;
  T* conv = static_cast<T*>(scratch(Slot::kConv, kTileChannels * conv_channel * sizeof(T)));
  memset(in_order, 0, rows_size * sizeof(T));
  memset(planes + channels * plan.channel_size, 0, slack * sizeof(T));
  const bool masked = plan.h.masked || plan.w.masked;
  const int64_t run = larger<int64_t>(1, kChain / g.taps());  // input channels of one chain
  RangeCheck<T> unused(0);
  Ahead ahead = Ahead::of(static_cast<const S*>(args.input), args.input_strides, g.in_channels,
                          g.h.in, g.w.in, n, g.batch, g.groups * shared.blocks);

  for (int64_t group = 0; group < g.groups; ++group) {
    for (int64_t c = 0; c < channels; ++c) {
      const S* image = static_cast<const S*>(args.input) + n * args.input_strides.n +
                       (group * channels + c) * args.input_strides.c;
      pack_band<S, T>(plan, g, image, args.input_strides, first_out, planes + c * plan.channel_size,
                      in_order, unused);
    }
    for (int64_t block = 0; block < shared.blocks; ++block) {
      const int64_t in_block =
          smaller<int64_t>(kTileChannels, out_channels - block * kTileChannels);
      const int64_t index = group * shared.blocks + block;
      const T* weight = shared.packed + index * channels * g.taps() * kTileChannels;
      const T* bias = shared.bias + index * kTileChannels;
      ahead.step();
      for (int64_t phase = 0; phase < plan.conv_phases(); ++phase) {
        const int64_t places =
            (rows - 1 + plan.h.conv_extra[phase / plan.w.conv_phases]) * plan.pitch + g.w.out +
            plan.w.conv_extra[phase % plan.w.conv_phases];
        const int64_t vectors = (places + kN - 1) / kN;
        for (int64_t v = 0; v < vectors; v += kTileVectors) {
          const auto tile = conv_tile_for<T>(in_block, smaller<int64_t>(kTileVectors, vectors - v));
          for (int64_t c = 0; c < channels; c += run) {
            tile(planes + c * plan.channel_size + v * kN, plan.channel_size,
                 smaller(run, channels - c), plan.tap_offset.get() + phase * g.taps(), g.taps(),
                 weight + c * g.taps() * kTileChannels, c + run < channels ? nullptr : bias, c > 0,
                 conv + phase * plan.conv_size + v * kN, conv_channel);
          }
        }
        // The last row is pooled in whole vectors, which may end behind the tiles.
        for (int64_t r = 0; r < in_block; ++r) {
          store(conv + r * conv_channel + phase * plan.conv_size + vectors * kN, Vector<T>{});
        }
      }
      for (int64_t r = 0; r < in_block; ++r) {
        T* channel = conv + r * conv_channel;
        if (masked) mask_outside(plan, g, first_out, rows, channel);
        const int64_t oc = group * out_channels + block * kTileChannels + r;
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t at = n * args.output_strides.n + oc * args.output_strides.c +
                             (first_out + i) * args.output_strides.h;
          S* output = static_cast<S*>(args.output) + at;
          C* code = args.code ? static_cast<C*>(args.code) + at : nullptr;
          pool_row<S, C>(plan, g, channel + i * plan.pitch, output, code, args.output_strides.w);
          if (!masked) continue;
          const bool empty_row = empty_window(g.h, first_out + i);
          for (int64_t k = 0; k < g.w.out; ++k) {
            if (empty_row || empty_window(g.w, k)) {
              output[k * args.output_strides.w] = narrow<S>(-static_cast<T>(__builtin_inff()));
            }
          }
        }
      }
    }
  }
}

// `only`, where given, picks the images to compute: [batch], nonzero for yes.
template <typename S, typename C>
void forward_general_bands(const ForwardArgs& args, const ThreadPool& pool,
                           const uint8_t* only = nullptr) {
  using T = Accumulator<S>;
  const Geometry& g = args.geometry;
  const ForwardPlan plan(g, sizeof(T), kLanes<T>);
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
  const ForwardShared<T> shared{plan, packed, bias, blocks};
  const int64_t bands = plan.bands(g);
  parallel_tasks(pool, g.batch * bands, [&](int64_t task) {
    if (only && !only[task / bands]) return;
    forward_band<S, C>(args, shared, task / bands, task % bands * plan.band);
  });
}

const char* covers_everything(const Problem&) { return nullptr; }

void forward_general(const ForwardArgs& args, const ThreadPool& pool) {
  const auto run = [&]<typename S>(S) {
    args.wide_code ? forward_general_bands<S, int32_t>(args, pool)
                   : forward_general_bands<S, uint8_t>(args, pool);
  };
  switch (args.type) {
    case DataType::kFloat32: return run(float{});
    case DataType::kFloat64: return run(double{});
    case DataType::kBFloat16: return run(BFloat16{});
    case DataType::kFloat16: return run(Float16{});
  }
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
