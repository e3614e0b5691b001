// In place of the convolution's outputs, the gradient that arrives at them through batch
// normalisation, ReLU and pool. It is written output by output, each rounded once, so windows may
// overlap; the windows that one output won are added in their order.
#pragma once

#include "cpu/kernels/batch_norm_rows.h"
#include "cpu/kernels/large_windows.h"
#include "cpu/kernels/winners_gradient.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// The pooled outputs whose windows reach over a column, and which element of the first one's window
// the column is, counted in columns: of each next one's it is `pool_stride` less.
struct ColumnHolders {
  int32_t first, count;
  int64_t distance;
};

// A pooled row whose windows hold a row, and what their codes are in its first column.
template <typename S, typename C>
struct RowHolder {
  const S* grads;
  const C* codes;
  int64_t element;
};

template <typename S, typename C>
struct GradientRow {
  using T = Accumulator<S>;

  const Geometry& g;
  const NormGradientArgs& args;
  const ColumnHolders* columns;
  const RowHolder<S, C>* holders;
  int64_t held;  // by so many
  int64_t grad_stride, code_stride;

  // kVectors vectors of N channels. to: [conv w][OC].
  template <int N, int kVectors, bool kDilated>
  FUSEDCNN_INLINE void put(int64_t c, S* to) const {
    typedef LaneVector<T, N> V;
    V mean[kVectors], slope[kVectors], offset[kVectors], scale[kVectors];
    FUSEDCNN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      mean[v] = load_values<N>(static_cast<const T*>(args.mean) + c + v * N);
      slope[v] = load_values<N>(static_cast<const T*>(args.slope) + c + v * N);
      offset[v] = load_values<N>(static_cast<const T*>(args.offset) + c + v * N);
      scale[v] = load_values<N>(static_cast<const T*>(args.scale) + c + v * N);
    }
    to += c;
    for (int64_t x = 0; x < g.w.conv; ++x, to += g.out_channels) {
      const ColumnHolders column = columns[x];
      V won[kVectors] = {};
      for (int64_t h = 0; h < held; ++h) {
        const S* grads = holders[h].grads + column.first * grad_stride + c;
        const C* codes = holders[h].codes + column.first * code_stride + c;
        int64_t distance = column.distance;
        for (int32_t i = 0; i < column.count; ++i) {
          if (!kDilated || distance % g.w.pool_dilation == 0) {
            const int64_t element =
                holders[h].element + (kDilated ? distance / g.w.pool_dilation : distance);
            const auto own = splat<Int<T>, N>(static_cast<Int<T>>(element));
            FUSEDCNN_UNROLL
            for (int v = 0; v < kVectors; ++v) {
              const auto wins = load_codes<T, N>(codes + v * N) == own;
              won[v] += wins ? load_values<N>(grads + v * N) : V{};
            }
          }
          distance -= g.w.pool_stride;
          grads += grad_stride;
          codes += code_stride;
        }
      }
      FUSEDCNN_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const V y = load_values<N>(to + v * N);
        store_values<N>(to + v * N, (y - mean[v]) * slope[v] + offset[v] + scale[v] * won[v]);
      }
    }
  }

  template <bool kDilated>
  FUSEDCNN_NOINLINE void put(S* to) const {
    constexpr int kPair = 2 * kLanes<T>;
    int64_t c = 0;
    for (; c + kPair <= g.out_channels; c += kPair) put<kLanes<T>, 2, kDilated>(c, to);
    for_channels<T>(g.out_channels - c,
                    [&](auto lanes, int64_t rest) { put<lanes(), 1, kDilated>(c + rest, to); });
  }
};

// Whether each output belongs to one window of 2x2: then a window's gradient is taken once for its
// four outputs.
inline bool pairs_of_pairs(const Geometry& g) {
  return g.w.conv % 2 == 0 && g.h.pool_kernel == 2 && g.w.pool_kernel == 2 &&
         g.h.pool_stride == 2 && g.w.pool_stride == 2 && g.h.pool_padding == 0 &&
         g.w.pool_padding == 0 && g.h.pool_dilation == 1 && g.w.pool_dilation == 1;
}

// Two rows under such windows. grads, codes: of the pooled row; to: of the upper one.
template <typename S, typename C>
FUSEDCNN_NOINLINE void put_pairs(const Geometry& g, const NormGradientArgs& args,
                                 const Pixels<S>& grads, const Pixels<C>& codes, int64_t pixel,
                                 S* to) {
  using T = Accumulator<S>;
  const int64_t row = g.w.conv * g.out_channels;
  for_channels<T>(g.out_channels, [&](auto lanes, int64_t c) {
    constexpr int N = lanes();
    typedef LaneVector<T, N> V;
    const V mean = load_values<N>(static_cast<const T*>(args.mean) + c);
    const V slope = load_values<N>(static_cast<const T*>(args.slope) + c);
    const V offset = load_values<N>(static_cast<const T*>(args.offset) + c);
    const V scale = load_values<N>(static_cast<const T*>(args.scale) + c);
    const S* grad = grads.data + pixel * grads.stride + c;
    const C* code = codes.data + pixel * codes.stride + c;
    S* at = to + c;
    for (int64_t ow = 0; ow < g.w.out; ++ow, at += 2 * g.out_channels) {
      const auto winner = load_codes<T, N>(code);
      // Where the code is off it equals none of the four, whatever stands in the gradient.
      const V won = scale * load_values<N>(grad);
      FUSEDCNN_UNROLL
      for (int i = 0; i < 4; ++i) {
        S* const y = at + i / 2 * row + i % 2 * g.out_channels;
        const V rest = (load_values<N>(y) - mean) * slope + offset;
        store_values<N>(y, winner == static_cast<Int<T>>(i) ? rest + won : rest);
      }
      grad += grads.stride;
      code += codes.stride;
    }
  });
}

template <typename S, typename C>
void norm_gradient(const Geometry& g, const NormGradientArgs& args) {
  const int64_t channels = g.out_channels, line = g.w.conv * channels;
  int64_t first, last;
  pooled_range(g.h, args.conv_begin, args.conv_end, first, last);
  last = larger(first, last);
  const int64_t most = round_up((last - first) * g.w.out * channels, 4);
  const int64_t columns_bytes = g.w.conv * int64_t{sizeof(ColumnHolders)};
  const int64_t holders_bytes = (last - first) * int64_t{sizeof(RowHolder<S, C>)};
  char* memory = static_cast<char*>(
      scratch(Slot::kConv, columns_bytes + holders_bytes + most * int64_t{sizeof(S) + sizeof(C)}));
  auto* columns = reinterpret_cast<ColumnHolders*>(memory);
  auto* holders = reinterpret_cast<RowHolder<S, C>*>(memory + columns_bytes);
  S* values = reinterpret_cast<S*>(memory + columns_bytes + holders_bytes);
  for (int64_t x = 0; x < g.w.conv; ++x) {
    const Holders held(g.w, x);
    columns[x] = {static_cast<int32_t>(held.first), static_cast<int32_t>(held.last - held.first),
                  x + g.w.pool_padding - held.first * g.w.pool_stride};
  }
  const auto grads = pixels_of(g, args.grad_output, args.grad_output_strides, first, last, values);
  const auto codes =
      pixels_of(g, args.code, args.code_strides, first, last, reinterpret_cast<C*>(values + most));
  GradientRow<S, C> row = {g, args, columns, holders, 0, grads.stride, codes.stride};
  S* to = static_cast<S*>(args.plane) + (args.conv_begin - args.plane_begin) * line;
  const bool pairs = pairs_of_pairs(g);
  for (int64_t y = args.conv_begin; y < args.conv_end; ++y, to += line) {
    if (pairs && y % 2 == 0 && y + 1 < args.conv_end) {
      put_pairs<S, C>(g, args, grads, codes, (y / 2 - first) * g.w.out, to);
      ++y, to += line;
      continue;
    }
    row.held = 0;
    const Holders held(g.h, y);
    for (int64_t oh = held.first; oh < held.last; ++oh) {
      const int64_t element = Holders::element(g.h, y, oh), pixel = (oh - first) * g.w.out;
      if (element < 0) continue;
      holders[row.held++] = {grads.data + pixel * grads.stride, codes.data + pixel * codes.stride,
                             element * g.w.pool_kernel};
    }
    g.w.pool_dilation == 1 ? row.template put<false>(to) : row.template put<true>(to);
  }
}

void norm_gradient(const NormShape& shape, const NormGradientArgs& args) {
  for_types(shape,
            [&]<typename S, typename C>(S, C) { norm_gradient<S, C>(shape.geometry, args); });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
