// grad_input of a 3x3 convolution of stride 1 under a 2x2 pool: the gradient of one window's patch
// of 4x4 pixels stays in registers while the window's output channels add to it, so that the only
// memory traffic is one aligned load of weights for each FMA. Along a row of windows the patch
// slides by two columns; below it, two rows of pixels wait for the next row of windows.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/ahead.h"
#include "cpu/kernels/block_3x3.h"
#include "cpu/kernels/patches.h"
#include "cpu/kernels/simd.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// One call of `add_row` owns one row of windows, one block of input channels and up to
// kOutChannels output channels.
// rows: codes and gradients at the first window and output channel; weights: [out_channels][kSize].
// done: [2][cols][kChannels], the two rows of pixels that no later row of windows touches.
// carry: [2][cols][kChannels], what the row above left for the two upper rows of pixels; receives
// what this one leaves to the row below. cols = 2 * windows + 2.
// first: no earlier call has added its output channels to this row; `done` is overwritten.

// A register holds 16 channels of one pixel; the patch is 16 of them. Output channels are taken by
// code, so that those that chose the same element add to the same 9 registers.
struct WideBlock {
  static constexpr int kChannels = 16;
  static constexpr int kSize = 9 * kChannels;
  static constexpr int kOutChannels = 64;  // one mask of codes; 36 KB of weights, most of L1

  // weight: one output channel's, at the block's first of `channels`; to: [9][16].
  template <typename S>
  static void pack(const S* weight, Strides strides, int64_t channels, float* to) {
    for (int64_t c = 0; c < kChannels; ++c) {
      for (int t = 0; t < 9; ++t) {
        to[t * kChannels + c] =
            c < channels ? widen(weight[c * strides.c + t / 3 * strides.h + t % 3 * strides.w]) : 0;
      }
    }
  }

  // (y, x): the window element that the output channels in `chosen` chose.
  template <int Y, int X>
  static FUSEDCNN_INLINE void add_weights(__m512 (&patch)[4][4], uint64_t chosen,
                                          const float* gradients, const float* weights) {
    for (; chosen; chosen &= chosen - 1) {
      const int64_t oc = __builtin_ctzll(chosen);
      const __m512 g = _mm512_set1_ps(gradients[oc]);
      const float* w = weights + oc * kSize;
      FUSEDCNN_UNROLL
      for (int t = 0; t < 9; ++t) patch[Y + t / 3][X + t % 3] += g * load(w + t * kChannels);
    }
  }

  static FUSEDCNN_NOINLINE void add_row(const Windows& rows, int64_t windows, __mmask64 some,
                                        const float* weights, float* done, float* carry,
                                        bool first) {
    const int64_t pitch = (2 * windows + 2) * kChannels;
    __m512 patch[4][4];
    const auto finish = [&]() __attribute__((always_inline)) {
      FUSEDCNN_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int r = i / 2, c = i % 2;
        float* below = carry + r * pitch + c * kChannels;
        float* at = done + r * pitch + c * kChannels;
        store(at, load(first ? below : at) + patch[r][c]);
        store(below, first ? patch[r + 2][c] : load(below) + patch[r + 2][c]);
      }
      done += 2 * kChannels;
      carry += 2 * kChannels;
    };
    FUSEDCNN_UNROLL
    for (int i = 0; i < 16; ++i) patch[i / 4][i % 4] = _mm512_setzero_ps();
    const uint8_t* codes = rows.codes;
    const float* gradients = rows.grads;
    for (int64_t q = 0; q < windows; ++q) {
      const __m512i code = _mm512_maskz_loadu_epi8(some, codes);
      const auto chosen = [&](char element) {
        return _mm512_mask_cmpeq_epi8_mask(some, code, _mm512_set1_epi8(element));
      };
      add_weights<0, 0>(patch, chosen(0), gradients, weights);
      add_weights<0, 1>(patch, chosen(1), gradients, weights);
      add_weights<1, 0>(patch, chosen(2), gradients, weights);
      add_weights<1, 1>(patch, chosen(3), gradients, weights);
      finish();
      FUSEDCNN_UNROLL
      for (int i = 0; i < 8; ++i) {
        patch[i / 2][i % 2] = patch[i / 2][i % 2 + 2];
        patch[i / 2][i % 2 + 2] = _mm512_setzero_ps();
      }
      codes += rows.code_stride;
      gradients += rows.grad_stride;
    }
    finish();
  }
};

// For up to 4 channels a register holds a row of the patch, 4 pixels of 4 channels. Each output
// channel has its weights laid out once for every element that it may choose.
struct NarrowBlock {
  static constexpr int kChannels = 4;
  static constexpr int kRow = 4 * kChannels;
  static constexpr __mmask16 kTwoPixels = 0x00ff;
  // [code][row of the patch]: the lanes under its 3x3 taps.
  static constexpr __mmask16 kTaps[4][4] = {{0x0fff, 0x0fff, 0x0fff, 0},
                                            {0xfff0, 0xfff0, 0xfff0, 0},
                                            {0, 0x0fff, 0x0fff, 0x0fff},
                                            {0, 0xfff0, 0xfff0, 0xfff0}};
  static constexpr int kSize = 4 * 4 * kRow;
  static constexpr int kOutChannels = 32;  // 32 KB of weights, most of L1

  // to: [4 codes][4 rows][4 pixels][4 channels]
  template <typename S>
  static void pack(const S* weight, Strides strides, int64_t channels, float* to) {
    memset(to, 0, kSize * sizeof(float));
    for (int code = 0; code < 4; ++code) {
      for (int t = 0; t < 9; ++t) {
        const int row = code / 2 + t / 3, pixel = code % 2 + t % 3;
        for (int64_t c = 0; c < channels; ++c) {
          to[((code * 4 + row) * 4 + pixel) * kChannels + c] =
              widen(weight[c * strides.c + t / 3 * strides.h + t % 3 * strides.w]);
        }
      }
    }
  }

  static FUSEDCNN_NOINLINE void add_row(const Windows& rows, int64_t windows, __mmask64 some,
                                        const float* weights, float* done, float* carry,
                                        bool first) {
    const int64_t pitch = (2 * windows + 2) * kChannels;
    // Of the next window's patch, what earlier windows left in its two left columns.
    __m512 left[4];
    const auto finish = [&]() __attribute__((always_inline)) {
      FUSEDCNN_UNROLL
      for (int r = 0; r < 2; ++r) {
        float* below = carry + r * pitch;
        float* at = done + r * pitch;
        const __m512 above = _mm512_maskz_loadu_ps(kTwoPixels, first ? below : at);
        _mm512_mask_storeu_ps(at, kTwoPixels, above + left[r]);
        const __m512 old = _mm512_maskz_loadu_ps(first ? 0 : kTwoPixels, below);
        _mm512_mask_storeu_ps(below, kTwoPixels, old + left[r + 2]);
      }
      done += 2 * kChannels;
      carry += 2 * kChannels;
    };
    FUSEDCNN_UNROLL
    for (int r = 0; r < 4; ++r) left[r] = _mm512_setzero_ps();
    const uint8_t* codes = rows.codes;
    const float* gradients = rows.grads;
    for (int64_t q = 0; q < windows; ++q) {
      const __m512i code = _mm512_maskz_loadu_epi8(some, codes);
      uint64_t live = _mm512_mask_cmpneq_epi8_mask(some, code, _mm512_set1_epi8(-1));
      // Summed apart from `left`, so that windows do not wait for each other.
      __m512 patch[4];
      FUSEDCNN_UNROLL
      for (int r = 0; r < 4; ++r) patch[r] = _mm512_setzero_ps();
      for (; live; live &= live - 1) {
        const int64_t oc = __builtin_ctzll(live);
        const __m512 g = _mm512_set1_ps(gradients[oc]);
        const float* w = weights + (oc * 4 + codes[oc]) * (4 * kRow);
        FUSEDCNN_UNROLL
        for (int r = 0; r < 4; ++r) {
          // Only pixels under a tap: elsewhere an infinite gradient would meet a zero.
          patch[r] = _mm512_mask3_fmadd_ps(g, load(w + r * kRow), patch[r], kTaps[codes[oc]][r]);
        }
      }
      FUSEDCNN_UNROLL
      for (int r = 0; r < 4; ++r) left[r] += patch[r];
      finish();
      FUSEDCNN_UNROLL
      for (int r = 0; r < 4; ++r) {
        left[r] = _mm512_maskz_shuffle_f32x4(kTwoPixels, left[r], left[r], 0xee);
      }
      codes += rows.code_stride;
      gradients += rows.grad_stride;
    }
    finish();
  }
};

template <typename S, typename Block>
void grad_input_winners_3x3_typed(const BackwardArgs& args, const ThreadPool& pool) {
  constexpr int64_t kChannels = Block::kChannels;
  const Geometry& g = args.geometry;
  const int64_t blocks = (g.in_channels + kChannels - 1) / kChannels;
  const auto channels_of = [&](int64_t block) {
    return smaller(kChannels, g.in_channels - block * kChannels);
  };

  // [blocks][out_channels][kSize]
  const int64_t block_size = g.out_channels * Block::kSize;
  float* weights =
      static_cast<float*>(scratch(Slot::kWeights, blocks * block_size * sizeof(float)));
  parallel_tasks(pool, g.out_channels, [&](int64_t oc) {
    const Strides from = args.weight_strides;
    const S* weight = static_cast<const S*>(args.weight) + oc * from.n;
    for (int64_t block = 0; block < blocks; ++block) {
      Block::pack(weight + block * kChannels * from.c, from, channels_of(block),
                  weights + block * block_size + oc * Block::kSize);
    }
  });

  const int64_t cols = 2 * g.w.out + 2, pitch = cols * kChannels;
  const int64_t reached = 2 * g.h.out + 2;  // rows of the padded input that some window sees
  const int64_t width =
      larger<int64_t>(0, smaller(g.w.in, cols - g.w.padding));  // and columns of the input
  const int64_t splits = g.batch < kSmallBatch ? blocks : 1;
  parallel_tasks(pool, g.batch * splits, [&](int64_t task) {
    const int64_t n = task / splits, first = task % splits * (blocks / splits);
    const Windows windows = read_windows<S>(args, n);
    float* done = static_cast<float*>(scratch(Slot::kPatch, 4 * pitch * sizeof(float)));
    float* carry = done + 2 * pitch;
    auto ahead = BackwardAhead::of<S, uint8_t>(args, n, false, blocks * g.h.out);
    for (int64_t block = first; block < first + blocks / splits; ++block) {
      const Strides strides = args.grad_input_strides;
      const int64_t channels = channels_of(block);
      S* image = static_cast<S*>(args.grad_input) + n * strides.n + block * kChannels * strides.c;
      // Two rows of the padded input, from row y on.
      const auto emit = [&](const float* rows, int64_t y) {
        for (int64_t r = 0; r < 2; ++r) {
          const int64_t h = y + r - g.h.padding;
          if (h < 0 || h >= g.h.in) continue;
          S* to = image + h * strides.h;
          if (width > 0) {
            write_pixels(rows + r * pitch + g.w.padding * kChannels, kChannels, to, strides, width,
                         channels);
          }
          clear_pixels(to + width * strides.w, strides, g.w.in - width, channels);
        }
      };
      memset(carry, 0, 2 * pitch * sizeof(float));
      for (int64_t oh = 0; oh < g.h.out; ++oh) {
        ahead.step();
        // A row at a time, so that the weights of the output channels stay in L1 along it.
        for (int64_t oc = 0; oc < g.out_channels; oc += Block::kOutChannels) {
          const int64_t count = smaller<int64_t>(Block::kOutChannels, g.out_channels - oc);
          const __mmask64 some = ~uint64_t{0} >> (64 - count);
          Windows row = windows;
          row.codes += oh * g.w.out * windows.code_stride + oc;
          row.grads += oh * g.w.out * windows.grad_stride + oc;
          Block::add_row(row, g.w.out, some, weights + block * block_size + oc * Block::kSize, done,
                         carry, oc == 0);
        }
        emit(done, 2 * oh);
      }
      emit(carry, 2 * g.h.out);
      for (int64_t h = larger<int64_t>(0, reached - g.h.padding); h < g.h.in; ++h) {
        clear_pixels(image + h * strides.h, strides, g.w.in, channels);
      }
    }
  });
}

template <typename S>
void grad_input_winners_3x3_typed(const BackwardArgs& args, const ThreadPool& pool) {
  if (args.geometry.in_channels <= NarrowBlock::kChannels) {
    grad_input_winners_3x3_typed<S, NarrowBlock>(args, pool);
  } else {
    grad_input_winners_3x3_typed<S, WideBlock>(args, pool);
  }
}

void grad_input_winners_3x3(const BackwardArgs& args, const ThreadPool& pool) {
  for_block_storage(args.type, [&]<typename S>(S) { grad_input_winners_3x3_typed<S>(args, pool); });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
