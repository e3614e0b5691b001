// The bfloat16 dot products of AMX and avx512_bf16 in AVX-512's float32 arithmetic, as
// Intel's manual defines them:
// for tests on machines that lack them, and for the test that compares them where they exist.
//
// Sums are rounded to nearest even at every step; denormal operands and results become zeros of
// their sign. No exception flags, and the thread's rounding mode does not matter.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/kernels/simd.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

FUSEDCNN_INLINE __m512 flushed(__m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __mmask16 small = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0x7f800000));
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000));
  return _mm512_castsi512_ps(_mm512_mask_and_epi32(bits, small, bits, sign));
}

// c + a * b of 16 lanes; a and b bfloat16 numbers in the upper halves.
FUSEDCNN_INLINE __m512 bfloat16_fma(__m512i a, __m512i b, __m512 c) {
  return flushed(_mm512_fmadd_ps(flushed(_mm512_castsi512_ps(a)), flushed(_mm512_castsi512_ps(b)),
                                 flushed(c)));
}

// The even and the odd elements of pairs, in the upper halves.
FUSEDCNN_INLINE __m512i even_of(__m512i pairs) { return _mm512_slli_epi32(pairs, 16); }
FUSEDCNN_INLINE __m512i odd_of(__m512i pairs) {
  return _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
}

// TDPBF16PS. a: [16] rows of `depth`, `a_pitch` apart; b: [depth / 2][16][2]; c: [16] rows of 16
// floats. The even and the odd products of an element are summed apart.
inline void emulated_tdpbf16ps(int depth, const uint16_t* a, int64_t a_pitch, const uint16_t* b,
                               float* c, int64_t c_pitch) {
  for (int m = 0; m < 16; ++m, a += a_pitch, c += c_pitch) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int k = 0; k < depth; k += 2) {
      int32_t pair;
      memcpy(&pair, a + k, sizeof pair);
      const __m512i left = _mm512_set1_epi32(pair), right = _mm512_loadu_si512(b + k * 16);
      even = bfloat16_fma(even_of(left), even_of(right), even);
      odd = bfloat16_fma(odd_of(left), odd_of(right), odd);
    }
    const __m512 sum = flushed(_mm512_add_ps(even, odd));
    _mm512_storeu_ps(c, flushed(_mm512_add_ps(flushed(_mm512_loadu_ps(c)), sum)));
  }
}

// VDPBF16PS. a, b: 16 pairs. The odd products go first.
inline __m512 emulated_vdpbf16ps(__m512 c, __m512i a, __m512i b) {
  return bfloat16_fma(even_of(a), even_of(b), bfloat16_fma(odd_of(a), odd_of(b), c));
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
