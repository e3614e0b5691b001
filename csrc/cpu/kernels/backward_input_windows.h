// grad_input of a 3x3 convolution of stride 1 under a 2x2 pool: the gradient of one window's patch
// stays in registers.
//
// The 4x4 pixels that a window sees, 16 input channels each, are 16 registers. The window's output
// channels are taken by code: those that chose the same element add gradient x 3x3 weights to the
// same 9 registers, so that the only memory traffic is 9 aligned loads of weights for 9 FMAs. Along
// a row of windows the patch slides by two columns; below it, two rows wait for the next row.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/patches.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/windows.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

constexpr int kPatchChannels = 16;                  // one vector
constexpr int kPatchWeights = 9 * kPatchChannels;   // of one output channel

// patch[y + dy][x + dx] += gradients[oc] * weight[oc][dy][dx] over the output channels in `live`;
// (y, x) is the window element that they chose.
template <int Y, int X>
FUSEDCNN_INLINE void add_weights(Vector<float> (&patch)[4][4], uint64_t live,
                                 const float* gradients, const float* weight) {
  for (; live; live &= live - 1) {
    const int64_t oc = __builtin_ctzll(live);
    const Vector<float> g = broadcast(gradients[oc]);
    const float* w = weight + oc * kPatchWeights;
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) {
      patch[Y + t / 3][X + t % 3] += g * load(w + t * kPatchChannels);
    }
  }
}

// One call owns one row of windows and one block of 16 input channels.
// codes, grads: [windows][out_channels], `..._stride` apart; weight: [out_channels][9][16].
// done: [2][cols][16], the two rows of pixels that no later row of windows touches.
// carry: [2][cols][16], what the row above left for the two upper rows of pixels; receives what
// this one leaves to the row below. cols = 2 * windows + 2.
FUSEDCNN_NOINLINE void grad_input_row(const Windows& rows, int64_t windows, int64_t out_channels,
                                      const float* weight, float* done, float* carry) {
  const int64_t pitch = (2 * windows + 2) * kPatchChannels;
  Vector<float> patch[4][4];
  const auto finish = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int r = i / 2, c = i % 2;
      float* at = carry + r * pitch + c * kPatchChannels;
      store(done + r * pitch + c * kPatchChannels, load(at) + patch[r][c]);
      store(at, patch[r + 2][c]);
    }
    done += 2 * kPatchChannels;
    carry += 2 * kPatchChannels;
  };
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) patch[i / 4][i % 4] = Vector<float>{};
  for (int64_t q = 0; q < windows; ++q) {
    const uint8_t* codes = rows.codes + q * rows.code_stride;
    const float* gradients = rows.grads + q * rows.grad_stride;
    for (int64_t oc = 0; oc < out_channels; oc += 64) {
      const int64_t left = out_channels - oc;
      const __mmask64 some = left < 64 ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
      const __m512i code = _mm512_maskz_loadu_epi8(some, codes + oc);
      const float* g = gradients + oc;
      const float* w = weight + oc * kPatchWeights;
      const auto chose = [&](char element) {
        return _mm512_mask_cmpeq_epi8_mask(some, code, _mm512_set1_epi8(element));
      };
      add_weights<0, 0>(patch, chose(0), g, w);
      add_weights<0, 1>(patch, chose(1), g, w);
      add_weights<1, 0>(patch, chose(2), g, w);
      add_weights<1, 1>(patch, chose(3), g, w);
    }
    finish();
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      patch[i / 2][i % 2] = patch[i / 2][i % 2 + 2];
      patch[i / 2][i % 2 + 2] = Vector<float>{};
    }
  }
  finish();
}

template <typename S>
void grad_input_windows_typed(const BackwardArgs& args, const ThreadPool& pool) {
  const Geometry& g = args.geometry;
  const int64_t blocks = (g.in_channels + kPatchChannels - 1) / kPatchChannels;
  const int64_t block_size = g.out_channels * kPatchWeights;

  // [blocks][out_channels][9][16]
  float* weights =
      static_cast<float*>(scratch(Slot::kWeights, blocks * block_size * sizeof(float)));
  parallel_tasks(pool, g.out_channels, [&](int64_t oc) {
    const Strides from = args.weight_strides;
    const S* source = static_cast<const S*>(args.weight) + oc * from.n;
    for (int64_t c = 0; c < blocks * kPatchChannels; ++c) {
      float* to = weights + c / kPatchChannels * block_size + oc * kPatchWeights +
                  c % kPatchChannels;
      for (int t = 0; t < 9; ++t) {
        to[t * kPatchChannels] =
            c < g.in_channels ? widen(source[c * from.c + t / 3 * from.h + t % 3 * from.w]) : 0;
      }
    }
  });

  const int64_t cols = 2 * g.w.out + 2, pitch = cols * kPatchChannels;
  const int64_t reached = 2 * g.h.out + 2;  // rows of the padded input that some window sees
  const int64_t width =
      larger<int64_t>(0, smaller(g.w.in, cols - g.w.padding));  // and its columns
  parallel_tasks(pool, g.batch, [&](int64_t n) {
    const Windows windows = read_windows<S>(args, n);
    float* done = static_cast<float*>(scratch(Slot::kPatch, 4 * pitch * sizeof(float)));
    float* carry = done + 2 * pitch;
    for (int64_t block = 0; block < blocks; ++block) {
      const Strides strides = args.grad_input_strides;
      const int64_t first = block * kPatchChannels;
      const int64_t channels = smaller<int64_t>(kPatchChannels, g.in_channels - first);
      S* image = static_cast<S*>(args.grad_input) + n * strides.n + first * strides.c;
      // Two rows of the padded input, from row y on.
      const auto emit = [&](const float* rows, int64_t y) {
        for (int64_t r = 0; r < 2; ++r) {
          const int64_t h = y + r - g.h.padding;
          if (h < 0 || h >= g.h.in) continue;
          S* to = image + h * strides.h;
          if (width > 0) {
            write_pixels(rows + r * pitch + g.w.padding * kPatchChannels, kPatchChannels, to,
                         strides, width, channels);
          }
          clear_pixels(to + width * strides.w, strides, g.w.in - width, channels);
        }
      };
      memset(carry, 0, 2 * pitch * sizeof(float));
      for (int64_t oh = 0; oh < g.h.out; ++oh) {
        Windows row = windows;
        row.codes += oh * g.w.out * windows.code_stride;
        row.grads += oh * g.w.out * windows.grad_stride;
        grad_input_row(row, g.w.out, g.out_channels, weights + block * block_size, done, carry);
        emit(done, 2 * oh);
      }
      emit(carry, 2 * g.h.out);
      for (int64_t h = larger<int64_t>(0, reached - g.h.padding); h < g.h.in; ++h) {
        clear_pixels(image + h * strides.h, strides, g.w.in, channels);
      }
    }
  });
}

void grad_input_windows(const BackwardArgs& args, const ThreadPool& pool) {
  switch (args.type) {
    case DataType::kBFloat16: return grad_input_windows_typed<BFloat16>(args, pool);
    case DataType::kFloat16: return grad_input_windows_typed<Float16>(args, pool);
    default: return grad_input_windows_typed<float>(args, pool);
  }
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
