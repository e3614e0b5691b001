// Register transposes, and the way of [pixels][channels] results into the output tensors.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/simd.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Transposes `Rows` x `Rows` blocks held in `Rows` vectors, each vector divided into groups of
// `Rows` lanes: log2(Rows) rounds of swapping the two off-diagonal quarters. With Rows equal to the
// lanes this is the full transpose.
template <typename T, int Rows, int Distance = 1>
FUSEDCNN_INLINE void transpose_groups(Vector<T> (&rows)[Rows]) {
  constexpr int kN = kLanes<T>;
  if constexpr (Distance < Rows) {
    Vector<Int<T>> low, high;
    FUSEDCNN_UNROLL
    for (int i = 0; i < kN; ++i) {
      low[i] = i & Distance ? kN + (i ^ Distance) : i;
      high[i] = i & Distance ? kN + i : i ^ Distance;
    }
    FUSEDCNN_UNROLL
    for (int i = 0; i < Rows; ++i) {
      if (i & Distance) continue;
      const Vector<T> a = rows[i], b = rows[i + Distance];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + Distance] = __builtin_shuffle(a, b, high);
    }
    transpose_groups<T, Rows, Distance * 2>(rows);
  }
}

// Writes `count` pooled pixels, numbered row by row. values, codes: [count][padded channels];
// output, code (may be null): at the first pixel of channel 0. The output's rows follow each other
// without a gap, so pixels are strides.w elements apart.
template <typename S>
void write_pixels(const float* values, const uint32_t* codes, int64_t padded, int64_t count,
                  int64_t channels, S* output, uint8_t* code, Strides strides) {
  constexpr int kN = kLanes<float>;
  if (strides.w != 1 || sizeof(S) != sizeof(float)) {
    // channels_last, or a type to round to: pixel by pixel, channels innermost.
    for (int64_t p = 0; p < count; ++p, values += padded, codes += padded) {
      S* to = output + p * strides.w;
      for (int64_t c = 0; c < channels; ++c) to[c * strides.c] = narrow<S>(values[c]);
      if (!code) continue;
      uint8_t* bytes = code + p * strides.w;
      for (int64_t c = 0; c < channels; ++c) bytes[c * strides.c] = static_cast<uint8_t>(codes[c]);
    }
    return;
  }
  // Contiguous: the run's pixels lie side by side in each channel's plane.
  for (int64_t c = 0; c < channels; c += kN) {
    const int64_t lanes = smaller<int64_t>(kN, channels - c);
    for (int64_t p = 0; p < count; p += kN) {
      const int64_t pixels = smaller<int64_t>(kN, count - p);
      Vector<float> block[kN];
      FUSEDCNN_UNROLL
      for (int r = 0; r < kN; ++r) block[r] = load(values + (p + r) * padded + c);
      transpose_groups<float, kN>(block);
      for (int64_t l = 0; l < lanes; ++l) {
        float* to = reinterpret_cast<float*>(output) + (c + l) * strides.c + p;
        if (pixels == kN) {
          store(to, block[l]);
        } else {
          memcpy(to, &block[l], pixels * sizeof(float));
        }
      }
      if (!code) continue;
      // Four pixels' codes share a lane's four bytes; then groups of four lanes are transposed, so
      // that every channel's codes lie together.
      constexpr int kQuads = kN / 4;
      Vector<uint32_t> quads[kQuads];
      FUSEDCNN_UNROLL
      for (int r = 0; r < kQuads; ++r) {
        const uint32_t* from = codes + (p + 4 * r) * padded + c;
        quads[r] = load(from) | load(from + padded) << 8 | load(from + 2 * padded) << 16 |
                   load(from + 3 * padded) << 24;
      }
      transpose_groups<uint32_t, kQuads>(quads);
      const uint8_t* bytes = reinterpret_cast<const uint8_t*>(quads);
      for (int64_t l = 0; l < lanes; ++l) {
        const uint8_t* from = bytes + l % kQuads * kVectorBytes + l / kQuads * kN;
        memcpy(code + (c + l) * strides.c + p, from, pixels);
      }
    }
  }
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
