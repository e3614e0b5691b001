// The direct forward's convolution: rows of convolution outputs, a lane for an output channel.
//   X  [rows][cols][C]                  a part of the padded input
//   U  [blocks][taps][C][Z * lanes]     weights of Z vectors of output channels
//   V  [conv rows][conv cols][Z]        vectors: convolution outputs of one block, bias included
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/ahead.h"
#include "cpu/kernels/conv_tiles.h"
#include "cpu/kernels/output_lanes.h"
#include "cpu/kernels/patches.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Register tile: up to kDirectPixels convolution outputs of a row x Z vectors; an input channel of
// a tap costs P broadcasts and Z loads for P Z FMAs. 32 registers: 12 x 2, 14 loads for 24 FMAs.
// 16 registers: 6 x 2, 8 loads for 12.
constexpr int kDirectPixels = kRegisters >= 32 ? 12 : 6;
constexpr int kDirectWide = 2;
// Bytes of X and V of a band: about half of a small L2, beside the weights that stream through it.
constexpr int64_t kDirectBandBytes = int64_t{384} << 10;

// A convolution output sums over `segments` runs of `length` elements of X: without dilation along
// w all channels of a row of taps are one run.
//
// One call owns P convolution outputs of a row x Z vectors of output channels, over `segments` runs
// of `length` elements (together one chain of additions, kChain):
//   out[p][z] = sum over s, i of x[offset[s] + p * pixel + i] * u[s][i][z]
// plus what out holds, where `add`, plus the bias, where it is not null. x: at the first output's
// first element; u: runs `u_stride` apart; bias: [Z] vectors; out: [P] of [Z] vectors, `out_pixel`
// elements apart.
template <typename T, int P, int Z>
FUSEDCNN_NOINLINE void direct_tile(const T* x, int64_t pixel, const int64_t* offset,
                                   int64_t segments, int64_t length, const T* u, int64_t u_stride,
                                   const T* bias, bool add, T* out, int64_t out_pixel) {
  constexpr int kN = kLanes<T>;
  Vector<T> sum[P][Z];
  FUSEDCNN_UNROLL
  for (int i = 0; i < P * Z; ++i) sum[i / Z][i % Z] = Vector<T>{};
  for (int64_t s = 0; s < segments; ++s, u += u_stride) {
    const T* from = x + offset[s];
    const T* weights = u;
    for (int64_t k = 0; k < length; ++k, ++from, weights += Z * kN) {
      Vector<T> weight[Z];
      FUSEDCNN_UNROLL
      for (int z = 0; z < Z; ++z) keep(weight[z] = load(weights + z * kN));
      FUSEDCNN_UNROLL
      for (int p = 0; p < P; ++p) {
        const Vector<T> value = broadcast(from[p * pixel]);
        FUSEDCNN_UNROLL
        for (int z = 0; z < Z; ++z) sum[p][z] += value * weight[z];
      }
    }
  }
  FUSEDCNN_UNROLL
  for (int i = 0; i < P * Z; ++i) {
    T* to = out + i / Z * out_pixel + i % Z * kN;
    Vector<T> total = add ? load(to) + sum[i / Z][i % Z] : sum[i / Z][i % Z];
    if (bias) total += load(bias + i % Z * kN);
    store(to, total);
  }
}

template <typename T>
using DirectTile = void (*)(const T*, int64_t, const int64_t*, int64_t, int64_t, const T*, int64_t,
                            const T*, bool, T*, int64_t);

template <typename T, int Z>
DirectTile<T> direct_tile_for(int64_t pixels) {
  static constexpr DirectTile<T> tiles[] = {
      direct_tile<T, 1, Z>,  direct_tile<T, 2, Z>,  direct_tile<T, 3, Z>,
      direct_tile<T, 4, Z>,  direct_tile<T, 5, Z>,  direct_tile<T, 6, Z>,
#if defined(__AVX512F__) || defined(__aarch64__)
      direct_tile<T, 7, Z>,  direct_tile<T, 8, Z>,  direct_tile<T, 9, Z>,
      direct_tile<T, 10, Z>, direct_tile<T, 11, Z>, direct_tile<T, 12, Z>,
#endif
  };
  static_assert(sizeof tiles / sizeof *tiles == kDirectPixels);
  return tiles[pixels - 1];
}

// Everything that one call shares between its tasks.
template <typename T>
struct DirectShared {
  const T* weights;  // U
  const T* bias;     // [padded]
  int64_t padded;    // output channels, whole vectors
  int64_t segments, length;
  const int64_t* offset;  // [segments] of a run in X
  int64_t cols;           // of X
};

// Columns of X.
inline int64_t direct_cols(const Geometry& g) {
  return (g.w.conv - 1) * g.w.stride + (g.w.kernel - 1) * g.w.dilation + 1;
}

// One row of convolution outputs of one block. x: the row's first pixel in X; u: the block's
// weights; out: [conv cols] of [Z] vectors, `out_pixel` elements apart.
template <typename T, int Z>
FUSEDCNN_NOINLINE void direct_row(const Geometry& g, const DirectShared<T>& shared, const T* x,
                                  const T* u, const T* bias, T* out, int64_t out_pixel) {
  constexpr int64_t kWidth = Z * kLanes<T>;
  const int64_t length = shared.length, pixel = g.w.stride * g.in_channels;
  // A chain takes several segments, or a part of one.
  const int64_t parts = (length + kChain - 1) / kChain, part = (length + parts - 1) / parts;
  const int64_t several = larger<int64_t>(1, (kChain + length / 2) / length);
  const int64_t tiles = (g.w.conv + kDirectPixels - 1) / kDirectPixels;
  for (int64_t i = 0, col = 0; i < tiles; ++i) {
    // Tiles of about equal width, rather than a narrow last one.
    const int64_t width = (g.w.conv - col + tiles - i - 1) / (tiles - i);
    const auto tile = direct_tile_for<T, Z>(width);
    for (int64_t r = 0; r < shared.segments; r += several) {
      for (int64_t k = 0; k < length; k += part) {
        const bool last = r + several >= shared.segments && k + part >= length;
        tile(x + col * pixel + k, pixel, shared.offset + r, smaller(several, shared.segments - r),
             smaller(part, length - k), u + (r * length + k) * kWidth, length * kWidth,
             last ? bias : nullptr, r + k > 0, out + col * out_pixel, out_pixel);
      }
    }
    col += width;
  }
}

// Calls block.template operator()<Z>(first output channel) for every block.
template <typename T, typename Body>
FUSEDCNN_INLINE void for_direct_blocks(const DirectShared<T>& shared, const Body& block) {
  constexpr int kN = kLanes<T>;
  int64_t oc = 0;
  for (; oc + kDirectWide * kN <= shared.padded; oc += kDirectWide * kN) {
    block.template operator()<kDirectWide>(oc);
  }
  if (oc < shared.padded) block.template operator()<1>(oc);
}

// Elements of X for `rows` convolution rows.
template <typename T>
int64_t direct_input_size(const Geometry& g, const DirectShared<T>& shared, int64_t rows) {
  const int64_t x_rows = (rows - 1) * g.h.stride + (g.h.kernel - 1) * g.h.dilation + 1;
  return x_rows * shared.cols * g.in_channels;
}

// X for the convolution rows [begin, end) of image n.
template <typename S, typename T>
FUSEDCNN_NOINLINE void direct_input(const ForwardArgs& args, const DirectShared<T>& shared,
                                    int64_t n, int64_t begin, int64_t end, T* x) {
  const Geometry& g = args.geometry;
  const int64_t channels = g.in_channels, row_size = shared.cols * channels;
  const int64_t x_rows = direct_input_size(g, shared, end - begin) / row_size;
  const S* image = static_cast<const S*>(args.input) + n * args.input_strides.n;
  const int64_t left = smaller(g.w.padding, shared.cols);
  const int64_t width = larger<int64_t>(0, smaller(g.w.in, shared.cols - left));
  for (int64_t r = 0; r < x_rows; ++r) {
    T* to = x + r * row_size;
    const int64_t h = begin * g.h.stride - g.h.padding + r;
    if (h < 0 || h >= g.h.in) {
      memset(to, 0, row_size * sizeof(T));
      continue;
    }
    memset(to, 0, left * channels * sizeof(T));
    read_pixels(image + h * args.input_strides.h, args.input_strides, to + left * channels,
                channels, width, channels);
    memset(to + (left + width) * channels, 0, (shared.cols - left - width) * channels * sizeof(T));
  }
}

// V of one block, for as many convolution rows as X is for; or the same in a tensor, whose pixels
// are `out_pixel` and whose rows `out_row` elements apart.
template <int Z, typename T>
void direct_block(const Geometry& g, const DirectShared<T>& shared, const T* x, int64_t rows,
                  int64_t oc, T* out, int64_t out_pixel, int64_t out_row, Ahead& ahead) {
  for (int64_t y = 0; y < rows; ++y, out += out_row) {
    ahead.step();
    direct_row<T, Z>(g, shared, x + y * g.h.stride * shared.cols * g.in_channels,
                     shared.weights + oc * g.in_channels * g.taps(), shared.bias + oc, out,
                     out_pixel);
  }
}

template <int Z, typename T>
void direct_block(const Geometry& g, const DirectShared<T>& shared, const T* x, int64_t rows,
                  int64_t oc, T* conv, Ahead& ahead) {
  constexpr int64_t kWidth = Z * kLanes<T>;
  direct_block<Z>(g, shared, x, rows, oc, conv, kWidth, g.w.conv * kWidth, ahead);
}

// U from the weights.
template <typename S, typename T>
void direct_weights(const ForwardArgs& args, const ThreadPool& pool, const S* weight, T* to) {
  constexpr int kN = kLanes<T>;
  const Geometry& g = args.geometry;
  const int64_t vectors = (g.out_channels + kN - 1) / kN, size = g.taps() * g.in_channels;
  parallel_tasks(pool, vectors, [&](int64_t v) {
    T* taps = static_cast<T*>(scratch(Slot::kPlanes, size * kN * int64_t{sizeof(T)}));
    weights_by_tap(args, weight, v * kN, taps);
    const int64_t first = v / kDirectWide * kDirectWide;
    const int64_t wide = smaller<int64_t>(kDirectWide, vectors - first);
    T* block = to + first * kN * size + (v - first) * kN;
    for (int64_t c = 0; c < g.in_channels; ++c) {
      for (int64_t t = 0; t < g.taps(); ++t, taps += kN) {
        store(block + (t * g.in_channels + c) * wide * kN, load(taps));
      }
    }
  });
}

// Calls body(shared), weights and all laid out.
template <typename S, typename Body>
void with_direct_shared(const ForwardArgs& args, const ThreadPool& pool, const Body& body) {
  using T = Accumulator<S>;
  const Geometry& g = args.geometry;
  const int64_t padded = round_up(g.out_channels, kLanes<T>);
  int64_t bytes;
  const DerivedKey key =
      derived_key(args, reinterpret_cast<const void*>(&direct_weights<S, T>), bytes);
  DerivedWeights derived(key, bytes,
                         padded * g.in_channels * g.taps() * int64_t{sizeof(T) / sizeof(float)});
  T* weights = reinterpret_cast<T*>(derived.data());
  if (!derived.filled()) {
    direct_weights(args, pool, static_cast<const S*>(derived.source()), weights);
    derived.keep(true);
  }

  DirectShared<T> shared{};
  shared.weights = weights;
  shared.padded = padded;
  shared.cols = direct_cols(g);
  T* bias = static_cast<T*>(
      scratch(Slot::kWeights, padded * sizeof(T) + g.taps() * int64_t{sizeof(int64_t)}));
  int64_t* offset = reinterpret_cast<int64_t*>(bias + padded);
  for (int64_t oc = 0; oc < padded; ++oc) {
    const bool real = args.bias && oc < g.out_channels;
    bias[oc] = real ? widen(static_cast<const S*>(args.bias)[oc * args.bias_stride]) : T(0);
  }
  const bool tap_rows = g.w.dilation == 1;
  shared.segments = tap_rows ? g.h.kernel : g.taps();
  shared.length = tap_rows ? g.w.kernel * g.in_channels : g.in_channels;
  for (int64_t t = 0; t < g.taps(); t += g.taps() / shared.segments) {
    const int64_t pixel =
        t / g.w.kernel * g.h.dilation * shared.cols + t % g.w.kernel * g.w.dilation;
    *offset++ = pixel * g.in_channels;
  }
  shared.offset = offset - shared.segments;
  shared.bias = bias;
  body(shared);
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
