// The convolution's gradient as the codes imply it: each winner's, and zeros elsewhere. It is
// written output by output, so windows may overlap.
#pragma once

#include "core/geometry.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/storage_lanes.h"
#include "cpu/kernels/window_range.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// The pooled outputs whose windows hold convolution output `at` are among [first, last).
struct Holders {
  int64_t first, last;

  Holders(const Axis& axis, int64_t at) { pooled_range(axis, at, at + 1, first, last); }

  // Which element of pooled output o's window it is; -1: none.
  static int64_t element(const Axis& axis, int64_t at, int64_t o) {
    const int64_t distance = at + axis.pool_padding - o * axis.pool_stride;
    if (axis.pool_dilation == 1) return distance;
    return distance % axis.pool_dilation ? -1 : distance / axis.pool_dilation;
  }
};

template <typename S, int N>
FUSEDCNN_INLINE void winner_pixel(int64_t channels, const Bits<S>* grads, const uint8_t* codes,
                                  int64_t element, Bits<S>* to) {
  typedef typename Lanes<Bits<S>, N>::Type V;
  typedef typename Lanes<Bits<S>, N>::Unaligned Unaligned;
  typename Lanes<uint8_t, N>::Type bytes;
  for_blocks<N>(channels, [&](int64_t c) {
    memcpy(&bytes, codes + c, N);
    const V number = __builtin_convertvector(bytes, V);
    const V grad = *reinterpret_cast<const Unaligned*>(grads + c);
    *reinterpret_cast<Unaligned*>(to + c) = grad & (number == static_cast<Bits<S>>(element));
  });
}

// Overlapping windows: the sum, in float and in the windows' order.
template <typename S>
FUSEDCNN_INLINE void winners_pixel(const Geometry& g, int64_t channels, const S* grads,
                                   int64_t grad_stride, const uint8_t* codes, int64_t code_stride,
                                   int64_t first_row, int64_t y, int64_t x, const Holders& rows,
                                   const Holders& cols, S* to) {
  constexpr int kN = kLanes<float>;
  const auto sum = [&](int64_t c, auto add) {
    for (int64_t oh = rows.first; oh < rows.last; ++oh) {
      const int64_t ph = Holders::element(g.h, y, oh);
      if (ph < 0) continue;
      for (int64_t ow = cols.first; ow < cols.last; ++ow) {
        const int64_t pw = Holders::element(g.w, x, ow);
        if (pw < 0) continue;
        const int64_t q = (oh - first_row) * g.w.out + ow;
        add(grads + q * grad_stride + c, codes + q * code_stride + c, ph * g.w.pool_kernel + pw);
      }
    }
  };
  if (channels < kN) {
    for (int64_t c = 0; c < channels; ++c) {
      float total = 0;
      sum(c, [&](const S* grad, const uint8_t* code, int64_t element) {
        if (*code == element) total += widen(*grad);
      });
      to[c] = narrow<S>(total);
    }
    return;
  }
  for_blocks<kN>(channels, [&](int64_t c) {
    Vector<float> total = {};
    sum(c, [&](const S* grad, const uint8_t* code, int64_t element) {
      typename Lanes<uint8_t, kN>::Type bytes;
      memcpy(&bytes, code, kN);
      const auto number = __builtin_convertvector(bytes, Vector<int32_t>);
      total += number == static_cast<int32_t>(element) ? widen_vector(grad) : Vector<float>{};
    });
    narrow_vector(total, to + c);
  });
}

// What is read: pooled gradients and codes from pooled row `first_row` on, a pixel's channels side
// by side, of `channels` channels.
template <typename S>
struct PooledGradient {
  const Bits<S>* grads;
  int64_t grad_stride;
  const uint8_t* codes;
  int64_t code_stride;
  int64_t first_row;
  int64_t channels;
};

// Writes the convolution's gradient at rows [y_begin, y_end) and columns [x_begin, x_end): `to` is
// the first of them, columns lie `pixel` elements apart and rows `row`.
template <typename S>
void winners_gradient(const Geometry& g, const PooledGradient<S>& from, int64_t y_begin,
                      int64_t y_end, int64_t x_begin, int64_t x_end, Bits<S>* to, int64_t pixel,
                      int64_t row) {
  with_lanes<Bits<S>>(from.channels, [&](auto lanes) {
    for (int64_t y = y_begin; y < y_end; ++y, to += row) {
      const Holders in_rows(g.h, y);
      Bits<S>* at = to;
      for (int64_t x = x_begin; x < x_end; ++x, at += pixel) {
        const Holders in_cols(g.w, x);
        const int64_t held = larger<int64_t>(0, in_rows.last - in_rows.first) *
                             larger<int64_t>(0, in_cols.last - in_cols.first);
        if (held > 1) {
          winners_pixel(g, from.channels, reinterpret_cast<const S*>(from.grads), from.grad_stride,
                        from.codes, from.code_stride, from.first_row, y, x, in_rows, in_cols,
                        reinterpret_cast<S*>(at));
          continue;
        }
        const int64_t ph = held ? Holders::element(g.h, y, in_rows.first) : -1;
        const int64_t pw = held ? Holders::element(g.w, x, in_cols.first) : -1;
        if (ph < 0 || pw < 0) {
          memset(at, 0, from.channels * sizeof(Bits<S>));
          continue;
        }
        const int64_t q = (in_rows.first - from.first_row) * g.w.out + in_cols.first;
        winner_pixel<S, lanes()>(from.channels, from.grads + q * from.grad_stride,
                                 from.codes + q * from.code_stride, ph * g.w.pool_kernel + pw, at);
      }
    }
  });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
