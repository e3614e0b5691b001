// grad_weight and grad_bias of bfloat16 by products of tiles, for stride 1: the sum runs over the
// convolution's outputs, numbered row by row with the padding between the rows, so that a tap is an
// offset into a plane of the padded image.
//   A   [16 in channels][pixels]        X, from the tap's offset on
//   B   [pixels / 2][out channels][2]   the winners' gradients, zeros between the rows
//   C   [16 in channels][16 out channels] of one tap
// With few input channels, copies of their planes that begin one row of taps further down make up
// the 16: then a tile holds the taps of a column.
//
// A task owns the sums of a run of images, and with few such runs a part of the output channels:
//   X  [16 channels' planes][plane]
//   G  [pixels][out channels]           the convolution's gradient
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/ahead.h"
#include "cpu/kernels/backward_general.h"
#include "cpu/kernels/partials.h"
#include "cpu/kernels/tile_image.h"
#include "cpu/kernels/tile_machine.h"
#include "cpu/kernels/tile_winners.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

struct TileGradWeight {
  const BackwardArgs& args;
  const Geometry& g;
  int64_t channels;   // input channels; 0: grad_bias alone
  int64_t stacked;    // rows of taps whose planes lie beside each other
  int64_t row_tiles;  // tiles of 16 planes
  int64_t taps;       // offsets into them: of the rows that are not stacked, and of the columns
  int64_t cols;       // pixels of a row of X and of G
  int64_t pixels;     // of G, in whole chunks
  int64_t plane;      // pixels from plane to plane of X
  int64_t lanes;      // output channels in whole tiles

  explicit TileGradWeight(const BackwardArgs& args) : args(args), g(args.geometry) {
    channels = args.grad_weight ? g.in_channels : 0;
    stacked = g.in_channels * g.h.kernel <= kTileRows ? g.h.kernel : 1;
    row_tiles = (channels * stacked + kTileRows - 1) / kTileRows;
    taps = g.taps() / stacked;
    cols = round_up(g.w.conv + g.w.extent() - 1, 2);
    pixels = round_up(g.h.conv * cols, kTileDepth);
    // What a tap's last chunk reads; an odd number of cache lines, so that the rows of a tile do
    // not meet in the same sets of L1.
    plane = round_up(pixels + (g.h.extent() - 1) * cols + g.w.extent(), kTileDepth) / kTileDepth;
    plane = (plane | 1) * kTileDepth;
    lanes = round_up(g.out_channels, kTileLanes);
  }

  // Floats of the sums: [row tiles][taps][lanes / 16][16][16], and the bias's [lanes].
  int64_t bias_at() const { return row_tiles * taps * kTileRows * lanes; }
  int64_t size() const { return bias_at() + lanes; }

  // Images whose products are summed in registers before the sums in memory are read and written,
  // which costs as much as products over 64 pixels.
  int64_t together() const { return larger<int64_t>(1, smaller<int64_t>(8, 768 / pixels)); }

  // Image n into X, whose padding holds zeros already. Returns whether all of it is finite.
  bool read_planes(int64_t n, uint16_t* x) const {
    const Strides s = args.input_strides;
    const uint16_t* image = static_cast<const uint16_t*>(args.input) + n * s.n;
    const int64_t rows = smaller(g.h.in, g.h.conv + g.h.extent() - 1 - g.h.padding);
    const int64_t width = smaller(g.w.in, cols - g.w.padding);
    if (width < 1) return true;
    for (int64_t y = 0; y < rows; ++y) {
      uint16_t* to = x + (y + g.h.padding) * cols + g.w.padding;
      const uint16_t* from = image + y * s.h;
      if (s.c == 1 && s.w == channels && channels <= 4) {
        split_pixels(from, width, channels, to, plane);
      } else if (s.c == 1) {
        transpose_matrix(from, s.w, to, plane, width, channels);
      } else {
        for (int64_t c = 0; c < channels; ++c, from += s.c, to += plane) {
          if (s.w == 1) {
            copy_row(from, to, width);
          } else {
            for (int64_t i = 0; i < width; ++i) to[i] = from[i * s.w];
          }
        }
      }
    }
    for (int64_t k = 1; k < stacked; ++k) {
      const int64_t shift = k * g.h.dilation * cols;
      for (int64_t c = 0; c < channels; ++c) {
        memcpy(x + (k * channels + c) * plane, x + c * plane + shift,
               (plane - shift) * sizeof(uint16_t));
      }
    }
    return all_finite(x, channels * plane);
  }

  // [pixels][count] to pairs of pixels: [chunks][count / 16][16][16][2].
  void pair(const uint16_t* from, int64_t count, uint16_t* to) const {
    for (int64_t p = 0; p < pixels; p += 2, from += 2 * count) {
      uint16_t* chunk = to + p / kTileDepth * count * kTileDepth + p % kTileDepth * kTileLanes;
      for (int64_t c = 0; c < count; c += kTileLanes, chunk += kTileB) {
        const auto read = [&](const uint16_t* at) {
          return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
        };
        const __m512i odd = _mm512_slli_epi32(read(from + count + c), 16);
        _mm512_storeu_si512(chunk, _mm512_or_si512(read(from + c), odd));
      }
    }
  }

  // The same of 2x2 windows side by side, whose rows are pairs already; and adds up the bias. What
  // no window holds is zero already.
  void pair_2x2(const TileWinners& winners, int64_t first, int64_t count, uint16_t* to,
                float* bias) const {
    for (int64_t c = 0; c < count; c += kTileLanes, to += kTileB) {
      const int64_t channel = first + c;
      const int64_t given = smaller<int64_t>(kTileLanes, g.out_channels - channel);
      const __mmask16 some = static_cast<__mmask16>((1u << given) - 1);
      const uint8_t* codes = winners.codes + channel;
      const uint16_t* grads = winners.grads + channel;
      __m512 sum = _mm512_loadu_ps(bias + c);
      for (int64_t oh = 0; oh < g.h.out; ++oh) {
        for (int64_t ow = 0; ow < g.w.out; ++ow) {
          const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, codes));
          const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, grads));
          const __m512i odd = _mm512_slli_epi32(even, 16);
          const __mmask16 on = _mm512_cmplt_epu32_mask(code, _mm512_set1_epi32(4));
          sum = _mm512_mask_add_ps(sum, on, sum, _mm512_castsi512_ps(odd));
          FUSEDCNN_UNROLL
          for (int row = 0; row < 2; ++row) {
            const __mmask16 left = _mm512_cmpeq_epi32_mask(code, _mm512_set1_epi32(2 * row));
            const __mmask16 right = _mm512_cmpeq_epi32_mask(code, _mm512_set1_epi32(2 * row + 1));
            const int64_t p = (2 * oh + row) * cols + 2 * ow;
            _mm512_storeu_si512(
                to + p / kTileDepth * count * kTileDepth + p % kTileDepth * kTileLanes,
                _mm512_or_si512(_mm512_maskz_mov_epi32(left, even),
                                _mm512_maskz_mov_epi32(right, odd)));
          }
          codes += winners.code_stride;
          grads += winners.grad_stride;
        }
      }
      _mm512_storeu_ps(bias + c, sum);
    }
  }

  // Adds the images [begin, end) to the sums of the output channels from `first` on, `count` of
  // them in whole tiles. Returns whether all operands were finite.
  bool add_images(int64_t begin, int64_t end, int64_t first, int64_t count, float* sums) const {
    if (begin == end) return true;  // an empty batch
    const int64_t some = smaller(count, g.out_channels - first);
    const int64_t chunks = pixels / kTileDepth, plane_size = row_tiles * kTileRows * plane;
    const int64_t most = smaller(together(), end - begin);
    uint16_t* x = static_cast<uint16_t*>(scratch(Slot::kPlanes, most * plane_size * 2));
    const bool by_pairs = g.h.pool_kernel == 2 && g.h.pool_stride == 2 && g.h.pool_padding == 0 &&
                          g.h.pool_dilation == 1 && g.w.pool_kernel == 2 && g.w.pool_stride == 2 &&
                          g.w.pool_padding == 0 && g.w.pool_dilation == 1 &&
                          2 * g.h.out <= g.h.conv && 2 * g.w.out <= g.w.conv;
    uint16_t* gradient =
        by_pairs ? nullptr : static_cast<uint16_t*>(scratch(Slot::kGradient, pixels * count * 2));
    uint16_t* pairs = static_cast<uint16_t*>(
        scratch(Slot::kConv, most * (pixels * count * 2 + chunks * int64_t{sizeof(int64_t)})));
    int64_t* offsets = reinterpret_cast<int64_t*>(pairs + most * pixels * count);
    for (int64_t k = 0; k < most * chunks; ++k) {
      offsets[k] = k / chunks * plane_size + k % chunks * kTileDepth;
    }
    if (channels) memset(x, 0, most * plane_size * 2);
    memset(pairs, 0, most * pixels * count * 2);
    if (!by_pairs) memset(gradient, 0, pixels * count * 2);
    const int64_t rows = channels ? smaller<int64_t>(kTileRows, channels * stacked) : kTileRows;
    [[maybe_unused]] const TileMachine machine(kTileDepth, static_cast<int>(rows));
    for (int64_t n = begin; n < end;) {
      const int64_t images = smaller(most, end - n);
      for (int64_t i = 0; i < images; ++i, ++n) {
        const TileWinners winners(args, n, 0, g.h.conv);
        float* const bias = sums + bias_at() + first;
        uint16_t* const of_image = pairs + i * pixels * count;
        if (channels && by_pairs) {
          pair_2x2(winners, first, count, of_image, bias);
        } else {
          for (int64_t c = 0; c < count; c += kTileLanes) winners.add_bias(first + c, bias + c);
        }
        if (!channels) continue;
        if (!by_pairs) {
          winners.write(0, g.h.conv, first, some, 0, 0, cols, count, gradient);
          pair(gradient, count, of_image);
        }
        // Zero times infinity is NaN, and nearly all of G is zero.
        if (!read_planes(n, x + i * plane_size)) return false;
      }
      if (!channels) continue;
      auto ahead = BackwardAhead::of<BFloat16, uint8_t>(args, n - 1, true, row_tiles * taps);
      for (int64_t tile = 0; tile < row_tiles * taps; tile += 2) {
        ahead.step();
        const uint16_t* a[2];
        float* c[2];
        const int64_t m = smaller<int64_t>(2, row_tiles * taps - tile);
        for (int64_t j = 0; j < m; ++j) {
          const int64_t tap = (tile + j) % taps;
          a[j] = x + (tile + j) / taps * kTileRows * plane +
                 tap / g.w.kernel * g.h.dilation * cols + tap % g.w.kernel * g.w.dilation;
        }
        for (int64_t lane = 0; lane < count; lane += 2 * kTileLanes) {
          for (int64_t j = 0; j < m; ++j) {
            c[j] = sums + (tile + j) * kTileRows * lanes + (first + lane) * kTileRows;
          }
          const TileProduct product{kTileDepth,
                                    plane,
                                    offsets,
                                    images * chunks,
                                    pairs + lane * kTileDepth,
                                    count * kTileDepth,
                                    kTileLanes,
                                    kTileRows * kTileLanes,
                                    nullptr};
          multiply_tiles(m, smaller<int64_t>(2, (count - lane) / kTileLanes), product, a, c);
        }
      }
    }
    // If some gradient is not finite, neither is their sum.
    const __m512 zero = _mm512_setzero_ps();
    for (int64_t c = 0; c < count; c += kTileLanes) {
      const __m512 sum = _mm512_loadu_ps(sums + bias_at() + first + c);
      if (_mm512_cmp_ps_mask(_mm512_mul_ps(sum, zero), zero, _CMP_NEQ_UQ)) return false;
    }
    return true;
  }

  void write(const ThreadPool& pool, const float* sums) const {
    if (args.grad_bias) {
      convert_run(sums + bias_at(), static_cast<BFloat16*>(args.grad_bias), g.out_channels);
    }
    const int64_t blocks = lanes / kTileLanes, row = kTileRows * lanes;
    const Strides s = args.grad_weight_strides;
    parallel_tasks(pool, row_tiles * blocks, [&](int64_t task) {
      const int64_t tile = task / blocks, oc = task % blocks * kTileLanes;
      const int64_t rows = smaller<int64_t>(kTileRows, channels * stacked - tile * kTileRows);
      const int64_t count = smaller<int64_t>(kTileLanes, g.out_channels - oc);
      for (int64_t tap = 0; tap < taps; ++tap) {
        BFloat16 turned[kTileLanes * kTileRows];
        transpose_matrix(sums + (tile * taps + tap) * row + oc * kTileRows, kTileLanes, turned,
                         kTileRows, rows, count);
        for (int64_t n = 0; n < count; ++n) {
          BFloat16* to = static_cast<BFloat16*>(args.grad_weight) + (oc + n) * s.n;
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t plane = tile * kTileRows + r;
            const int64_t kh = stacked > 1 ? plane / channels : tap / g.w.kernel;
            to[plane % channels * s.c + kh * s.h + tap % g.w.kernel * s.w] =
                turned[n * kTileRows + r];
          }
        }
      }
    });
  }
};

const char* why_not_grad_weight_tiles(const Problem& problem) {
  const Geometry& g = problem.geometry;
  if (const char* const because = why_not_backward_tiles(problem)) return because;
  // A row of the padded image is mostly padding.
  if (g.w.extent() > g.w.conv + kTileRows) return "the map is narrower than the kernel";
  const char* const because = why_not_tile_rows(g.in_channels, g.w, g.w.conv);
  if (because) return because;
  return why_not_backward_general(problem);  // which takes over where an operand is not finite
}

const char* grad_weight_tiles_are_slower(const Problem& problem) {
  const Geometry& g = problem.geometry;
  if (const char* const because = why_tiles_are_slower()) return because;
  const int64_t rows = g.in_channels * g.h.kernel <= kTileRows
                           ? g.in_channels * g.h.kernel
                           : smaller<int64_t>(g.in_channels, 16);
  if (2 * rows < kTileRows) return "input channels fill less than half of its tiles";
  const double pixels = double(g.h.conv) * (g.w.conv + g.w.extent() - 1);
  if (g.batch * pixels < 512) return "too few pixels for its sums";
  if (pixels > 16.0 * g.outputs()) return "few winners among its pixels";
  const bool overlap = g.h.pool_stride < g.h.window() || g.w.pool_stride < g.w.window();
  if (overlap && g.in_channels * g.taps() < 512) return "too few products for overlapping windows";
  return nullptr;
}

void grad_weight_tiles(const BackwardArgs& args, const ThreadPool& pool) {
  const Geometry& g = args.geometry;
  const TileGradWeight tiles(args);
  const int64_t size = tiles.size();
  const Partials partials(g.batch, size * sizeof(float));
  float* sums =
      static_cast<float*>(scratch(Slot::kPartials, partials.count * size * sizeof(float)));
  memset(sums, 0, partials.count * size * sizeof(float));
  // Of output channels. Every part reads the image anew, at about a cycle an element, and
  // multiplies each by taps x part weights, of which a cycle does 512.
  const int64_t least = round_up(larger<int64_t>(1, 1024 / g.taps()), 2 * kTileLanes);
  const int64_t part = partials.count < kSmallBatch ? smaller(least, tiles.lanes) : tiles.lanes;
  const int64_t parts = (tiles.lanes + part - 1) / part;
  bool finite = true;
  parallel_tasks(pool, partials.count * parts, [&](int64_t task) {
    const int64_t partial = task / parts, first = task % parts * part;
    if (!tiles.add_images(partials.begin(partial), partials.begin(partial + 1), first,
                          smaller(part, tiles.lanes - first), sums + partial * size)) {
      __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    }
  });
  if (!finite) return grad_weight_general(args, pool);
  partials.add_up(pool, sums, size);
  tiles.write(pool, sums);
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
