// The forward for enough output channels to fill vectors, for any kernel, stride, dilation and
// pool. A lane is an output channel: unlike the general kernel, this one spends no lanes on places
// between rows.
//
// A task owns a band of pooled rows of one image. For each block of Z vectors of output channels it
// computes the band's convolution outputs row by row (X, U and V: direct_rows.h), then pools them:
//   P  [pooled pixels][out channels]    pooled values and codes of the band
//
// Large windows reach over more convolution outputs than the caches hold; forward_direct_large.h is
// for them.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/ahead.h"
#include "cpu/kernels/direct_rows.h"
#include "cpu/kernels/forward_direct_large.h"
#include "cpu/kernels/output_lanes.h"
#include "cpu/kernels/window_range.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Pools one output of one vector of channels: max, perhaps ReLU, and code. conv: [..][conv
// cols][stride] from convolution row `begin` on; values, codes: [lanes].
template <bool kReLU, typename T>
FUSEDCNN_INLINE void pool_pixel(const Geometry& g, const T* conv, int64_t stride, int64_t begin,
                                int64_t oh, int64_t ow, T* values, uint8_t* codes) {
  FirstMaximum<T> pool;
  // Only without ReLU does it matter what wins where all is minus infinity.
  if (!kReLU) pool.winner = broadcast(static_cast<Int<T>>(first_element(g, oh, ow)));
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
  pool.template finish<kReLU>(values, codes);
}

// Convolution outputs that nothing pools go from registers to a tensor of whole vectors.
// out: [images][rows][cols][out channels].
template <typename T>
void direct_plane(const ForwardArgs& args, const DirectShared<T>& shared, int64_t first,
                  int64_t rows, int64_t n) {
  const Geometry& g = args.geometry;
  const Strides s = args.output_strides;
  T* x = static_cast<T*>(
      scratch(Slot::kPlanes, direct_input_size(g, shared, rows) * int64_t{sizeof(T)}));
  direct_input<T>(args, shared, n, first, first + rows, x);
  const int64_t at = n * s.n + first * s.h;
  T* out = static_cast<T*>(args.output) + at;
  clear_codes(args, n, first, rows);
  Ahead ahead = Ahead::of(static_cast<const T*>(args.input), args.input_strides, g.in_channels,
                          g.h.in, g.w.in, n, g.batch, (shared.padded / kLanes<T> + 1) / 2 * rows);
  for_direct_blocks(shared, [&]<int Z>(int64_t oc) {
    direct_block<Z>(g, shared, x, rows, oc, out + oc, s.w, s.h, ahead);
  });
}

template <typename S>
void direct_band(const ForwardArgs& args, const DirectShared<Accumulator<S>>& shared,
                 int64_t first_out, int64_t rows, int64_t n) {
  using T = Accumulator<S>;
  constexpr int kN = kLanes<T>;
  const Geometry& g = args.geometry;
  const int64_t pixels = rows * g.w.out;
  int64_t begin, end;
  conv_range(g.h, first_out, rows, begin, end);
  T* x = static_cast<T*>(
      scratch(Slot::kPlanes, direct_input_size(g, shared, end - begin) * int64_t{sizeof(T)}));
  direct_input<S>(args, shared, n, begin, end, x);

  const int64_t conv_size = (end - begin) * g.w.conv * kDirectWide * kN;
  T* conv = static_cast<T*>(scratch(
      Slot::kConv, conv_size * sizeof(T) + pixels * shared.padded * int64_t{sizeof(T) + 1}));
  T* values = conv + conv_size;
  uint8_t* codes = reinterpret_cast<uint8_t*>(values + pixels * shared.padded);
  Ahead ahead =
      Ahead::of(static_cast<const S*>(args.input), args.input_strides, g.in_channels, g.h.in,
                g.w.in, n, g.batch, (shared.padded / kN + 1) / kDirectWide * (end - begin));
  for_direct_blocks(shared, [&]<int Z>(int64_t oc) {
    direct_block<Z>(g, shared, x, end - begin, oc, conv, ahead);
    const auto pool_pixels = [&]<bool kReLU>() {
      for (int64_t q = 0; q < pixels; ++q) {
        for (int64_t z = 0; z < Z; ++z) {
          const int64_t at = q * shared.padded + oc + z * kN;
          pool_pixel<kReLU>(g, conv + z * kN, Z * kN, begin, first_out + q / g.w.out, q % g.w.out,
                            values + at, codes + at);
        }
      }
    };
    args.relu ? pool_pixels.template operator()<true>() : pool_pixels.template operator()<false>();
  });
  const int64_t at = n * args.output_strides.n + first_out * args.output_strides.h;
  write_strip(values, shared.padded, pixels, g.out_channels, static_cast<S*>(args.output) + at,
              args.output_strides);
  if (args.code) {
    write_strip(codes, shared.padded, pixels, g.out_channels, static_cast<uint8_t*>(args.code) + at,
                args.output_strides);
  }
}

template <typename S>
void forward_direct_bands(const ForwardArgs& args, const ThreadPool& pool) {
  using T = Accumulator<S>;
  const Geometry& g = args.geometry;
  with_direct_shared<S>(args, pool, [&](const DirectShared<T>& shared) {
    if constexpr (std::is_same_v<S, T>) {
      if (is_plane(g, args.relu) && args.output_strides.c == 1 && shared.padded == g.out_channels) {
        const double row_bytes = double(g.h.step()) * shared.cols * g.in_channels * sizeof(T);
        const int64_t band = band_rows(g, static_cast<int64_t>(kDirectBandBytes / row_bytes), 1);
        const int64_t bands = (g.h.out + band - 1) / band;
        return parallel_tasks(pool, g.batch * bands, [&](int64_t task) {
          const int64_t first = task % bands * band;
          direct_plane<T>(args, shared, first, smaller(band, g.h.out - first), task / bands);
        });
      }
    }
    // What one more pooled row adds to X and V. Strides may be huge where there is a single row.
    const double row_size = double(g.h.step()) * shared.cols * g.in_channels +
                            double(g.h.pool_stride) * g.w.conv * kDirectWide * kLanes<T>;
    const double fitting = kDirectBandBytes / (row_size * sizeof(T));
    const int64_t band = band_rows(g, static_cast<int64_t>(fitting), 1);
    const int64_t bands = (g.h.out + band - 1) / band;
    parallel_tasks(pool, g.batch * bands, [&](int64_t task) {
      const int64_t first_out = task % bands * band;
      direct_band<S>(args, shared, first_out, smaller(band, g.h.out - first_out), task / bands);
    });
  });
}

const char* why_not_direct(const Problem& problem) {
  const Geometry& g = problem.geometry;
  const int64_t lanes = kVectorBytes / (problem.type == DataType::kFloat64 ? 8 : 4);
  if (g.groups != 1) return "only for groups = 1";
  if (g.out_channels * 4 < round_up(g.out_channels, lanes) * 3) {
    return "too few output channels to fill its vectors";
  }
  for (const Axis* axis : {&g.h, &g.w}) {
    // Only a dilated window can step over the whole input.
    if (axis->pool_padding > 0 && axis->pool_dilation > 1 && !running_maxima(problem)) {
      return "not for small windows that are padded and dilated";
    }
  }
  return nullptr;
}

void forward_direct(const ForwardArgs& given, const ThreadPool& pool) {
  const ForwardArgs args = laid_down(given);
  for_storage(args.type, [&]<typename S>(S) {
    if (args.wide_code) return forward_direct_large<S, int32_t>(args, pool);
    if (running_maxima({args.geometry, args.type, args.wide_code})) {
      return forward_direct_large<S, uint8_t>(args, pool);
    }
    forward_direct_bands<S>(args, pool);
  });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
