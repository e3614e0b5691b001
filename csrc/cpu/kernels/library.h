// What surrounds the stock convolution where selection takes it: a pass over its output, a plane
// [N, conv h, conv w, OC] with the bias in it, that applies ReLU, pools and writes codes. The
// caller runs the convolution. Gradients have no such kernel here: the stock ones depend on the
// number of threads (grad_weight) and on the batch (grad_input), and in bfloat16 they spread NaN.
//
// The pass only compares and moves values, so they stay the bits that are stored: of two numbers
// above zero, the larger has the larger bits. Numbers below zero need no order, since ReLU turns
// them off.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/storage_lanes.h"
#include "cpu/kernels/transpose.h"
#include "cpu/kernels/window_range.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

template <typename S>
constexpr Bits<S> kInfinity = 0x7c00;
template <>
constexpr Bits<float> kInfinity<float> = 0x7f800000;

// The bit of the sign alone, which is also the smallest integer.
template <typename S>
constexpr Bits<S> kSign = static_cast<Bits<S>>(uint32_t{1} << (8 * sizeof(S) - 1));

const char* why_not_library(const Problem& problem) {
  const Axis &h = problem.geometry.h, &w = problem.geometry.w;
  if (problem.type == DataType::kFloat64) return "float64";
  if (problem.type == DataType::kBFloat16) {
    return "bfloat16, where torch's convolution spreads NaN to outputs that do not see it";
  }
  if (problem.wide_code) return "int32 codes";
  if (h.padding != h.padding_after || w.padding != w.padding_after) {
    return "padding differs between two sides";
  }
  // A fault of torch 2.13: tests/test_stock_faults.py.
  const bool pointwise = h.kernel == 1 && w.kernel == 1 && (h.padding > 0 || w.padding > 0);
  if (problem.type == DataType::kFloat16 && pointwise) {
    return "a padded 1x1 convolution, where torch's can crash";
  }
  return nullptr;
}

// Measured on a Xeon with AVX-512.
const char* library_is_slower(const Problem& problem) {
  const Geometry& g = problem.geometry;
  const double products = double(g.in_channels_per_group()) * g.taps();  // to a convolution output
  const double all = products * g.batch * g.out_channels * g.h.conv * g.w.conv;
  if (kVectorBytes < 32) return "not measured for vectors of 16 bytes";
  if (problem.type == DataType::kFloat16) return "torch computes float16 no faster than float32";
  if (products < 1500) return "fewer than 1,500 products to a convolution output";
  return all < 1e8 ? "fewer than 1e8 products in all" : nullptr;
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

void forward_library(const ForwardArgs& args, const ThreadPool& pool) {
  if (args.type == DataType::kFloat32) return forward_library<float>(args, pool);
  forward_library<Float16>(args, pool);
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
