// The bfloat16 dot products of AMX and avx512_bf16 in plain C++, as Intel's manual defines them:
// for tests on machines that lack them, and for the test that compares them where they exist.
//
// Sums are rounded to nearest even at every step; denormal operands and results become zeros of
// their sign. No exception flags, and the thread's rounding mode does not matter.
#pragma once

#include <cstdint>

#include "cpu/kernels/simd.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

FUSEDCNN_INLINE float flushed(float value) {
  const uint32_t bits = bits_of(value);
  return bits & 0x7f800000 ? value : float_of(bits & 0x80000000);
}

FUSEDCNN_INLINE float bfloat16_fma(uint16_t a, uint16_t b, float c) {
  return flushed(
      __builtin_fmaf(flushed(widen(BFloat16{a})), flushed(widen(BFloat16{b})), flushed(c)));
}

// TDPBF16PS. a: [16] rows of `depth`, `a_pitch` apart; b: [depth / 2][16][2]; c: [16] rows of 16
// floats. The even and the odd products of an element are summed apart.
inline void emulated_tdpbf16ps(int depth, const uint16_t* a, int64_t a_pitch, const uint16_t* b,
                               float* c, int64_t c_pitch) {
  for (int m = 0; m < 16; ++m, a += a_pitch, c += c_pitch) {
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < depth / 2; ++k) {
      for (int n = 0; n < 16; ++n) {  // innermost, so that the compiler vectorises it
        even[n] = bfloat16_fma(a[2 * k], b[(k * 16 + n) * 2], even[n]);
        odd[n] = bfloat16_fma(a[2 * k + 1], b[(k * 16 + n) * 2 + 1], odd[n]);
      }
    }
    for (int n = 0; n < 16; ++n) c[n] = flushed(flushed(c[n]) + flushed(even[n] + odd[n]));
  }
}

// VDPBF16PS of one lane: the odd product goes first.
inline float emulated_vdpbf16ps(float c, const uint16_t* a, const uint16_t* b) {
  return bfloat16_fma(a[0], b[0], bfloat16_fma(a[1], b[1], c));
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
