// What surrounds the stock convolution where selection takes it: a pass over its output that
// applies ReLU, pools and writes codes, and a pass that writes the winners' gradients, from which
// the stock convolution's backward goes on. Both read and write a plane [N, conv h, conv w, OC];
// the caller runs the convolutions, with the bias in them.
//
// The forward only compares and moves values, so they stay the bits that are stored: of two numbers
// above zero, the larger has the larger bits. Numbers below zero need no order, since ReLU turns
// them off.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/channels_together.h"
#include "cpu/kernels/large_windows.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/transpose.h"
#include "cpu/kernels/window_range.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

template <typename S>
struct BitsOf {
  using Type = int16_t;
};
template <>
struct BitsOf<float> {
  using Type = int32_t;
};
template <typename S>
using Bits = typename BitsOf<S>::Type;

template <typename S>
constexpr Bits<S> kInfinity = 0x7f80;
template <>
constexpr Bits<Float16> kInfinity<Float16> = 0x7c00;
template <>
constexpr Bits<float> kInfinity<float> = 0x7f800000;

// The bit of the sign alone, which is also the smallest integer.
template <typename S>
constexpr Bits<S> kSign = static_cast<Bits<S>>(uint32_t{1} << (8 * sizeof(S) - 1));

// The faults of stock convolutions are torch 2.13's: tests/test_stock_faults.py.
const char* why_not_library(const Problem& problem) {
  const Axis &h = problem.geometry.h, &w = problem.geometry.w;
  if (problem.type == DataType::kFloat64) return "float64";
  if (problem.wide_code) return "int32 codes";
  if (h.padding != h.padding_after || w.padding != w.padding_after) {
    return "padding differs between two sides";
  }
  if (problem.type == DataType::kFloat32) return nullptr;
  if (w.conv == 1) return "one column of outputs, where the stock convolution can be wrong";
  if (h.kernel == 1 && w.kernel == 1 && (h.padding > 0 || w.padding > 0)) {
    return "a padded 1x1 convolution, where the stock one can crash";
  }
  return nullptr;
}

const char* why_not_grad_input_library(const Problem& problem) {
  // Its sums are taken in an order that depends on the batch.
  if (problem.type == DataType::kFloat32)
    return "float32, where the stock gradient is another in another batch";
  return why_not_library(problem);
}

const char* library_is_slower(const Problem&) { return "not measured"; }

template <typename E, int N>
struct Lanes {
  typedef E Type __attribute__((vector_size(N * sizeof(E))));
  typedef E Unaligned __attribute__((vector_size(N * sizeof(E)), aligned(alignof(E)), may_alias));
};

// body(first channel) for blocks of N channels; the last one begins where it ends with them, so
// that some are done twice.
template <int N, typename Body>
FUSEDCNN_INLINE void for_blocks(int64_t channels, const Body& body) {
  for (int64_t c = 0; c < channels; c += N) body(smaller<int64_t>(c, channels - N));
}

// The first maximum of a window wins; NaN beats everything, a later NaN too, as in torch. NaN has
// larger bits than infinity once its sign is away.
template <typename S, int N>
FUSEDCNN_INLINE void pool_window(const Bits<S>* from, int64_t row, int64_t pixel, int64_t rows,
                                 int64_t cols, int64_t element, int64_t element_row, Bits<S>* value,
                                 uint8_t* code) {
  using B = Bits<S>;
  typedef typename Lanes<B, N>::Type V;
  typedef typename Lanes<B, N>::Unaligned Unaligned;
  typedef typename Lanes<uint8_t, N>::Type Bytes;
  constexpr B kMagnitude = static_cast<B>(~kSign<S>);
  V best = V{} + kSign<S>, winner = {};
  for (int64_t h = 0; h < rows; ++h, from += row, element += element_row) {
    V number = V{} + static_cast<B>(element);
    const B* at = from;
    for (int64_t w = 0; w < cols; ++w, at += pixel, number += 1) {
      const V bits = *reinterpret_cast<const Unaligned*>(at), magnitude = bits & kMagnitude;
      const V nan = magnitude > kInfinity<S>;
      const V wins = (bits > best) | nan;
      best = wins ? (nan ? magnitude : bits) : best;
      winner = wins ? number : winner;
    }
  }
  const V on = best > V{};
  *reinterpret_cast<Unaligned*>(value) = best & on;
  if (code) {
    const Bytes bytes = __builtin_convertvector(winner | ~on, Bytes);  // kOff: all ones
    memcpy(code, &bytes, N);
  }
}

// One pooled row. plane: of the image; values, codes (or null): [OW][OC].
template <typename S, int N>
FUSEDCNN_NOINLINE void pool_row(const Geometry& g, const Bits<S>* plane, int64_t oh,
                                Bits<S>* values, uint8_t* codes) {
  int64_t top, bottom, left, right;
  window_range(g.h, oh, 0, g.h.conv, top, bottom);
  const int64_t y = oh * g.h.pool_stride - g.h.pool_padding + top * g.h.pool_dilation;
  const int64_t pixel = g.w.pool_dilation * g.out_channels;
  const int64_t row = g.h.pool_dilation * g.w.conv * g.out_channels;
  for (int64_t ow = 0; ow < g.w.out; ++ow, values += g.out_channels) {
    window_range(g.w, ow, 0, g.w.conv, left, right);
    if (top >= bottom || left >= right) {
      for (int64_t c = 0; c < g.out_channels; ++c) {
        values[c] = static_cast<Bits<S>>(kInfinity<S> | kSign<S>);
      }
      if (codes) memset(codes, kOff<uint8_t>, g.out_channels);
    } else {
      const int64_t x = ow * g.w.pool_stride - g.w.pool_padding + left * g.w.pool_dilation;
      const Bits<S>* from = plane + (y * g.w.conv + x) * g.out_channels;
      for_blocks<N>(g.out_channels, [&](int64_t c) {
        pool_window<S, N>(from + c, row, pixel, bottom - top, right - left,
                          top * g.w.pool_kernel + left, g.w.pool_kernel, values + c,
                          codes ? codes + c : nullptr);
      });
    }
    if (codes) codes += g.out_channels;
  }
}

// body(N) with the widest vector that the channels fill.
template <typename E, typename Body>
FUSEDCNN_INLINE void with_lanes(int64_t channels, const Body& body) {
  constexpr int kWide = kVectorBytes / sizeof(E), kLeast = 16 / sizeof(E);
  if (channels >= kWide) {
    body(std::integral_constant<int, kWide>{});
  } else if (channels >= kLeast) {
    body(std::integral_constant<int, kLeast>{});
  } else {
    body(std::integral_constant<int, 1>{});
  }
}

// Rows of `row` bytes that a task takes at a time.
inline int64_t library_rows(int64_t rows, int64_t row) {
  constexpr int64_t kBytes = 32 << 10;
  return larger<int64_t>(1, smaller(rows, kBytes / larger<int64_t>(row, 1)));
}

template <typename S>
void forward_library(const ForwardArgs& args, const ThreadPool& pool) {
  using B = Bits<S>;
  const Geometry& g = args.geometry;
  const Strides& s = args.output_strides;
  const int64_t row = g.w.out * g.out_channels;
  const int64_t rows = library_rows(g.h.out, row * int64_t{sizeof(B) + 1});
  const int64_t bands = (g.h.out + rows - 1) / rows;
  parallel_tasks(pool, g.batch * bands, [&](int64_t task) {
    const int64_t n = task / bands, first = task % bands * rows;
    const int64_t count = smaller(rows, g.h.out - first);
    const B* plane = static_cast<const B*>(args.plane) + n * g.h.conv * g.w.conv * g.out_channels;
    const int64_t offset = n * s.n + first * s.h;
    B* output = static_cast<B*>(args.output) + offset;
    uint8_t* code = args.code ? static_cast<uint8_t*>(args.code) + offset : nullptr;
    B* values = output;
    uint8_t* codes = code;
    const bool in_place = s.c == 1;
    if (!in_place) {
      values = static_cast<B*>(scratch(Slot::kConv, count * row * int64_t{sizeof(B) + 1}));
      if (code) codes = reinterpret_cast<uint8_t*>(values + count * row);
    }
    with_lanes<B>(g.out_channels, [&](auto lanes) {
      for (int64_t r = 0; r < count; ++r) {
        pool_row<S, lanes()>(g, plane, first + r, values + r * row,
                             codes ? codes + r * row : nullptr);
      }
    });
    if (in_place) return;
    transpose_matrix(values, g.out_channels, output, s.c, count * g.w.out, g.out_channels);
    if (code) {
      transpose_matrix(codes, g.out_channels, code, s.c, count * g.w.out, g.out_channels);
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------

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
FUSEDCNN_INLINE void winners_pixel(const Geometry& g, const S* grads, int64_t grad_stride,
                                   const uint8_t* codes, int64_t code_stride, int64_t first_row,
                                   int64_t y, int64_t x, const Holders& rows, const Holders& cols,
                                   S* to) {
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
  if (g.out_channels < kN) {
    for (int64_t c = 0; c < g.out_channels; ++c) {
      float total = 0;
      sum(c, [&](const S* grad, const uint8_t* code, int64_t element) {
        if (*code == element) total += widen(*grad);
      });
      to[c] = narrow<S>(total);
    }
    return;
  }
  for_blocks<kN>(g.out_channels, [&](int64_t c) {
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

template <typename S>
void grad_input_library(const BackwardArgs& args, const ThreadPool& pool) {
  using B = Bits<S>;
  const Geometry& g = args.geometry;
  const int64_t row = g.w.conv * g.out_channels;
  // Whole windows, where they do not overlap: then no band reads another's.
  const int64_t rows = round_up(library_rows(g.h.conv, row * int64_t{sizeof(B)}), g.h.pool_stride);
  const int64_t bands = (g.h.conv + rows - 1) / rows;
  parallel_tasks(pool, g.batch * bands, [&](int64_t task) {
    const int64_t n = task / bands, begin = task % bands * rows;
    const int64_t end = smaller(begin + rows, g.h.conv);
    Geometry part = g;
    int64_t first, last;
    pooled_range(g.h, begin, end, first, last);
    part.h.out = larger<int64_t>(0, last - first);
    const int64_t size = part.outputs() * g.out_channels;
    B* buffer = static_cast<B*>(scratch(Slot::kLists, size * int64_t{sizeof(B) + 1}));
    const Strides& gs = args.grad_output_strides;
    const Strides& cs = args.code_strides;
    int64_t grad_stride, code_stride;
    const B* grads =
        channels_together(part, static_cast<const B*>(args.grad_output) + n * gs.n + first * gs.h,
                          gs, buffer, grad_stride);
    const uint8_t* codes =
        channels_together(part, static_cast<const uint8_t*>(args.code) + n * cs.n + first * cs.h,
                          cs, reinterpret_cast<uint8_t*>(buffer + size), code_stride);
    B* to = static_cast<B*>(args.plane) + (n * g.h.conv + begin) * row;
    with_lanes<B>(g.out_channels, [&](auto lanes) {
      for (int64_t y = begin; y < end; ++y) {
        const Holders in_rows(g.h, y);
        for (int64_t x = 0; x < g.w.conv; ++x, to += g.out_channels) {
          const Holders in_cols(g.w, x);
          const int64_t held = larger<int64_t>(0, in_rows.last - in_rows.first) *
                               larger<int64_t>(0, in_cols.last - in_cols.first);
          if (held > 1) {
            winners_pixel(g, reinterpret_cast<const S*>(grads), grad_stride, codes, code_stride,
                          first, y, x, in_rows, in_cols, reinterpret_cast<S*>(to));
            continue;
          }
          const int64_t ph = held ? Holders::element(g.h, y, in_rows.first) : -1;
          const int64_t pw = held ? Holders::element(g.w, x, in_cols.first) : -1;
          if (ph < 0 || pw < 0) {
            memset(to, 0, g.out_channels * sizeof(B));
            continue;
          }
          const int64_t q = (in_rows.first - first) * g.w.out + in_cols.first;
          winner_pixel<S, lanes()>(g.out_channels, grads + q * grad_stride, codes + q * code_stride,
                                   ph * g.w.pool_kernel + pw, to);
        }
      }
    });
  });
}

void forward_library(const ForwardArgs& args, const ThreadPool& pool) {
  switch (args.type) {
    case DataType::kFloat32: return forward_library<float>(args, pool);
    case DataType::kBFloat16: return forward_library<BFloat16>(args, pool);
    default: return forward_library<Float16>(args, pool);
  }
}

void grad_input_library(const BackwardArgs& args, const ThreadPool& pool) {
  switch (args.type) {
    case DataType::kFloat32: return grad_input_library<float>(args, pool);
    case DataType::kBFloat16: return grad_input_library<BFloat16>(args, pool);
    default: return grad_input_library<Float16>(args, pool);
  }
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
