// The forward of bfloat16 by products of tiles (tile_machine.h), for any kernel, stride, dilation
// and pool.
//
// A task owns a band of pooled rows of one image. It copies what they see of the image
// (tile_convolution.h), and for each block of up to 32 output channels computes convolution rows
// into a ring as high as two rows of windows,
//   V  [few rows][conv cols][lanes]     float32, bias included
// and pools them:
//   P  [pooled pixels][out channels]    pooled values and codes, or the output itself
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/ahead.h"
#include "cpu/kernels/output_lanes.h"
#include "cpu/kernels/tile_convolution.h"
#include "cpu/kernels/tile_image.h"
#include "cpu/kernels/window_range.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// ReLU, value and code of 16 output channels' windows.
FUSEDCNN_INLINE void finish_tile_window(__m512 best, __m512i winner, uint16_t* value,
                                        uint8_t* code) {
  const __mmask16 on = _mm512_cmp_ps_mask(best, _mm512_setzero_ps(), _CMP_NLE_UQ);
  best = _mm512_maskz_mov_ps(on, best);
#if defined(__AVX512BF16__)
  // Tiles yield no denormal numbers, which this would lose.
  const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(best);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(value), narrow);
#else
  narrow_vector((Vector<float>)best, reinterpret_cast<BFloat16*>(value));
#endif
  winner = _mm512_mask_mov_epi32(_mm512_set1_epi32(kOff<uint8_t>), on, winner);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(code), _mm512_cvtepi32_epi8(winner));
}

// One window of 16 output channels: max, ReLU, code. rows: of V, at the window's first row; `at`
// its first column, columns `step` floats apart. Elements are numbered from `first` on, `next_row`
// from row to row. The first maximum wins; NaN beats everything, a later NaN too, as in torch.
FUSEDCNN_INLINE void pool_tile_window(const float* const* rows, int64_t height, int64_t width,
                                      int64_t at, int64_t step, int64_t first, int64_t next_row,
                                      uint16_t* value, uint8_t* code) {
  __m512 best = _mm512_loadu_ps(rows[0] + at);
  __m512i winner = _mm512_set1_epi32(static_cast<int>(first));
  for (int64_t h = 0; h < height; ++h) {
    for (int64_t w = 0; w < width; ++w) {
      const __m512 v = _mm512_loadu_ps(rows[h] + at + w * step);
      const __mmask16 wins =
          _mm512_cmp_ps_mask(v, best, _CMP_GT_OQ) | _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
      best = _mm512_mask_mov_ps(best, wins, v);
      winner = _mm512_mask_mov_epi32(winner, wins,
                                     _mm512_set1_epi32(static_cast<int>(first + h * next_row + w)));
    }
  }
  finish_tile_window(best, winner, value, code);
}

// The same for a whole window of 2x2: the maximum first, then who has it.
FUSEDCNN_INLINE void pool_tile_window_2x2(const float* top, const float* bottom, int64_t step,
                                          uint16_t* value, uint8_t* code) {
  const __m512 a = _mm512_loadu_ps(top), b = _mm512_loadu_ps(top + step);
  const __m512 c = _mm512_loadu_ps(bottom), d = _mm512_loadu_ps(bottom + step);
  const __mmask16 nan =
      _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) | _mm512_cmp_ps_mask(c, d, _CMP_UNORD_Q);
  if (__builtin_expect(nan, 0)) {
    const float* const rows[] = {top, bottom};
    return pool_tile_window(rows, 2, 2, 0, step, 0, 2, value, code);
  }
  const __m512 best = _mm512_max_ps(_mm512_max_ps(a, b), _mm512_max_ps(c, d));
  const auto pick = [&](__m512 one, __m512i otherwise, int element) {
    return _mm512_mask_mov_epi32(otherwise, _mm512_cmp_ps_mask(one, best, _CMP_EQ_OQ),
                                 _mm512_set1_epi32(element));
  };
  const __m512i winner = pick(a, pick(b, pick(c, _mm512_set1_epi32(3), 2), 1), 0);
  finish_tile_window(best, winner, value, code);
}

// One pooled row of one block of tiles. rows: [pool_kernel] rows of V, null where the window has
// none; values, codes: [OW][stride].
template <bool Pool2x2>
FUSEDCNN_NOINLINE void pool_tile_row(const Geometry& g, const float* const* rows, int64_t top,
                                     int64_t bottom, int64_t lanes, uint16_t* values,
                                     uint8_t* codes, int64_t stride) {
  // Copies, since a store of codes could change anything else in memory.
  const Axis w = g.w;
  const int64_t pool_h = g.h.pool_kernel, step = w.pool_dilation * lanes;
  const bool all_rows = bottom - top == pool_h;
  const float* const first = all_rows ? rows[0] : nullptr;
  const float* const last = all_rows ? rows[pool_h - 1] : nullptr;
  for (int64_t ow = 0; ow < w.out; ++ow, values += stride, codes += stride) {
    const int64_t start = ow * w.pool_stride - w.pool_padding;
    if (all_rows && start >= 0 && start + w.window() <= w.conv) {
      for (int64_t c = 0; c < lanes; c += kTileLanes) {
        const int64_t at = start * lanes + c;
        if constexpr (Pool2x2) {
          pool_tile_window_2x2(first + at, last + at, step, values + c, codes + c);
        } else {
          pool_tile_window(rows, pool_h, w.pool_kernel, at, step, 0, w.pool_kernel, values + c,
                           codes + c);
        }
      }
      continue;
    }
    int64_t left, right;
    window_range(w, ow, 0, w.conv, left, right);
    for (int64_t c = 0; c < lanes; c += kTileLanes) {
      if (top >= bottom || left >= right) {  // an empty window
        for (int64_t i = c; i < c + kTileLanes; ++i) values[i] = 0xff80, codes[i] = kOff<uint8_t>;
        continue;
      }
      pool_tile_window(rows + top, bottom - top, right - left,
                       (start + left * w.pool_dilation) * lanes + c, step,
                       top * w.pool_kernel + left, w.pool_kernel, values + c, codes + c);
    }
  }
}

struct TileForward {
  const ForwardArgs& args;
  const TileConvolution& conv;
  int64_t ring_rows;
  int64_t padded;  // output channels in whole tiles

  void band(int64_t n, int64_t first_out, int64_t count) const {
    const Geometry& g = args.geometry;
    int64_t begin, end;
    conv_range(g.h, first_out, count, begin, end);
    end = larger(begin, end);  // windows may all be empty
    const int64_t rows = end > begin ? (end - 1 - begin) * g.h.stride + g.h.extent() : 0;
    uint16_t* image = static_cast<uint16_t*>(scratch(Slot::kPatch, conv.size(rows) * 2));
    copy_image(conv, static_cast<const uint16_t*>(args.input) + n * args.input_strides.n,
               args.input_strides, g.h, g.w, begin * g.h.stride, rows, image);
    const bool masked = conv.mixed() && !all_finite(image, conv.size(rows));

    const Strides& s = args.output_strides;
    const int64_t at = n * s.n + first_out * s.h, pixels = count * g.w.out;
    const bool in_place = s.c == 1 && padded == g.out_channels && args.code;
    uint16_t* values = static_cast<uint16_t*>(args.output) + at;
    uint8_t* codes = args.code ? static_cast<uint8_t*>(args.code) + at : nullptr;
    const int64_t ring_bytes = ring_rows * conv.row_size(0) * int64_t{sizeof(float)};
    float* ring = static_cast<float*>(
        scratch(Slot::kGradient, ring_bytes + (in_place ? 0 : pixels * padded * 3)));
    if (!in_place) {
      values = reinterpret_cast<uint16_t*>(reinterpret_cast<char*>(ring) + ring_bytes);
      codes = reinterpret_cast<uint8_t*>(values + pixels * padded);
    }
    [[maybe_unused]] const TileMachine machine(conv.depth);
    Ahead ahead = Ahead::of(static_cast<const uint16_t*>(args.input), args.input_strides,
                            g.in_channels, g.h.in, g.w.in, n, g.batch, conv.blocks() * count);
    for (int64_t block = 0; block < conv.blocks(); ++block) {
      int64_t done = begin;
      const auto convolve = [&](int64_t oh) {
        int64_t top, bottom;
        window_range(g.h, oh, 0, g.h.conv, top, bottom);
        if (top >= bottom) return;
        const int64_t start = oh * g.h.pool_stride - g.h.pool_padding;
        const int64_t until = start + (bottom - 1) * g.h.pool_dilation + 1;
        done = larger(done, start);  // no later window begins further up
        if (done >= until) return;
        conv.rows(image, begin, done, until, block, masked, ring, ring_rows);
        done = until;
      };
      const int64_t channel = block * 2 * kTileLanes;
      convolve(first_out);
      for (int64_t r = 0; r < count; ++r) {
        ahead.step();
        // Tiles are long to wait for, and their unit works beside the vectors': the next row's are
        // under way while this one is pooled.
        if (r + 1 < count) convolve(first_out + r + 1);
        pool_row(first_out + r, block, ring, values + r * g.w.out * padded + channel,
                 codes + r * g.w.out * padded + channel);
      }
    }
    if (!in_place) {
      write_strip(values, padded, pixels, g.out_channels, static_cast<uint16_t*>(args.output) + at,
                  s);
      if (args.code) {
        write_strip(codes, padded, pixels, g.out_channels, static_cast<uint8_t*>(args.code) + at,
                    s);
      }
    }
  }

  void pool_row(int64_t oh, int64_t block, const float* ring, uint16_t* values,
                uint8_t* codes) const {
    const Geometry& g = args.geometry;
    int64_t top, bottom;
    window_range(g.h, oh, 0, g.h.conv, top, bottom);
    const int64_t start = oh * g.h.pool_stride - g.h.pool_padding, lanes = conv.lanes(block);
    const float* rows[kLargestByteWindow];
    for (int64_t p = top; p < bottom; ++p) {
      const int64_t y = start + p * g.h.pool_dilation;
      rows[p] = ring + y % ring_rows * conv.row_size(block);
    }
    if (g.h.pool_kernel == 2 && g.w.pool_kernel == 2) {
      pool_tile_row<true>(g, rows, top, bottom, lanes, values, codes, padded);
    } else {
      pool_tile_row<false>(g, rows, top, bottom, lanes, values, codes, padded);
    }
  }
};

const char* why_not_tiles(const Problem& problem) {
  const Geometry& g = problem.geometry;
  if (problem.type != DataType::kBFloat16) return "only for bfloat16";
  if (problem.wide_code) return "only for codes of one byte";
  if (g.groups != 1) return "only for groups = 1";
  return nullptr;
}

const char* why_not_forward_tiles(const Problem& problem) {
  const Geometry& g = problem.geometry;
  if (const char* const because = why_not_tiles(problem)) return because;
  return why_not_tile_rows(g.in_channels, g.w, g.w.conv);
}

const char* forward_tiles_are_slower(const Problem& problem) {
  const Geometry& g = problem.geometry;
  if (const char* const because = why_tiles_are_slower()) return because;
  // A tile's cycles go by its rows and columns, however few of its 32 products are wanted.
  return g.in_channels * g.w.kernel < 9 ? "too few products to a row of taps" : nullptr;
}

void forward_tiles(const ForwardArgs& args, const ThreadPool& pool) {
  const Geometry& g = args.geometry;
  TileConvolution conv(g.in_channels, g.out_channels, g.h, g.w, g.w.conv);
  conv.prepare(pool, {args.weight, args.weight_strides, false}, args.bias, args.bias_stride);
  const int64_t padded = round_up(g.out_channels, kTileLanes);
  const TileForward forward{args, conv, smaller(g.h.window() + g.h.pool_stride, g.h.conv), padded};

  const double row = double(g.h.step()) * conv.cols * conv.pixel * 2;
  const int64_t band = band_rows(g, static_cast<int64_t>(kTileBandBytes / row), 1);
  const int64_t bands = (g.h.out + band - 1) / band;
  parallel_tasks(pool, g.batch * bands, [&](int64_t task) {
    const int64_t first = task % bands * band;
    forward.band(task / bands, first, smaller(band, g.h.out - first));
  });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
