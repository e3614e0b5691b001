// The passes of a block with batch normalisation that see pooled values alone: from the windows'
// largest values to the block's output, and the sums that the backward needs before all else.
#pragma once

#include "cpu/kernels/batch_norm_rows.h"
#include "cpu/kernels/window_range.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// ---- output -------------------------------------------------------------------------------------

// What becomes of a vector of values: lanes are pixels of one channel or channels of one pixel.
template <typename T, int N>
struct NormLanes {
  LaneVector<T, N> mean, mean_rest, scale, shift, sign;

  template <typename S, typename C>
  FUSEDCNN_INLINE void put(S* extremum, S* output, C* code, bool negated) const {
    typedef LaneVector<T, N> V;
    const V value = load_values<N>(extremum);
    const V normal = (value - mean - mean_rest) * scale + shift;
    const auto off = normal <= V{};  // false for NaN, which ReLU lets through
    if (negated) store_values<N>(extremum, value * sign);
    store_values<N>(output, off ? V{} : normal);
    if (code) {
      const auto winner = load_codes<T, N>(code);
      store_codes<T, N>(code, off ? splat<Int<T>, N>(kOffLane<T, C>) : winner);
    }
  }
};

// Windows without elements have no value to normalise: minus infinity, as without normalisation.
template <typename S>
void put_empty_windows(const Geometry& g, const NormOutputArgs& args) {
  const S lowest = narrow<S>(-static_cast<Accumulator<S>>(__builtin_inff()));
  for (int64_t oh = args.out_begin; oh < args.out_end; ++oh) {
    for (int64_t ow = 0; ow < g.w.out; ++ow) {
      if (!empty_window(g.h, oh) && !empty_window(g.w, ow)) continue;
      S* at = static_cast<S*>(args.output) + oh * args.strides.h + ow * args.strides.w;
      for (int64_t c = 0; c < g.out_channels; ++c) at[c * args.strides.c] = lowest;
    }
  }
}

template <typename S, typename C>
void norm_output(const Geometry& g, const NormOutputArgs& args) {
  using T = Accumulator<S>;
  const Strides& s = args.strides;
  const int64_t channels = g.out_channels, pixels = (args.out_end - args.out_begin) * g.w.out;
  const int64_t offset = args.out_begin * s.h;
  S *extremum = static_cast<S*>(args.extremum) + offset,
    *output = static_cast<S*>(args.output) + offset;
  C* code = args.code ? static_cast<C*>(args.code) + offset : nullptr;
  const T *mean = static_cast<const T*>(args.mean), *rest = static_cast<const T*>(args.mean_rest);
  const T *scale = static_cast<const T*>(args.scale), *shift = static_cast<const T*>(args.shift);
  // Of what is overwritten with what the next pass would read again, nothing is kept.
  const bool kept = args.extremum != args.output;
  if (s.w == 1 && channels > 1) {
    for (int64_t c = 0; c < channels; ++c, extremum += s.c, output += s.c) {
      const bool negated = kept && args.negated && args.negated[c];
      const auto put = [&](auto lanes, int64_t i) {
        const NormLanes<T, lanes()> lane = {splat<T, lanes()>(mean[c]), splat<T, lanes()>(rest[c]),
                                            splat<T, lanes()>(scale[c]),
                                            splat<T, lanes()>(shift[c]), splat<T, lanes()>(T{-1})};
        lane.put(extremum + i, output + i, code ? code + c * s.c + i : nullptr, negated);
      };
      for_channels<T>(pixels, put);
    }
  } else {
    for (int64_t p = 0; p < pixels; ++p, extremum += s.w, output += s.w) {
      for_channels<T>(channels, [&](auto lanes, int64_t c) {
        typedef LaneVector<T, lanes()> V;
        NormLanes<T, lanes()> lane = {
            load_values<lanes()>(mean + c), load_values<lanes()>(rest + c),
            load_values<lanes()>(scale + c), load_values<lanes()>(shift + c), V{}};
        if (kept && args.negated) {
          for (int l = 0; l < lanes(); ++l) lane.sign[l] = args.negated[c + l] ? T{-1} : T{1};
        }
        lane.put(extremum + c, output + c, code ? code + p * s.w + c : nullptr,
                 kept && args.negated);
      });
    }
  }
  if (g.h.pool_dilation > 1 || g.w.pool_dilation > 1) put_empty_windows<S>(g, args);
}

void norm_output(const NormShape& shape, const NormOutputArgs& args) {
  for_types(shape, [&]<typename S, typename C>(S, C) { norm_output<S, C>(shape.geometry, args); });
}

// ---- sums ---------------------------------------------------------------------------------------

// Adds up in the values' own precision; sums of as many terms go on in double.
constexpr int64_t kTermsInLane = 64;

// The sums over `count` values, of each lane, where neighbours in a lane lie `stride` apart.
template <int N, typename S, typename C>
FUSEDCNN_INLINE void norm_sums(const S* grad, int64_t grad_stride, const C* code,
                               int64_t code_stride, const S* extremum, int64_t extremum_stride,
                               int64_t count, LaneVector<Accumulator<S>, N> mean, double* grads,
                               double* products) {
  using T = Accumulator<S>;
  typedef LaneVector<T, N> V;
  V sum = {}, product = {};
  for (int64_t i = 0; i < count; ++i) {
    const auto off = load_codes<T, N>(code + i * code_stride) == kOffLane<T, C>;
    const V given = load_values<N>(grad + i * grad_stride);
    const V distance = load_values<N>(extremum + i * extremum_stride) - mean;
    sum += off ? V{} : given;
    product += off ? V{} : given * distance;
  }
  for (int l = 0; l < N; ++l) {
    grads[l] += sum[l];
    products[l] += product[l];
  }
}

template <typename S, typename C>
void norm_sums(const Geometry& g, const NormSumsArgs& args) {
  using T = Accumulator<S>;
  const T* mean = static_cast<const T*>(args.mean);
  const int64_t channels = g.out_channels;
  const auto planes = [&](const Strides& s) { return s.w == 1 && s.h == g.w.out; };
  if (planes(args.grad_output_strides) && planes(args.code_strides) &&
      planes(args.extremum_strides)) {
    constexpr int kN = kLanes<T>;
    const int64_t pixels = (args.out_end - args.out_begin) * g.w.out;
    const int64_t offset = args.out_begin * g.w.out;
    for (int64_t c = 0; c < channels; ++c) {
      const S* grad =
          static_cast<const S*>(args.grad_output) + c * args.grad_output_strides.c + offset;
      const C* code = static_cast<const C*>(args.code) + c * args.code_strides.c + offset;
      const S* extremum =
          static_cast<const S*>(args.extremum) + c * args.extremum_strides.c + offset;
      double grads[kN] = {}, products[kN] = {};
      int64_t i = 0;
      for (; i + kN <= pixels;) {
        const int64_t count = smaller((pixels - i) / kN, kTermsInLane);
        norm_sums<kN>(grad + i, kN, code + i, kN, extremum + i, kN, count, splat<T, kN>(mean[c]),
                      grads, products);
        i += count * kN;
      }
      norm_sums<1>(grad + i, 1, code + i, 1, extremum + i, 1, pixels - i, splat<T, 1>(mean[c]),
                   grads, products);
      for (int l = 0; l < kN; ++l) {
        args.grads[c] += grads[l];
        args.products[c] += products[l];
      }
    }
    return;
  }
  const int64_t band = rows_at_a_time(g, 2 * sizeof(S) + sizeof(C));
  const int64_t most = round_up(band * g.w.out * channels, 4);
  S* values = static_cast<S*>(scratch(Slot::kConv, most * int64_t{2 * sizeof(S) + sizeof(C)}));
  for (int64_t first = args.out_begin; first < args.out_end; first += band) {
    const int64_t last = smaller(first + band, args.out_end), pixels = (last - first) * g.w.out;
    const auto grad = pixels_of(g, args.grad_output, args.grad_output_strides, first, last, values);
    const auto extremum =
        pixels_of(g, args.extremum, args.extremum_strides, first, last, values + most);
    const auto code = pixels_of(g, args.code, args.code_strides, first, last,
                                reinterpret_cast<C*>(values + 2 * most));
    for_channels<T>(channels, [&](auto lanes, int64_t c) {
      for (int64_t i = 0; i < pixels; i += kTermsInLane) {
        norm_sums<lanes()>(grad.data + i * grad.stride + c, grad.stride,
                           code.data + i * code.stride + c, code.stride,
                           extremum.data + i * extremum.stride + c, extremum.stride,
                           smaller(kTermsInLane, pixels - i), load_values<lanes()>(mean + c),
                           args.grads + c, args.products + c);
      }
    });
  }
}

void norm_sums(const NormShape& shape, const NormSumsArgs& args) {
  for_types(shape, [&]<typename S, typename C>(S, C) { norm_sums<S, C>(shape.geometry, args); });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
