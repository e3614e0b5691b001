// In place of the convolution's outputs, the gradient that arrives at them through batch
// normalisation, ReLU and pool. It is written output by output, each rounded once, so windows may
// overlap; the windows that one output won are added in their order.
#pragma once

#include "cpu/kernels/batch_norm_rows.h"
#include "cpu/kernels/large_windows.h"
#include "cpu/kernels/winners_gradient.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// The pooled outputs whose windows reach over a column: none, one, or those of a range.
struct ColumnHolders {
  int32_t first, last;
};

template <typename S, typename C>
struct NormRow {
  const Geometry& g;
  Pixels<S> grads;
  Pixels<C> codes;
  int64_t first_row;  // where they begin
  const ColumnHolders* columns;

  // One row of `N` channels. to: [conv w][OC] at the first of these channels.
  template <int N>
  FUSEDCNN_INLINE void put(int64_t y, int64_t c, LaneVector<Accumulator<S>, N> mean,
                           LaneVector<Accumulator<S>, N> slope,
                           LaneVector<Accumulator<S>, N> offset,
                           LaneVector<Accumulator<S>, N> scale, S* to) const {
    using T = Accumulator<S>;
    typedef LaneVector<T, N> V;
    const Holders rows(g.h, y);
    for (int64_t x = 0; x < g.w.conv; ++x, to += g.out_channels) {
      V won = {};
      for (int64_t oh = rows.first; oh < rows.last; ++oh) {
        const int64_t ph = Holders::element(g.h, y, oh);
        if (ph < 0) continue;
        for (int64_t ow = columns[x].first; ow < columns[x].last; ++ow) {
          const int64_t pw = Holders::element(g.w, x, ow);
          if (pw < 0) continue;
          const int64_t q = (oh - first_row) * g.w.out + ow;
          const auto wins = load_codes<T, N>(codes.data + q * codes.stride + c) ==
                            static_cast<Int<T>>(ph * g.w.pool_kernel + pw);
          won += wins ? load_values<N>(grads.data + q * grads.stride + c) : V{};
        }
      }
      const V y_value = load_values<N>(to);
      store_values<N>(to, (y_value - mean) * slope + offset + scale * won);
    }
  }
};

template <typename S, typename C>
void norm_gradient(const Geometry& g, const NormGradientArgs& args) {
  using T = Accumulator<S>;
  const int64_t channels = g.out_channels, line = g.w.conv * channels;
  int64_t first, last;
  pooled_range(g.h, args.conv_begin, args.conv_end, first, last);
  last = larger(first, last);
  const int64_t most = round_up((last - first) * g.w.out * channels, 4);
  const int64_t table = round_up(g.w.conv, 8) * int64_t{sizeof(ColumnHolders)};
  char* memory =
      static_cast<char*>(scratch(Slot::kConv, table + most * int64_t{sizeof(S) + sizeof(C)}));
  ColumnHolders* columns = reinterpret_cast<ColumnHolders*>(memory);
  for (int64_t x = 0; x < g.w.conv; ++x) {
    const Holders holders(g.w, x);
    columns[x] = {static_cast<int32_t>(holders.first), static_cast<int32_t>(holders.last)};
  }
  S* values = reinterpret_cast<S*>(memory + table);
  const NormRow<S, C> row = {
      g, pixels_of(g, args.grad_output, args.grad_output_strides, first, last, values),
      pixels_of(g, args.code, args.code_strides, first, last, reinterpret_cast<C*>(values + most)),
      first, columns};
  const T *mean = static_cast<const T*>(args.mean), *slope = static_cast<const T*>(args.slope);
  const T *offset = static_cast<const T*>(args.offset), *scale = static_cast<const T*>(args.scale);
  S* to = static_cast<S*>(args.plane) + (args.conv_begin - args.plane_begin) * line;
  for (int64_t y = args.conv_begin; y < args.conv_end; ++y, to += line) {
    for_channels<T>(channels, [&](auto lanes, int64_t c) {
      row.template put<lanes()>(y, c, load_values<lanes()>(mean + c),
                                load_values<lanes()>(slope + c), load_values<lanes()>(offset + c),
                                load_values<lanes()>(scale + c), to + c);
    });
  }
}

void norm_gradient(const NormShape& shape, const NormGradientArgs& args) {
  for_types(shape,
            [&]<typename S, typename C>(S, C) { norm_gradient<S, C>(shape.geometry, args); });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
