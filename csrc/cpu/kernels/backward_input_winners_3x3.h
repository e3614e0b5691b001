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

// A register holds one pixel of a block of channels. Output channels are taken by code, so that
// those that chose the same element add to the same 9 registers; and those that chose from the
// window's left column before those from its right one, so that 4x3 pixels are enough: they slide
// along the row by one column at a time. An output channel is 9 FMAs with a load each: 6 cycles on
// Xeons, which sustain three such FMAs in two cycles, and about 8 with the search for the next
// channel and a misprediction for each element of the window.
struct WideBlock {
  static constexpr int kChannels = kLanes<float>;
  static constexpr int kSize = 9 * kChannels;
  static constexpr int kOutChannels = 64;  // one mask of codes; 18 or 36 KB of weights, most of L1

  // weight: one output channel's, at the block's first of `channels`; to: [9][kChannels].
  template <typename S>
  static void pack(const S* weight, Strides strides, int64_t channels, float* to) {
    if (taps_together(strides) && channels == kChannels) {
      return transpose_matrix(weight, strides.c, to, kChannels, kChannels, 9);
    }
    for (int64_t c = 0; c < kChannels; ++c) {
      for (int t = 0; t < 9; ++t) {
        to[t * kChannels + c] =
            c < channels ? widen(weight[c * strides.c + t / 3 * strides.h + t % 3 * strides.w]) : 0;
      }
    }
  }

  // Y: the window's row from which the output channels in `chosen` chose.
  template <int Y>
  static FUSEDCNN_INLINE void add_weights(Vector<float> (&pixels)[4][3], uint64_t chosen,
                                          const float* gradients, const float* weights) {
    for (; chosen; chosen &= chosen - 1) {
      const int64_t oc = __builtin_ctzll(chosen);
      const Vector<float> g = broadcast(gradients[oc]);
      const float* w = weights + oc * kSize;
      keep_address(w);
      FUSEDCNN_UNROLL
      for (int t = 0; t < 9; ++t) pixels[Y + t / 3][t % 3] += g * load(w + t * kChannels);
    }
  }

  static FUSEDCNN_NOINLINE void add_row(const Windows& rows, int64_t windows, int64_t out_channels,
                                        const float* weights, float* done, float* carry,
                                        bool first) {
    const int64_t pitch = (2 * windows + 2) * kChannels;
    Vector<float> pixels[4][3];
    FUSEDCNN_UNROLL
    for (int i = 0; i < 12; ++i) pixels[i / 3][i % 3] = Vector<float>{};
    const auto finish_column = [&]() __attribute__((always_inline)) {
      FUSEDCNN_UNROLL
      for (int r = 0; r < 2; ++r) {
        float* below = carry + r * pitch;
        float* at = done + r * pitch;
        store(at, load(first ? below : at) + pixels[r][0]);
        store(below, first ? pixels[r + 2][0] : load(below) + pixels[r + 2][0]);
      }
      done += kChannels;
      carry += kChannels;
      FUSEDCNN_UNROLL
      for (int r = 0; r < 4; ++r) {
        pixels[r][0] = pixels[r][1];
        pixels[r][1] = pixels[r][2];
        pixels[r][2] = Vector<float>{};
      }
    };
    const uint8_t* codes = rows.codes;
    const float* gradients = rows.grads;
    for (int64_t q = 0; q < windows; ++q) {
      const Chosen chosen(codes, out_channels);
      FUSEDCNN_UNROLL
      for (int x = 0; x < 2; ++x) {
        add_weights<0>(pixels, chosen.element[x], gradients, weights);
        add_weights<1>(pixels, chosen.element[2 + x], gradients, weights);
        finish_column();
      }
      codes += rows.code_stride;
      gradients += rows.grad_stride;
    }
    finish_column();
    finish_column();
  }
};

#if defined(__AVX512F__)
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

  static FUSEDCNN_NOINLINE void add_row(const Windows& rows, int64_t windows, int64_t out_channels,
                                        const float* weights, float* done, float* carry,
                                        bool first) {
    const __mmask64 some = ~uint64_t{0} >> (64 - out_channels);
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
#else
// For up to 4 channels a register of 8 lanes holds a pair of pixels, and the patch is 4 rows of two
// pairs. Output channels are taken by the window's row that they chose from, and each has its
// weights laid out once for each of the window's columns.
struct NarrowBlock {
  static constexpr int kChannels = 4;
  static constexpr int kPair = 2 * kChannels;
  static constexpr int kSize = 2 * 3 * 2 * kPair;
  static constexpr int kOutChannels = 64;  // one mask of codes; 24 KB of weights, most of L1
  typedef float Pair __attribute__((vector_size(kPair * sizeof(float)), may_alias));
  typedef int32_t PairMask __attribute__((vector_size(kPair * sizeof(float))));
  // [the window's column][pair]: the lanes under the taps.
  static constexpr PairMask kTaps[2][2] = {
      {{-1, -1, -1, -1, -1, -1, -1, -1}, {-1, -1, -1, -1, 0, 0, 0, 0}},
      {{0, 0, 0, 0, -1, -1, -1, -1}, {-1, -1, -1, -1, -1, -1, -1, -1}}};

  static FUSEDCNN_INLINE Pair& pair(float* at) { return *reinterpret_cast<Pair*>(at); }
  static FUSEDCNN_INLINE const Pair& pair(const float* at) {
    return *reinterpret_cast<const Pair*>(at);
  }

  // to: [2 columns of the window][3 rows][4 pixels][4 channels]
  template <typename S>
  static void pack(const S* weight, Strides strides, int64_t channels, float* to) {
    memset(to, 0, kSize * sizeof(float));
    for (int column = 0; column < 2; ++column) {
      for (int t = 0; t < 9; ++t) {
        float* pixel = to + ((column * 3 + t / 3) * 4 + column + t % 3) * kChannels;
        for (int64_t c = 0; c < channels; ++c) {
          pixel[c] = widen(weight[c * strides.c + t / 3 * strides.h + t % 3 * strides.w]);
        }
      }
    }
  }

  // Y: the window's row from which the output channels in `chosen` chose.
  template <int Y>
  static FUSEDCNN_INLINE void add_weights(Pair (&patch)[4][2], uint64_t chosen,
                                          const uint8_t* codes, const float* gradients,
                                          const float* weights) {
    for (; chosen; chosen &= chosen - 1) {
      const int64_t oc = __builtin_ctzll(chosen), column = codes[oc] & 1;
      const float* w = weights + oc * kSize + column * (kSize / 2);
      keep_address(w);
      const Pair all = gradients[oc] - Pair{};
      FUSEDCNN_UNROLL
      for (int i = 0; i < 2; ++i) {
        // Nothing where there is no tap: an infinite gradient would meet a zero.
        const Pair g = (Pair)((PairMask)all & kTaps[column][i]);
        FUSEDCNN_UNROLL
        for (int r = 0; r < 3; ++r) patch[Y + r][i] += g * pair(w + (r * 2 + i) * kPair);
      }
    }
  }

  static FUSEDCNN_NOINLINE void add_row(const Windows& rows, int64_t windows, int64_t out_channels,
                                        const float* weights, float* done, float* carry,
                                        bool first) {
    const int64_t pitch = (2 * windows + 2) * kChannels;
    // Of the next window's patch, what earlier windows left in its two left columns.
    Pair left[4];
    const auto finish = [&]() __attribute__((always_inline)) {
      FUSEDCNN_UNROLL
      for (int r = 0; r < 2; ++r) {
        float* below = carry + r * pitch;
        float* at = done + r * pitch;
        pair(at) = pair(first ? below : at) + left[r];
        pair(below) = first ? left[r + 2] : pair(below) + left[r + 2];
      }
      done += kPair;
      carry += kPair;
    };
    FUSEDCNN_UNROLL
    for (int r = 0; r < 4; ++r) left[r] = Pair{};
    const uint8_t* codes = rows.codes;
    const float* gradients = rows.grads;
    for (int64_t q = 0; q < windows; ++q) {
      const Chosen chosen(codes, out_channels);
      // Summed apart from `left`, so that windows do not wait for each other.
      Pair patch[4][2];
      FUSEDCNN_UNROLL
      for (int i = 0; i < 8; ++i) patch[i / 2][i % 2] = Pair{};
      add_weights<0>(patch, chosen.element[0] | chosen.element[1], codes, gradients, weights);
      add_weights<1>(patch, chosen.element[2] | chosen.element[3], codes, gradients, weights);
      FUSEDCNN_UNROLL
      for (int r = 0; r < 4; ++r) left[r] += patch[r][0];
      finish();
      FUSEDCNN_UNROLL
      for (int r = 0; r < 4; ++r) left[r] = patch[r][1];
      codes += rows.code_stride;
      gradients += rows.grad_stride;
    }
    finish();
  }
};
#endif

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
          Windows row = windows;
          row.codes += oh * g.w.out * windows.code_stride + oc;
          row.grads += oh * g.w.out * windows.grad_stride + oc;
          Block::add_row(row, g.w.out, count, weights + block * block_size + oc * Block::kSize,
                         done, carry, oc == 0);
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
