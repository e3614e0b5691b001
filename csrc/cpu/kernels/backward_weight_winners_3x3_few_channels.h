// grad_weight and grad_bias of a 3x3 convolution of stride 1 under a 2x2 pool, for few input
// channels: a vector holds as many output channels as it has lanes.
//
// Whatever elements they chose, the pixels of one input channel under one tap of all of them are
// one shuffle, indexed by code; then one FMA adds gradient x pixel to that tap of all the weights.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/ahead.h"
#include "cpu/kernels/block_3x3.h"
#include "cpu/kernels/partials.h"
#include "cpu/kernels/simd.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

constexpr int kWeightLanes = kLanes<float>;
// Bytes of pixels that one pass over the output channels reads: half of a small L1, beside as much
// of codes and gradients.
constexpr int64_t kPixelBytes = int64_t{16} << 10;

// What one call of the ISAs' `add` below owns: up to kChannels input channels x 9 taps x
// kWeightLanes output channels, summed over `rows` rows of `windows` windows:
//   sums[c][dy * 3 + dx][lane] += sum over q of gradient[q][lane] * patch[q][c][y + dy][x + dx],
// (y, x) being the element that the lane chose; and the bias, unless that is null:
//   bias[lane] += sum over q of gradient[q][lane]
// at: at the first window and output channel, of which there are `lanes`.
// pixels: as `cut` leaves them, `channel` from one channel to the next.
// ahead: takes `steps(windows)` steps a row.

#if defined(__AVX512BW__)
constexpr int kStrip = 3;  // windows whose patches lie in 8 columns

// [window of a strip][code], the codes once in each 4 lanes: where the first tap's pixel lies in
// two rows of 8.
struct FirstTaps {
  alignas(64) int32_t place[kStrip][16] = {};
  constexpr FirstTaps() {
    for (int w = 0; w < kStrip; ++w) {
      for (int l = 0; l < 16; ++l) place[w][l] = 2 * w + l % 4 / 2 * 8 + l % 2;
    }
  }
};
constexpr FirstTaps kFirstTaps;

// Two rows of 8 pixels are one register: for one row of taps, what 3 neighbouring windows see of a
// channel. A code is an index into them, plus the window's place, plus the tap's column: three
// indices a window for 27 shuffles. The shuffles and the FMAs of a window share two ports, the
// shuffles being bound to one of them: with 9 other instructions there, (27 + 27 + 9) / 2 = 32
// cycles. A Xeon takes 36, and 5 more to put rows in pairs: 9 times for 3 windows.
struct Patches {
  // Input channels of one call: 3 x 9 accumulators, the bias's, the gradients, an index and the
  // shuffled pixels make 31 registers of 32.
  static constexpr int kChannels = 3;

  static int64_t steps(int64_t windows) { return (windows + kStrip - 1) / kStrip; }

  // Columns of a plane: 6 for each strip, and two more.
  static int64_t cols(int64_t windows) { return steps(windows) * (2 * kStrip) + 2; }

  // What a row of windows reads of a channel.
  static int64_t row_size(int64_t windows) { return 4 * cols(windows); }

  // Planes are read as they are.
  static int64_t cut_size(int64_t, int64_t) { return 0; }
  static const float* cut(const float* planes, int64_t, int64_t, int64_t, int64_t, float*) {
    return planes;
  }

  static void add(int64_t channels, const Windows& at, int64_t rows, int64_t windows, int64_t lanes,
                  const float* pixels, int64_t channel, float* sums, float* bias,
                  BackwardAhead& ahead) {
    switch (channels) {
      case 0: return add_channels<0>(at, rows, windows, lanes, pixels, channel, sums, bias, ahead);
      case 1: return add_channels<1>(at, rows, windows, lanes, pixels, channel, sums, bias, ahead);
      case 2: return add_channels<2>(at, rows, windows, lanes, pixels, channel, sums, bias, ahead);
      default: return add_channels<3>(at, rows, windows, lanes, pixels, channel, sums, bias, ahead);
    }
  }

 private:
  template <int C>
  static FUSEDCNN_NOINLINE void add_channels(const Windows& at, int64_t rows, int64_t windows,
                                             int64_t lanes, const float* pixels, int64_t channel,
                                             float* sums, float* bias, BackwardAhead& ahead) {
    constexpr int kSums = 9 * C;
    const __mmask16 some = static_cast<__mmask16>((1u << lanes) - 1);
    const int64_t pitch = cols(windows);
    alignas(64) float pairs[C ? 3 * C : 1][16];  // [channel][row of taps]
    __m512 sum[kSums + 1];                       // the last one: the bias's
    FUSEDCNN_UNROLL
    for (int i = 0; i <= kSums; ++i) sum[i] = _mm512_setzero_ps();
    const uint8_t* codes = at.codes;
    const float* grads = at.grads;
    for (int64_t r = 0; r < rows; ++r, pixels += 2 * pitch) {
      const float* strip = pixels;
      for (int64_t q = 0, w = 0; q < windows; ++q) {
        if (w == 0) {
          FUSEDCNN_UNROLL
          for (int c = 0; c < C; ++c) {
            const float* row = strip + c * channel;
            FUSEDCNN_UNROLL
            for (int y = 0; y < 3; ++y, row += pitch) {
              const __m512 upper = _mm512_castps256_ps512(_mm256_loadu_ps(row));
              _mm512_store_ps(pairs[c * 3 + y],
                              _mm512_insertf32x8(upper, _mm256_loadu_ps(row + pitch), 1));
            }
          }
          strip += 2 * kStrip;
          ahead.step();
        }
        const __m512i code = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(some, codes));
        // kOff is the one that is negative.
        const __mmask16 live = _kandn_mask16(_mm512_movepi32_mask(code), some);
        const __m512 gradient = _mm512_maskz_loadu_ps(live, grads);
        sum[kSums] = _mm512_add_ps(sum[kSums], gradient);
        if constexpr (C > 0) {
          __m512i from =
              _mm512_castps_si512(_mm512_permutevar_ps(_mm512_load_ps(kFirstTaps.place[w]), code));
          const float* pair = pairs[0];
          FUSEDCNN_UNROLL
          for (int x = 0; x < 3; ++x) {
            keep_address(pair);  // lest the pixels take registers
            if (x > 0) from = _mm512_add_epi32(from, _mm512_set1_epi32(1));
            FUSEDCNN_UNROLL
            for (int i = 0; i < 3 * C; ++i) {
              __m512& s = sum[i * 3 + x];
              // Masked, since a dead lane's pixel may be infinite.
              s = _mm512_mask3_fmadd_ps(_mm512_permutexvar_ps(from, _mm512_load_ps(pair + i * 16)),
                                        gradient, s, live);
            }
          }
        }
        codes += at.code_stride;
        grads += at.grad_stride;
        w = w + 1 == kStrip ? 0 : w + 1;
      }
    }
    FUSEDCNN_UNROLL
    for (int i = 0; i < kSums; ++i) {
      float* to = sums + i * kWeightLanes;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[i]));
    }
    if (bias) _mm512_storeu_ps(bias, _mm512_add_ps(_mm512_loadu_ps(bias), sum[kSums]));
  }
};
#else
// The 2x2 pixels under one tap, one for each element of the window, are one half of a register, so
// that the code is the index within both. Neighbouring taps and windows share them.
struct Patches {
  static constexpr int kChannels = 1;  // of one call: 9 accumulators of 16 registers

  static int64_t steps(int64_t) { return 1; }

  static int64_t cols(int64_t windows) { return 2 * windows + 2; }  // of a plane

  // What a row of windows reads of a channel.
  static int64_t row_size(int64_t windows) { return cut_size(1, windows); }

  // Of one channel.
  static int64_t cut_size(int64_t rows, int64_t windows) {
    return (2 * rows + 1) * (2 * windows + 1) * 4;
  }

  // [channels][2 * rows + 1][2 * windows + 1][2][2] out of planes.
  static const float* cut(const float* planes, int64_t plane, int64_t channels, int64_t rows,
                          int64_t windows, float* to) {
    for (int64_t c = 0; c < channels; ++c) {
      cut_plane(planes + c * plane, rows, windows, to + c * cut_size(rows, windows));
    }
    return to;
  }

  static FUSEDCNN_NOINLINE void cut_plane(const float* plane, int64_t rows, int64_t windows,
                                          float* to) {
    const int64_t pitch = cols(windows);
    for (int64_t y = 0; y < 2 * rows + 1; ++y, plane += pitch) {
      for (int64_t x = 0; x < 2 * windows + 1; ++x, to += 4) {
        const auto two = [](const float* from) {
          return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
        };
        const __m128i both = _mm_unpacklo_epi64(two(plane + x), two(plane + x + pitch));
        _mm_storeu_ps(to, _mm_castsi128_ps(both));
      }
    }
  }

  static void add(int64_t channels, const Windows& at, int64_t rows, int64_t windows, int64_t lanes,
                  const float* patches, int64_t, float* sums, float* bias, BackwardAhead& ahead) {
    for (int64_t r = 0; r < rows; ++r) ahead.step();
    if (bias) add_channels<0>(at, rows, windows, lanes, nullptr, bias);
    if (channels) add_channels<1>(at, rows, windows, lanes, patches, sums);
  }

 private:
  template <int C>
  static FUSEDCNN_NOINLINE void add_channels(const Windows& at, int64_t rows, int64_t windows,
                                             int64_t lanes, const float* patches, float* sums) {
    constexpr int kSums = C == 0 ? 1 : 9;
    const int64_t pitch = (2 * windows + 1) * 4;
    // Each lane's code four times; bytes 4 * code + 0, 1, 2, 3 are the pixel that it chose.
    const __m256i spread = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,  //
                                            4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7);
    const __m256i bytes = _mm256_set1_epi32(0x03020100);
    Vector<float> sum[kSums];
    FUSEDCNN_UNROLL
    for (int i = 0; i < kSums; ++i) sum[i] = Vector<float>{};
    const uint8_t* codes = at.codes;
    const float* grads = at.grads;
    for (int64_t r = 0; r < rows; ++r, patches += 2 * pitch) {
      for (int64_t q = 0; q < windows; ++q) {
        int64_t eight = -1;
        if (lanes == kWeightLanes) {
          memcpy(&eight, codes, sizeof eight);
        } else {
          for (int64_t l = lanes; l-- > 0;)
            eight = static_cast<int64_t>(static_cast<uint64_t>(eight) << 8 | codes[l]);
        }
        const __m256i code = _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), spread);
        // Where the code is kOff, the bytes' highest bits are set, which shuffles in zeros.
        const __m256i from = _mm256_or_si256(_mm256_slli_epi16(code, 2), bytes);
        const __m256i live = _mm256_cmpgt_epi32(from, _mm256_set1_epi32(-1));
        const Vector<float> gradient = (Vector<float>)_mm256_maskload_ps(grads, live);
        if constexpr (C == 0) {
          sum[0] += gradient;
        } else {
          const float* tap = patches + 8 * q;
          FUSEDCNN_UNROLL
          for (int t = 0; t < 9; ++t) {
            const __m256i pixels = _mm256_broadcastsi128_si256(
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(tap + t / 3 * pitch + t % 3 * 4)));
            sum[t] += gradient * (Vector<float>)_mm256_shuffle_epi8(pixels, from);
          }
        }
        codes += at.code_stride;
        grads += at.grad_stride;
      }
    }
    FUSEDCNN_UNROLL
    for (int i = 0; i < kSums; ++i) {
      float* to = sums + i * kWeightLanes;
      store(to, load(to) + sum[i]);
    }
  }
};
#endif

// A row of `width` pixels, converted. No call of a library: rows are short.
template <typename S>
FUSEDCNN_INLINE void read_row(const S* from, float* to, int64_t width) {
  constexpr int kN = kLanes<float>;
  if (width < kN) {
    for (int64_t x = 0; x < width; ++x) to[x] = widen(from[x]);
    return;
  }
  for (int64_t x = 0; x < width - kN; x += kN) store(to + x, widen_vector(from + x));
  store(to + width - kN, widen_vector(from + width - kN));
}

// Copies image n into planes [channels][rows][cols] as far as windows see it; around it, zeros are
// there already.
template <typename S>
void read_planes(const BackwardArgs& args, int64_t n, float* planes, int64_t rows, int64_t cols) {
  const Geometry& g = args.geometry;
  const Strides strides = args.input_strides;
  const S* image = static_cast<const S*>(args.input) + n * strides.n;
  const int64_t left = smaller(g.w.padding, cols), width = smaller(g.w.in, cols - left);
  const int64_t plane = rows * cols;
  if (width < 1) return;
  for (int64_t y = 0; y < rows; ++y) {
    const int64_t h = y - g.h.padding;
    if (h < 0 || h >= g.h.in) continue;
    const S* from = image + h * strides.h;
    float* to = planes + y * cols + left;
    if (strides.c == 1) {
      transpose_matrix(from, strides.w, to, plane, width, g.in_channels);
      continue;
    }
    for (int64_t c = 0; c < g.in_channels; ++c, from += strides.c, to += plane) {
      if (strides.w == 1) {
        read_row(from, to, width);
      } else {
        for (int64_t x = 0; x < width; ++x) to[x] = widen(from[x * strides.w]);
      }
    }
  }
}

template <typename S>
void grad_weight_winners_3x3_few_channels(const BackwardArgs& args, const ThreadPool& pool) {
  const Geometry& g = args.geometry;
  const int64_t channels = args.grad_weight ? g.in_channels : 0;
  const int64_t blocks = (g.out_channels + kWeightLanes - 1) / kWeightLanes;
  // Sums of one block of output channels: [in_channels][9][kWeightLanes], then the
  // bias's [kWeightLanes].
  const int64_t bias_at = channels * 9 * kWeightLanes, row = bias_at + kWeightLanes;
  const Partials partials(g.batch, blocks * row * sizeof(float));

  const int64_t rows = 2 * g.h.out + 2, cols = Patches::cols(g.w.out);
  const int64_t row_bytes =
      larger<int64_t>(channels, 1) * Patches::row_size(g.w.out) * int64_t{sizeof(float)};
  const int64_t fitting = larger<int64_t>(1, kPixelBytes / row_bytes);
  const int64_t bands = larger<int64_t>(1, (g.h.out + fitting - 1) / fitting);
  const int64_t band = (g.h.out + bands - 1) / bands;  // of equal height

  float* sums =
      static_cast<float*>(scratch(Slot::kPartials, partials.count * blocks * row * sizeof(float)));
  const int64_t splits = g.batch < kSmallBatch ? blocks : 1;
  parallel_tasks(pool, partials.count * splits, [&](int64_t task) {
    const int64_t partial = task / splits;
    const int64_t begin = task % splits * (blocks / splits), end = begin + blocks / splits;
    float* own = sums + partial * blocks * row;
    memset(own + begin * row, 0, (end - begin) * row * sizeof(float));
    float* planes =
        static_cast<float*>(scratch(Slot::kPlanes, channels * rows * cols * sizeof(float)));
    memset(planes, 0, channels * rows * cols * sizeof(float));
    float* patches = static_cast<float*>(
        scratch(Slot::kPatch, channels * Patches::cut_size(band, g.w.out) * sizeof(float)));
    const int64_t steps = g.h.out * (end - begin) * Patches::steps(g.w.out);
    for (int64_t n = partials.begin(partial); n < partials.begin(partial + 1); ++n) {
      const Windows windows = read_windows<S>(args, n);
      if (channels) read_planes<S>(args, n, planes, rows, cols);
      auto ahead = BackwardAhead::of<S, uint8_t>(args, n, channels > 0, steps);
      for (int64_t first = 0; first < g.h.out; first += band) {
        const int64_t height = smaller(band, g.h.out - first);
        const float* pixels = Patches::cut(planes + 2 * first * cols, rows * cols, channels, height,
                                           g.w.out, patches);
        const int64_t cut_size = Patches::cut_size(height, g.w.out);
        const int64_t channel = cut_size ? cut_size : rows * cols;
        for (int64_t block = begin; block < end; ++block) {
          const int64_t oc = block * kWeightLanes;
          const int64_t lanes = smaller<int64_t>(kWeightLanes, g.out_channels - oc);
          Windows at = windows;
          at.codes += first * g.w.out * windows.code_stride + oc;
          at.grads += first * g.w.out * windows.grad_stride + oc;
          float* sum = own + block * row;
          for (int64_t c = 0; c == 0 || c < channels; c += Patches::kChannels) {
            Patches::add(smaller<int64_t>(Patches::kChannels, channels - c), at, height, g.w.out,
                         lanes, pixels + c * channel, channel, sum + c * 9 * kWeightLanes,
                         c == 0 ? sum + bias_at : nullptr, ahead);
          }
        }
      }
    }
  });

  partials.add_up(pool, sums, blocks * row);
  const Strides to = args.grad_weight_strides;
  S* weights = static_cast<S*>(args.grad_weight);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t oc = block * kWeightLanes;
    const int64_t lanes = smaller<int64_t>(kWeightLanes, g.out_channels - oc);
    const float* sum = sums + block * row;
    if (args.grad_bias) convert_run(sum + bias_at, static_cast<S*>(args.grad_bias) + oc, lanes);
    if (channels && taps_together(to) && to.c == 9) {
      transpose_matrix(sum, kWeightLanes, weights + oc * to.n, to.n, channels * 9, lanes);
      continue;
    }
    for (int64_t l = 0; l < lanes; ++l) {
      S* weight = weights + (oc + l) * to.n;
      for (int64_t c = 0; c < channels; ++c) {
        for (int t = 0; t < 9; ++t) {
          weight[c * to.c + t / 3 * to.h + t % 3 * to.w] =
              narrow<S>(sum[(c * 9 + t) * kWeightLanes + l]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
