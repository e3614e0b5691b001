// grad_weight and grad_bias of a 3x3 convolution of stride 1 under a 2x2 pool, for few input
// channels: a vector holds 16 output channels.
//
// One input channel of the 4x4 pixels that a window sees is one register. Whatever element each of
// 16 output channels chose, the pixels under one tap of all of them are one permute of it, indexed
// by code; then one FMA adds gradient x pixel to that tap of 16 weights.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/ahead.h"
#include "cpu/kernels/block_3x3.h"
#include "cpu/kernels/partials.h"
#include "cpu/kernels/simd.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

constexpr int kWeightLanes = 16;
// Input channels of one call: 3 x 9 accumulators, two registers of indices, the gradients and the
// permuted pixels make 31 of 32.
constexpr int kWeightChannels = 3;
// Bytes of the patches that one pass over the output channels reads: a third of L1, beside as much
// of codes and gradients.
constexpr int64_t kPatchBytes = int64_t{16} << 10;

// One call owns C input channels x 9 taps x 16 output channels, summed over `windows`:
//   sums[c][dy * 3 + dx][lane] += sum over q of gradient[q][lane] * patch[q][c][y + dy][x + dx],
// (y, x) being the element that the lane chose. C = 0: the bias, sums[lane] += gradient[q][lane].
// rows: at the first window and output channel; `some`: the lanes that are output channels.
// patches: [windows][patch_stride], a channel's 4x4 pixels side by side.
template <int C>
FUSEDCNN_NOINLINE void add_windows(const Windows& rows, int64_t windows, __mmask16 some,
                                   const float* patches, int64_t patch_stride, float* sums) {
  constexpr int kSums = C == 0 ? 1 : 9 * C;
  __m512 sum[kSums];
  FUSEDCNN_UNROLL
  for (int i = 0; i < kSums; ++i) sum[i] = _mm512_setzero_ps();
  const uint8_t* codes = rows.codes;
  const float* grads = rows.grads;
  for (int64_t q = 0; q < windows; ++q) {
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
        const __m512i at = _mm512_add_epi32(place, _mm512_set1_epi32(t / 3 * 4 + t % 3));
        FUSEDCNN_UNROLL
        for (int c = 0; c < C; ++c) {
          const __m512 x = _mm512_permutexvar_ps(at, _mm512_loadu_ps(patches + c * 16));
          // Masked, since a dead lane's pixel may be infinite.
          sum[c * 9 + t] = _mm512_mask3_fmadd_ps(x, gradient, sum[c * 9 + t], live);
        }
      }
    }
    codes += rows.code_stride;
    grads += rows.grad_stride;
    patches += patch_stride;
  }
  FUSEDCNN_UNROLL
  for (int i = 0; i < kSums; ++i) {
    float* to = sums + i * kWeightLanes;
    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[i]));
  }
}

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

// Cuts one row of 4x4 patches, two columns apart, out of a plane with rows of `cols` elements;
// patches: [windows][patch_stride].
FUSEDCNN_NOINLINE void cut_patches(const float* plane, int64_t cols, int64_t windows,
                                   float* patches, int64_t patch_stride) {
  for (int64_t q = 0; q < windows; ++q, plane += 2, patches += patch_stride) {
    __m512 patch = _mm512_broadcast_f32x4(_mm_loadu_ps(plane));
    patch = _mm512_mask_broadcast_f32x4(patch, 0x00f0, _mm_loadu_ps(plane + cols));
    patch = _mm512_mask_broadcast_f32x4(patch, 0x0f00, _mm_loadu_ps(plane + 2 * cols));
    patch = _mm512_mask_broadcast_f32x4(patch, 0xf000, _mm_loadu_ps(plane + 3 * cols));
    _mm512_storeu_ps(patches, patch);
  }
}

template <typename S>
void grad_weight_winners_3x3_narrow(const BackwardArgs& args, const ThreadPool& pool) {
  const Geometry& g = args.geometry;
  const int64_t channels = args.grad_weight ? g.in_channels : 0;
  const int64_t blocks = (g.out_channels + kWeightLanes - 1) / kWeightLanes;
  // Sums of one block of output channels: [in_channels][9][16], then the bias's [16].
  const int64_t bias_at = channels * 9 * kWeightLanes, row = bias_at + kWeightLanes;
  const Partials partials(g.batch, blocks * row * sizeof(float));

  const int64_t rows = 2 * g.h.out + 2, cols = 2 * g.w.out + 2;
  const int64_t patch = channels * 16;
  const int64_t band = larger<int64_t>(
      1, kPatchBytes / (g.w.out * larger<int64_t>(patch, 1) * int64_t{sizeof(float)}));

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
    float* patches =
        static_cast<float*>(scratch(Slot::kPatch, band * g.w.out * patch * sizeof(float)));
    for (int64_t n = partials.begin(partial); n < partials.begin(partial + 1); ++n) {
      const Windows windows = read_windows<S>(args, n);
      if (channels) read_planes<S>(args, n, planes, rows, cols);
      auto ahead = BackwardAhead::of<S, uint8_t>(args, n, channels > 0, g.h.out);
      for (int64_t first = 0; first < g.h.out; first += band) {
        const int64_t height = smaller(band, g.h.out - first);
        for (int64_t r = 0; r < height; ++r) {
          ahead.step();
          for (int64_t c = 0; c < channels; ++c) {
            cut_patches(planes + (c * rows + 2 * (first + r)) * cols, cols, g.w.out,
                        patches + r * g.w.out * patch + c * 16, patch);
          }
        }
        for (int64_t block = begin; block < end; ++block) {
          const int64_t oc = block * kWeightLanes;
          const int64_t lanes = smaller<int64_t>(kWeightLanes, g.out_channels - oc);
          const __mmask16 some = static_cast<__mmask16>((1u << lanes) - 1);
          Windows at = windows;
          at.codes += first * g.w.out * windows.code_stride + oc;
          at.grads += first * g.w.out * windows.grad_stride + oc;
          const int64_t count = height * g.w.out;
          float* sum = own + block * row;
          add_windows<0>(at, count, some, nullptr, 0, sum + bias_at);
          for (int64_t c = 0; c < channels; c += kWeightChannels) {
            const float* from = patches + c * 16;
            float* weights = sum + c * 9 * kWeightLanes;
            switch (channels - c) {
              case 1: add_windows<1>(at, count, some, from, patch, weights); break;
              case 2: add_windows<2>(at, count, some, from, patch, weights); break;
              default: add_windows<kWeightChannels>(at, count, some, from, patch, weights);
            }
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
