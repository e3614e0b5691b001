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
// Bytes of the patches that one pass over the output channels reads: a third of L1, beside as much
// of codes and gradients.
constexpr int64_t kPatchBytes = int64_t{16} << 10;

// What one call of the ISAs' `add` below owns: up to kChannels input channels x 9 taps x
// kWeightLanes output channels, summed over `rows` rows of `windows` windows:
//   sums[c][dy * 3 + dx][lane] += sum over q of gradient[q][lane] * patch[q][c][y + dy][x + dx],
// (y, x) being the element that the lane chose. No channels: the bias, sums[lane] +=
// gradient[q][lane]. at: at the first window and output channel, of which there are `lanes`.
// patches: [channels][size(rows, windows)].

#if defined(__AVX512BW__)
// One channel's 4x4 pixels that a window sees are one register.
struct Patches {
  // Input channels of one call: 3 x 9 accumulators, two registers of indices, the gradients and the
  // permuted pixels make 31 of 32.
  static constexpr int kChannels = 3;

  static int64_t size(int64_t rows, int64_t windows) { return rows * windows * 16; }

  // Cuts them out of a plane, two rows and columns apart: [rows][windows][4][4].
  static FUSEDCNN_NOINLINE void cut(const float* plane, int64_t cols, int64_t rows, int64_t windows,
                                    float* to) {
    for (int64_t r = 0; r < rows; ++r, plane += 2 * cols) {
      for (int64_t q = 0; q < windows; ++q, to += 16) {
        const float* from = plane + 2 * q;
        __m512 patch = _mm512_broadcast_f32x4(_mm_loadu_ps(from));
        patch = _mm512_mask_broadcast_f32x4(patch, 0x00f0, _mm_loadu_ps(from + cols));
        patch = _mm512_mask_broadcast_f32x4(patch, 0x0f00, _mm_loadu_ps(from + 2 * cols));
        patch = _mm512_mask_broadcast_f32x4(patch, 0xf000, _mm_loadu_ps(from + 3 * cols));
        _mm512_storeu_ps(to, patch);
      }
    }
  }

  static void add(int64_t channels, const Windows& at, int64_t rows, int64_t windows, int64_t lanes,
                  const float* patches, float* sums) {
    switch (channels) {
      case 0: return add_channels<0>(at, rows, windows, lanes, patches, sums);
      case 1: return add_channels<1>(at, rows, windows, lanes, patches, sums);
      case 2: return add_channels<2>(at, rows, windows, lanes, patches, sums);
      default: return add_channels<3>(at, rows, windows, lanes, patches, sums);
    }
  }

 private:
  template <int C>
  static FUSEDCNN_NOINLINE void add_channels(const Windows& at, int64_t rows, int64_t windows,
                                             int64_t lanes, const float* patches, float* sums) {
    constexpr int kSums = C == 0 ? 1 : 9 * C;
    const __mmask16 some = static_cast<__mmask16>((1u << lanes) - 1);
    const int64_t channel = size(rows, windows);
    __m512 sum[kSums];
    FUSEDCNN_UNROLL
    for (int i = 0; i < kSums; ++i) sum[i] = _mm512_setzero_ps();
    const uint8_t* codes = at.codes;
    const float* grads = at.grads;
    for (int64_t q = 0; q < rows * windows; ++q) {
      const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, codes));
      const __mmask16 live =
          _mm512_mask_cmpneq_epi32_mask(some, code, _mm512_set1_epi32(kOff<uint8_t>));
      const __m512 gradient = _mm512_maskz_loadu_ps(live, grads);
      if constexpr (C == 0) {
        sum[0] = _mm512_add_ps(sum[0], gradient);
      } else {
        // Codes 0, 1, 2, 3 are the places 0, 1, 4, 5 of a patch.
        const __m512i place = _mm512_add_epi32(code, _mm512_and_epi32(code, _mm512_set1_epi32(2)));
        FUSEDCNN_UNROLL
        for (int t = 0; t < 9; ++t) {
          const __m512i from = _mm512_add_epi32(place, _mm512_set1_epi32(t / 3 * 4 + t % 3));
          FUSEDCNN_UNROLL
          for (int c = 0; c < C; ++c) {
            const __m512 x =
                _mm512_permutexvar_ps(from, _mm512_loadu_ps(patches + c * channel + q * 16));
            // Masked, since a dead lane's pixel may be infinite.
            sum[c * 9 + t] = _mm512_mask3_fmadd_ps(x, gradient, sum[c * 9 + t], live);
          }
        }
      }
      codes += at.code_stride;
      grads += at.grad_stride;
    }
    FUSEDCNN_UNROLL
    for (int i = 0; i < kSums; ++i) {
      float* to = sums + i * kWeightLanes;
      _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[i]));
    }
  }
};
#else
// The 2x2 pixels under one tap, one for each element of the window, are one half of a register, so
// that the code is the index within both. Neighbouring taps and windows share them.
struct Patches {
  static constexpr int kChannels = 1;  // of one call: 9 accumulators of 16 registers

  static int64_t size(int64_t rows, int64_t windows) {
    return (2 * rows + 1) * (2 * windows + 1) * 4;
  }

  // [2 * rows + 1][2 * windows + 1][2][2] out of a plane.
  static FUSEDCNN_NOINLINE void cut(const float* plane, int64_t cols, int64_t rows, int64_t windows,
                                    float* to) {
    for (int64_t y = 0; y < 2 * rows + 1; ++y, plane += cols) {
      for (int64_t x = 0; x < 2 * windows + 1; ++x, to += 4) {
        const auto two = [](const float* from) {
          return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
        };
        const __m128i both = _mm_unpacklo_epi64(two(plane + x), two(plane + x + cols));
        _mm_storeu_ps(to, _mm_castsi128_ps(both));
      }
    }
  }

  static void add(int64_t channels, const Windows& at, int64_t rows, int64_t windows, int64_t lanes,
                  const float* patches, float* sums) {
    channels ? add_channels<1>(at, rows, windows, lanes, patches, sums)
             : add_channels<0>(at, rows, windows, lanes, patches, sums);
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

// Copies image n into planes [channels][rows][cols] as far as windows see it, zeros around it.
template <typename S>
void read_planes(const BackwardArgs& args, int64_t n, float* planes, int64_t rows, int64_t cols) {
  const Geometry& g = args.geometry;
  const Strides strides = args.input_strides;
  const S* image = static_cast<const S*>(args.input) + n * strides.n;
  const int64_t left = smaller(g.w.padding, cols), width = smaller(g.w.in, cols - left);
  const int64_t plane = rows * cols;
  memset(planes, 0, g.in_channels * plane * sizeof(float));
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
        convert_run(from, to, width);
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

  const int64_t rows = 2 * g.h.out + 2, cols = 2 * g.w.out + 2;
  const int64_t row_bytes =
      larger<int64_t>(channels, 1) * Patches::size(1, g.w.out) * int64_t{sizeof(float)};
  const int64_t band = larger<int64_t>(1, kPatchBytes / row_bytes);

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
    float* patches = static_cast<float*>(
        scratch(Slot::kPatch, channels * Patches::size(band, g.w.out) * sizeof(float)));
    for (int64_t n = partials.begin(partial); n < partials.begin(partial + 1); ++n) {
      const Windows windows = read_windows<S>(args, n);
      if (channels) read_planes<S>(args, n, planes, rows, cols);
      auto ahead = BackwardAhead::of<S, uint8_t>(args, n, channels > 0, g.h.out);
      for (int64_t first = 0; first < g.h.out; first += band) {
        const int64_t height = smaller(band, g.h.out - first);
        const int64_t patch = Patches::size(height, g.w.out);
        for (int64_t r = 0; r < height; ++r) ahead.step();
        for (int64_t c = 0; c < channels; ++c) {
          Patches::cut(planes + (c * rows + 2 * first) * cols, cols, height, g.w.out,
                       patches + c * patch);
        }
        for (int64_t block = begin; block < end; ++block) {
          const int64_t oc = block * kWeightLanes;
          const int64_t lanes = smaller<int64_t>(kWeightLanes, g.out_channels - oc);
          Windows at = windows;
          at.codes += first * g.w.out * windows.code_stride + oc;
          at.grads += first * g.w.out * windows.grad_stride + oc;
          float* sum = own + block * row;
          Patches::add(0, at, height, g.w.out, lanes, nullptr, sum + bias_at);
          for (int64_t c = 0; c < channels; c += Patches::kChannels) {
            Patches::add(smaller<int64_t>(Patches::kChannels, channels - c), at, height, g.w.out,
                         lanes, patches + c * patch, sum + c * 9 * kWeightLanes);
          }
        }
      }
    }
  });

  partials.add_up(pool, sums, blocks * row);
  for (int64_t oc = 0; oc < g.out_channels; ++oc) {
    const float* sum = sums + oc / kWeightLanes * row + oc % kWeightLanes;
    if (args.grad_bias) static_cast<S*>(args.grad_bias)[oc] = narrow<S>(sum[bias_at]);
    const Strides to = args.grad_weight_strides;
    S* weight = static_cast<S*>(args.grad_weight) + oc * to.n;
    for (int64_t c = 0; c < channels; ++c) {
      for (int t = 0; t < 9; ++t) {
        weight[c * to.c + t / 3 * to.h + t % 3 * to.w] = narrow<S>(sum[(c * 9 + t) * kWeightLanes]);
      }
    }
  }
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
