// The convolution's gradient for products of tiles: what each window's winner receives, and zeros.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/channels_together.h"
#include "cpu/kernels/large_windows.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/window_range.h"
#include "cpu/kernels/winners_gradient.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Gradients and codes of the pooled rows [first, last) of one image, a pixel's channels together.
struct TileWinners {
  const BackwardArgs& args;
  int64_t first = 0, last = 0;
  const uint16_t* grads;
  int64_t grad_stride;
  const uint8_t* codes;
  int64_t code_stride;

  // Those that the convolution's rows [begin, end) take part in.
  TileWinners(const BackwardArgs& args, int64_t n, int64_t begin, int64_t end) : args(args) {
    const Geometry& g = args.geometry;
    if (begin < end) pooled_range(g.h, begin, end, first, last);
    Geometry part = g;
    part.h.out = larger<int64_t>(0, last - first);
    const int64_t size = part.outputs() * g.out_channels;
    uint16_t* buffer = static_cast<uint16_t*>(scratch(Slot::kLists, size * 3));
    const Strides& gs = args.grad_output_strides;
    const Strides& cs = args.code_strides;
    grads = channels_together(
        part, static_cast<const uint16_t*>(args.grad_output) + n * gs.n + first * gs.h, gs, buffer,
        grad_stride);
    codes =
        channels_together(part, static_cast<const uint8_t*>(args.code) + n * cs.n + first * cs.h,
                          cs, reinterpret_cast<uint8_t*>(buffer + size), code_stride);
  }

  // `channels` channels from `channel` on of the rows [begin, end) of the convolution's gradient,
  // which begins at row `top` and column `left` of `to`: [rows][cols][pixel], zeros elsewhere.
  void write(int64_t begin, int64_t end, int64_t channel, int64_t channels, int64_t top,
             int64_t left, int64_t cols, int64_t pixel, uint16_t* to) const {
    const Geometry& g = args.geometry;
    if (g.h.pool_stride >= g.h.window() && g.w.pool_stride >= g.w.window()) {
      return scatter(begin, end, channel, channels, top, left, cols, pixel, to);
    }
    // Columns to the left of `to` are seen by padding alone.
    const int64_t from = larger<int64_t>(0, -left), until = smaller(g.w.conv, cols - left);
    const PooledGradient<BFloat16> pooled{reinterpret_cast<const int16_t*>(grads) + channel,
                                          grad_stride,
                                          codes + channel,
                                          code_stride,
                                          first,
                                          channels};
    winners_gradient(g, pooled, begin, end, from, until,
                     reinterpret_cast<int16_t*>(to) + (top * cols + from + left) * pixel, pixel,
                     cols * pixel);
  }

  // The same where windows do not overlap: window by window.
  void scatter(int64_t begin, int64_t end, int64_t channel, int64_t channels, int64_t top,
               int64_t left, int64_t cols, int64_t pixel, uint16_t* to) const {
    const Geometry& g = args.geometry;
    for (int64_t oh = first; oh < last; ++oh) {
      int64_t ph_begin, ph_end;
      window_range(g.h, oh, begin, end, ph_begin, ph_end);
      const int64_t y = oh * g.h.pool_stride - g.h.pool_padding - begin + top;
      for (int64_t ow = 0; ow < g.w.out; ++ow) {
        const int64_t x = ow * g.w.pool_stride - g.w.pool_padding;
        int64_t pw_begin = 0, pw_end = g.w.pool_kernel;
        // Columns to the left of `to` are seen by padding alone.
        const int64_t from = larger<int64_t>(0, -left), until = smaller(g.w.conv, cols - left);
        if (x < from || x + g.w.window() > until)
          window_range(g.w, ow, from, until, pw_begin, pw_end);
        const int64_t q = (oh - first) * g.w.out + ow;
        for (int64_t c = 0; c < channels; c += 32) {
          const int64_t count = smaller<int64_t>(32, channels - c);
          const __mmask32 some = static_cast<__mmask32>(~uint32_t{0} >> (32 - count));
          const __m512i grad =
              _mm512_maskz_loadu_epi16(some, grads + q * grad_stride + channel + c);
          const __m512i code = _mm512_cvtepu8_epi16(
              _mm256_maskz_loadu_epi8(some, codes + q * code_stride + channel + c));
          for (int64_t ph = ph_begin; ph < ph_end; ++ph) {
            uint16_t* row = to + ((y + ph * g.h.pool_dilation) * cols + x + left) * pixel + c;
            for (int64_t pw = pw_begin; pw < pw_end; ++pw) {
              const auto element = static_cast<short>(ph * g.w.pool_kernel + pw);
              const __mmask32 won = _mm512_cmpeq_epi16_mask(code, _mm512_set1_epi16(element));
              _mm512_mask_storeu_epi16(row + pw * g.w.pool_dilation * pixel, some,
                                       _mm512_maskz_mov_epi16(won, grad));
            }
          }
        }
      }
    }
  }

  // to[i] += the gradients of channels [channel, channel + 16) that are not off; to: [16].
  void add_bias(int64_t channel, float* to) const {
    const Geometry& g = args.geometry;
    const int64_t count = smaller<int64_t>(16, g.out_channels - channel);
    const __mmask16 some = static_cast<__mmask16>((1u << count) - 1);
    const int64_t pixels = (last - first) * g.w.out;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t q = 0; q < pixels; ++q) {
      const __m128i code = _mm_maskz_loadu_epi8(some, codes + q * code_stride + channel);
      const __mmask16 on = _mm_mask_cmpneq_epi8_mask(some, code, _mm_set1_epi8(-1));
      const __m256i grad = _mm256_maskz_loadu_epi16(on, grads + q * grad_stride + channel);
      sum = _mm512_add_ps(sum,
                          _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(grad), 16)));
    }
    _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum));
  }
};

const char* why_not_backward_tiles(const Problem& problem) {
  const Geometry& g = problem.geometry;
  if (problem.type != DataType::kBFloat16) return "only for bfloat16";
  if (problem.wide_code) return "only for codes of one byte";
  if (g.groups != 1) return "only for groups = 1";
  for (const Axis* axis : {&g.h, &g.w}) {
    if (axis->stride != 1) return "only for stride 1";
  }
  return nullptr;
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
