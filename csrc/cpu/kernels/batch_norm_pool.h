// From convolution outputs to their moments, and to each window's largest value and its code.
//
// Squares are taken of the distance from a shift near the mean, so that an offset that all outputs
// share costs no accuracy: sums of them run over a few dozen pixels in the outputs' own precision,
// then on in double. Any shift gives the moments; the mean of some outputs gives exact ones.
#pragma once

#include "cpu/kernels/batch_norm_rows.h"
#include "cpu/kernels/window_range.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// The moments of a run of pixels, [count][OC], added up piece by piece.
template <typename S>
class RunMoments {
  using T = Accumulator<S>;
  static constexpr int64_t kRun = 64;  // pixels that one sum in T runs over
  static constexpr int64_t kSample = 16;

 public:
  RunMoments(const S* pixels, int64_t count, int64_t channels)
      : next_(pixels), count_(count), left_(count), channels_(channels) {
    const int64_t padded = round_up(channels, 8);
    sums_ = static_cast<double*>(scratch(Slot::kLists, padded * int64_t{2 * 8 + sizeof(T)}));
    squares_ = sums_ + padded;
    shift_ = reinterpret_cast<T*>(squares_ + padded);
    memset(sums_, 0, padded * 16);
    const int64_t sample = smaller(count, kSample);
    for_channels<T>(channels, [&](auto lanes, int64_t c) {
      LaneVector<T, lanes()> sum = {};
      for (int64_t i = 0; i < sample; ++i) {
        sum += load_values<lanes()>(pixels + i * count / sample * channels + c);
      }
      sum = sum * (T{1} / static_cast<T>(larger<int64_t>(sample, 1)));
      // Nothing is near a shift that is not finite.
      const LaneVector<T, lanes()> zero = {};
      store_values<lanes()>(shift_ + c, sum - sum == zero ? sum : zero);
    });
  }

  // Takes in whole pieces until no pixel before `end` is left out.
  void up_to(const S* end) {
    while (next_ < end && left_ > 0) {
      const int64_t pixels = smaller(left_, kRun);
      add(pixels);
      next_ += pixels * channels_;
      left_ -= pixels;
    }
  }

  // Adds the moments of all pixels to those of others.
  void finish(Moments* to) {
    up_to(next_ + left_ * channels_);
    const auto count = static_cast<double>(count_);
    for (int64_t c = 0; c < channels_; ++c) {
      const double mean = shift_[c] + sums_[c] / count;
      const double squares = squares_[c] - sums_[c] * (sums_[c] / count);
      const Moments run = {count, mean, squares < 0 ? 0 : squares};
      if (to[c].count == 0) {
        to[c] = run;
        continue;
      }
      const double all = to[c].count + count, distance = mean - to[c].mean;
      to[c].squares += run.squares + distance * distance * (to[c].count * count / all);
      // Not the mean plus a part of the distance: between infinities of one sign that is NaN.
      to[c].mean = (to[c].count * to[c].mean + count * mean) / all;
      to[c].count = all;
    }
  }

 private:
  void add(int64_t pixels) {
    for_channels<T>(channels_, [&](auto lanes, int64_t c) {
      constexpr int kN = lanes(), kChains = 4;  // 4 cycles of latency
      typedef LaneVector<T, kN> V;
      const V shift = load_values<kN>(shift_ + c);
      V sums[kChains] = {}, squares[kChains] = {};
      const S* from = next_ + c;
      const auto see = [&](int chain) {
        const V distance = load_values<kN>(from) - shift;
        sums[chain] += distance;
        squares[chain] += distance * distance;
        from += channels_;
      };
      int64_t p = 0;
      for (; p + kChains <= pixels; p += kChains) {
        FUSEDCNN_UNROLL
        for (int i = 0; i < kChains; ++i) see(i);
      }
      for (; p < pixels; ++p) see(0);
      const V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      const V square = (squares[0] + squares[1]) + (squares[2] + squares[3]);
      for (int l = 0; l < kN; ++l) {
        sums_[c + l] += sum[l];
        squares_[c + l] += square[l];
      }
    });
  }

  const S* next_;
  int64_t count_, left_, channels_;
  double *sums_, *squares_;  // of distances from the shift
  T* shift_;
};

// The first maximum of a window wins; NaN beats everything, a later NaN too, as in torch. from: the
// window's first element that exists, which is number `element`.
template <int N, typename S, typename C>
FUSEDCNN_INLINE void largest_of_window(const S* from, int64_t row, int64_t pixel, int64_t rows,
                                       int64_t cols, int64_t element, int64_t element_row, S* value,
                                       C* code) {
  using T = Accumulator<S>;
  typedef LaneVector<T, N> V;
  typedef LaneVector<Int<T>, N> Ints;
  V best = load_values<N>(from);
  Ints winner = splat<Int<T>, N>(static_cast<Int<T>>(element));
  for (int64_t h = 0; h < rows; ++h, from += row, element += element_row) {
    Ints number = splat<Int<T>, N>(static_cast<Int<T>>(element));
    const S* at = from;
    for (int64_t w = 0; w < cols; ++w, at += pixel, number += 1) {
      const V seen = load_values<N>(at);
      const auto wins = (seen > best) | (seen != seen);
      best = wins ? seen : best;
      winner = wins ? number : winner;
    }
  }
  store_values<N>(value, best);
  if (code) store_codes<T, N>(code, winner);
}

// One pooled row. plane: as in NormPoolArgs; values, codes (or null): [OW][OC].
template <typename S, typename C>
FUSEDCNN_NOINLINE void largest_of_row(const Geometry& g, const NormPoolArgs& args, int64_t oh,
                                      S* values, C* codes) {
  using T = Accumulator<S>;
  const int64_t channels = g.out_channels;
  int64_t top, bottom, left, right;
  window_range(g.h, oh, 0, g.h.conv, top, bottom);
  const int64_t y = oh * g.h.pool_stride - g.h.pool_padding + top * g.h.pool_dilation;
  const int64_t pixel = g.w.pool_dilation * channels;
  const int64_t row = g.h.pool_dilation * g.w.conv * channels;
  const S* line = static_cast<const S*>(args.plane) + (y - args.plane_begin) * g.w.conv * channels;
  for (int64_t ow = 0; ow < g.w.out; ++ow, values += channels) {
    window_range(g.w, ow, 0, g.w.conv, left, right);
    if (top >= bottom || left >= right) {
      for (int64_t c = 0; c < channels; ++c) {
        values[c] = narrow<S>(T{0});
        if (codes) codes[c] = kOff<C>;
      }
    } else {
      const int64_t x = ow * g.w.pool_stride - g.w.pool_padding + left * g.w.pool_dilation;
      const int64_t element = top * g.w.pool_kernel + left;
      const S* from = line + x * channels;
      for_channels<T>(channels, [&](auto lanes, int64_t c) {
        largest_of_window<lanes()>(from + c, row, pixel, bottom - top, right - left, element,
                                   g.w.pool_kernel, values + c, codes ? codes + c : nullptr);
      });
      for (int64_t c = 0; args.ties && c < channels; ++c) {
        if (!args.ties[c]) continue;
        values[c] = from[c];
        if (codes) codes[c] = static_cast<C>(element);
      }
    }
    if (codes) codes += channels;
  }
}

template <typename S, typename C>
void norm_pool(const Geometry& g, const NormPoolArgs& args) {
  const Strides& s = args.strides;
  const int64_t line = g.w.conv * g.out_channels, row = g.w.out * g.out_channels;
  const S* plane = static_cast<const S*>(args.plane);
  RunMoments<S> moments(plane + (args.conv_begin - args.plane_begin) * line,
                        (args.conv_end - args.conv_begin) * g.w.conv, g.out_channels);
  const int64_t band = rows_at_a_time(g, sizeof(S) + sizeof(C));
  const bool in_place = s.c == 1 && s.h == g.w.out * s.w && s.w == g.out_channels;
  S* values = nullptr;
  C* codes = nullptr;
  for (int64_t first = args.out_begin; first < args.out_end; first += band) {
    const int64_t rows = smaller(band, args.out_end - first);
    S* output = static_cast<S*>(args.extremum) + first * s.h;
    C* code = args.code ? static_cast<C*>(args.code) + first * s.h : nullptr;
    if (in_place) {
      values = output, codes = code;
    } else {
      values = static_cast<S*>(
          scratch(Slot::kConv, round_up(band * row, 4) * int64_t{sizeof(S) + sizeof(C)}));
      codes = code ? reinterpret_cast<C*>(values + round_up(band * row, 4)) : nullptr;
    }
    for (int64_t r = 0; r < rows; ++r) {
      // Read from here just before the windows are, both from the caches that are near.
      const int64_t last = (first + r) * g.h.pool_stride - g.h.pool_padding + g.h.window();
      moments.up_to(plane +
                    smaller(last - args.plane_begin, args.conv_end - args.plane_begin) * line);
      largest_of_row<S, C>(g, args, first + r, values + r * row, codes ? codes + r * row : nullptr);
    }
    if (in_place) continue;
    using M = Moved<S>;
    transpose_matrix(reinterpret_cast<const M*>(values), g.out_channels,
                     reinterpret_cast<M*>(output), s.c, rows * g.w.out, g.out_channels);
    if (code) transpose_matrix(codes, g.out_channels, code, s.c, rows * g.w.out, g.out_channels);
  }
  moments.finish(args.moments);
}

void norm_pool(const NormShape& shape, const NormPoolArgs& args) {
  for_types(shape, [&]<typename S, typename C>(S, C) { norm_pool<S, C>(shape.geometry, args); });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
