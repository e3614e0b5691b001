// The forward for enough output channels to fill vectors, for any kernel, stride, dilation and
// pool: a lane is an output channel, so no lane is spent on places between rows, as in the general
// kernel.
//
// A task owns a band of pooled rows of one image. For each block of Z vectors of output channels it
// computes the band's convolution outputs row by row, then pools them:
//   X  [rows][cols][C]                  the band's padded input
//   U  [blocks][taps][C][Z * lanes]     weights
//   V  [conv rows][conv cols][Z]        vectors: convolution outputs of one block, bias included
//   P  [pooled pixels][out channels]    pooled values and codes of the band
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/ahead.h"
#include "cpu/kernels/forward_general.h"
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
// first element; u: runs `u_stride` apart; bias: [Z] vectors; out: [P][Z] vectors.
template <typename T, int P, int Z>
FUSEDCNN_NOINLINE void direct_tile(const T* x, int64_t pixel, const int64_t* offset,
                                   int64_t segments, int64_t length, const T* u, int64_t u_stride,
                                   const T* bias, bool add, T* out) {
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
    Vector<T> total = add ? load(out + i * kN) + sum[i / Z][i % Z] : sum[i / Z][i % Z];
    if (bias) total += load(bias + i % Z * kN);
    store(out + i * kN, total);
  }
}

template <typename T>
using DirectTile = void (*)(const T*, int64_t, const int64_t*, int64_t, int64_t, const T*, int64_t,
                            const T*, bool, T*);

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
  int64_t band, bands;    // pooled rows of a task, tasks of an image
};

// The convolution outputs that pooled outputs [first, first + count) look at: [begin, end).
FUSEDCNN_INLINE void conv_range(const Axis& axis, int64_t first, int64_t count, int64_t& begin,
                                int64_t& end) {
  const int64_t last = (first + count - 1) * axis.pool_stride - axis.pool_padding +
                       (axis.pool_kernel - 1) * axis.pool_dilation;
  begin = larger<int64_t>(0, first * axis.pool_stride - axis.pool_padding);
  end = smaller(axis.conv, last + 1);
}

// One row of convolution outputs of one block. x: the row's first pixel in X; u: the block's
// weights; out: [conv cols][Z] vectors.
template <typename T, int Z>
void direct_row(const Geometry& g, const DirectShared<T>& shared, const T* x, const T* u,
                const T* bias, T* out) {
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
             last ? bias : nullptr, r + k > 0, out + col * kWidth);
      }
    }
    col += width;
  }
}

// Pools one output of one vector of channels: max, ReLU and code. conv: [..][conv cols][stride]
// from convolution row `begin` on; values, codes: [lanes].
template <typename T>
FUSEDCNN_INLINE void pool_pixel(const Geometry& g, const T* conv, int64_t stride, int64_t begin,
                                int64_t oh, int64_t ow, T* values, uint8_t* codes) {
  FirstMaximum<T> pool;
  const int64_t y0 = oh * g.h.pool_stride - g.h.pool_padding;
  const int64_t x0 = ow * g.w.pool_stride - g.w.pool_padding;
  for (int64_t ph = 0; ph < g.h.pool_kernel; ++ph) {
    const int64_t y = y0 + ph * g.h.pool_dilation;
    if (y < 0 || y >= g.h.conv) continue;
    for (int64_t pw = 0; pw < g.w.pool_kernel; ++pw) {
      const int64_t x = x0 + pw * g.w.pool_dilation;
      if (x < 0 || x >= g.w.conv) continue;
      pool.see(load(conv + ((y - begin) * g.w.conv + x) * stride), ph * g.w.pool_kernel + pw);
    }
  }
  pool.finish(values, codes);
}

template <typename S>
void direct_band(const ForwardArgs& args, const DirectShared<Accumulator<S>>& shared,
                 int64_t task) {
  using T = Accumulator<S>;
  constexpr int kN = kLanes<T>;
  const Geometry& g = args.geometry;
  const int64_t n = task / shared.bands, first_out = task % shared.bands * shared.band;
  const int64_t rows = smaller(shared.band, g.h.out - first_out), pixels = rows * g.w.out;
  int64_t begin, end;
  conv_range(g.h, first_out, rows, begin, end);

  const int64_t channels = g.in_channels, row_size = shared.cols * channels;
  const int64_t x_rows = (end - begin - 1) * g.h.stride + (g.h.kernel - 1) * g.h.dilation + 1;
  T* x = static_cast<T*>(scratch(Slot::kPlanes, x_rows * row_size * int64_t{sizeof(T)}));
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

  const int64_t conv_size = (end - begin) * g.w.conv * kDirectWide * kN;
  T* conv = static_cast<T*>(scratch(
      Slot::kConv, conv_size * sizeof(T) + pixels * shared.padded * int64_t{sizeof(T) + 1}));
  T* values = conv + conv_size;
  uint8_t* codes = reinterpret_cast<uint8_t*>(values + pixels * shared.padded);
  Ahead ahead =
      Ahead::of(static_cast<const S*>(args.input), args.input_strides, channels, g.h.in, g.w.in, n,
                g.batch, (shared.padded / kN + 1) / kDirectWide * (end - begin));
  const auto block = [&]<int Z>(int64_t oc) {
    for (int64_t y = begin; y < end; ++y) {
      ahead.step();
      direct_row<T, Z>(g, shared, x + (y - begin) * g.h.stride * row_size,
                       shared.weights + oc * channels * g.taps(), shared.bias + oc,
                       conv + (y - begin) * g.w.conv * Z * kN);
    }
    for (int64_t q = 0; q < pixels; ++q) {
      for (int64_t z = 0; z < Z; ++z) {
        const int64_t at = q * shared.padded + oc + z * kN;
        pool_pixel(g, conv + z * kN, Z * kN, begin, first_out + q / g.w.out, q % g.w.out,
                   values + at, codes + at);
      }
    }
  };
  int64_t oc = 0;
  for (; oc + kDirectWide * kN <= shared.padded; oc += kDirectWide * kN) {
    block.template operator()<kDirectWide>(oc);
  }
  if (oc < shared.padded) block.template operator()<1>(oc);
  const int64_t at = n * args.output_strides.n + first_out * args.output_strides.h;
  write_strip(values, shared.padded, pixels, g.out_channels, static_cast<S*>(args.output) + at,
              args.output_strides);
  if (args.code) {
    write_strip(codes, shared.padded, pixels, g.out_channels, static_cast<uint8_t*>(args.code) + at,
                args.output_strides);
  }
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

template <typename S>
void forward_direct_typed(const ForwardArgs& args, const ThreadPool& pool) {
  using T = Accumulator<S>;
  const Geometry& g = args.geometry;
  const int64_t padded = round_up(g.out_channels, kLanes<T>);
  int64_t bytes;
  const DerivedKey key = derived_key(args, reinterpret_cast<const void*>(&direct_band<S>), bytes);
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
  shared.cols = (g.w.conv - 1) * g.w.stride + (g.w.kernel - 1) * g.w.dilation + 1;
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
  // What one more pooled row adds to X and V. Strides may be huge where there is a single row.
  const double row_size = double(g.h.step()) * shared.cols * g.in_channels +
                          double(g.h.pool_stride) * g.w.conv * kDirectWide * kLanes<T>;
  const double fitting = kDirectBandBytes / (row_size * sizeof(T));
  shared.band = band_rows(g, static_cast<int64_t>(fitting), 1);
  shared.bands = (g.h.out + shared.band - 1) / shared.band;
  parallel_tasks(pool, g.batch * shared.bands,
                 [&](int64_t task) { direct_band<S>(args, shared, task); });
}

const char* why_not_direct(const Problem& problem) {
  const Geometry& g = problem.geometry;
  const int64_t lanes = kVectorBytes / (problem.type == DataType::kFloat64 ? 8 : 4);
  if (g.groups != 1) return "only for groups = 1";
  if (problem.wide_code) return "writes codes of one byte";
  if (g.out_channels * 4 < round_up(g.out_channels, lanes) * 3) {
    return "too few output channels to fill its vectors";
  }
  for (const Axis* axis : {&g.h, &g.w}) {
    // Only a dilated window can step over the whole input.
    if (axis->pool_padding > 0 && axis->pool_dilation > 1) return "not for padded, dilated windows";
  }
  return nullptr;
}

void forward_direct(const ForwardArgs& args, const ThreadPool& pool) {
  switch (args.type) {
    case DataType::kFloat32: return forward_direct_typed<float>(args, pool);
    case DataType::kFloat64: return forward_direct_typed<double>(args, pool);
    case DataType::kBFloat16: return forward_direct_typed<BFloat16>(args, pool);
    case DataType::kFloat16: return forward_direct_typed<Float16>(args, pool);
  }
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
