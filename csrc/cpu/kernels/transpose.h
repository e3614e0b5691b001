// Transposing copies between channel-major and pixel-major memory.
#pragma once

#include <type_traits>

#include "cpu/kernels/simd.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// ---- conversions between storage and accumulation types -----------------------------------------

template <typename To, typename From>
FUSEDCNN_INLINE To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (std::is_same_v<To, Accumulator<From>>) {
    return widen(value);
  } else {
    return narrow<To>(value);
  }
}

// The type that a conversion's registers hold: the wider of the two.
template <typename From, typename To>
using Wider = std::conditional_t<(sizeof(To) > sizeof(From)), To, From>;

template <typename From, typename To>
FUSEDCNN_INLINE void convert_run(const From* from, To* to, int64_t count) {
  if constexpr (std::is_same_v<To, From>) {
    memcpy(to, from, count * sizeof(To));
    return;
  }
  int64_t i = 0;
  if constexpr (std::is_same_v<To, float>) {
    for (; i + kLanes<float> <= count; i += kLanes<float>) store(to + i, widen_vector(from + i));
  } else if constexpr (std::is_same_v<From, float>) {
    for (; i + kLanes<float> <= count; i += kLanes<float>) narrow_vector(load(from + i), to + i);
  }
  for (; i < count; ++i) to[i] = convert<To>(from[i]);
}

// ---- square blocks in registers -----------------------------------------------------------------

// A block is as wide as a vector, but has at most 16 lanes: bytes use those that every ISA has.
template <typename E>
constexpr int kBlock = kLanes<E> < 16 ? kLanes<E> : 16;

template <typename E>
struct BlockOf {
  typedef E Type __attribute__((vector_size(kBlock<E> * sizeof(E))));
};
template <typename E>
using BlockRow = typename BlockOf<E>::Type;

// The first `count` of kBlock elements, the rest zero; reads no further.
template <typename E, typename From>
FUSEDCNN_INLINE BlockRow<E> load_row(const From* from, int64_t count) {
  constexpr int kN = kBlock<E>;
  BlockRow<E> row = {};
  if (count >= kN) {
    convert_run(from, reinterpret_cast<E*>(&row), kN);
    return row;
  }
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<From, E> && sizeof(E) == 4) {
    const __m512 part = _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
    return (BlockRow<E>)part;
  }
  if constexpr (std::is_same_v<From, E> && sizeof(E) == 2) {
    return (BlockRow<E>)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from);
  }
#endif
  convert_run(from, reinterpret_cast<E*>(&row), count);
  return row;
}

template <typename E, typename To>
FUSEDCNN_INLINE void store_row(To* to, BlockRow<E> row, int64_t count) {
  constexpr int kN = kBlock<E>;
  if (count >= kN) return convert_run(reinterpret_cast<const E*>(&row), to, kN);
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<To, E> && sizeof(E) == 4) {
    return _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)row);
  }
  if constexpr (std::is_same_v<To, E> && sizeof(E) == 2) {
    return _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << count) - 1), (__m256i)row);
  }
#endif
  convert_run(reinterpret_cast<const E*>(&row), to, count);
}

// to[c][r] = from[r][c], 8x8 of 4 bytes: 4x4 within the halves of registers, where a shuffle is one
// instruction, then the halves change places.
template <typename E>
FUSEDCNN_INLINE void transpose_halves(BlockRow<E> (&rows)[8]) {
  // Of two rows, in each half: the lower or upper two elements interleaved; two pairs side by side.
  constexpr auto low = [](int l) { return l / 4 * 4 + l % 4 / 2 + l % 2 * 8; };
  constexpr auto high = [](int l) { return l / 4 * 4 + l % 4 / 2 + l % 2 * 8 + 2; };
  constexpr auto low_pair = [](int l) { return l / 4 * 4 + l % 2 + l % 4 / 2 * 8; };
  constexpr auto high_pair = [](int l) { return l / 4 * 4 + l % 2 + l % 4 / 2 * 8 + 2; };
  constexpr auto low_half = [](int l) { return l % 4 + l / 4 * 8; };
  constexpr auto high_half = [](int l) { return l % 4 + l / 4 * 8 + 4; };
  BlockRow<E> quads[8];
  FUSEDCNN_UNROLL
  for (int r = 0; r < 8; r += 4) {
    const BlockRow<E> a = shuffle(rows[r], rows[r + 1], low),
                      b = shuffle(rows[r], rows[r + 1], high);
    const BlockRow<E> c = shuffle(rows[r + 2], rows[r + 3], low);
    const BlockRow<E> d = shuffle(rows[r + 2], rows[r + 3], high);
    quads[r] = shuffle(a, c, low_pair);
    quads[r + 1] = shuffle(a, c, high_pair);
    quads[r + 2] = shuffle(b, d, low_pair);
    quads[r + 3] = shuffle(b, d, high_pair);
  }
  FUSEDCNN_UNROLL
  for (int i = 0; i < 4; ++i) {
    rows[i] = shuffle(quads[i], quads[i + 4], low_half);
    rows[i + 4] = shuffle(quads[i], quads[i + 4], high_half);
  }
}

// The same, 16x16 of 2 bytes in registers of two halves: those exchange theirs first, since x86
// interleaves elements of two bytes within halves in one instruction and across them in three.
template <typename E>
FUSEDCNN_INLINE void transpose_words(BlockRow<E> (&rows)[16]) {
  constexpr auto left = [](int l) { return l % 8 + l / 8 * 16; };
  constexpr auto right = [](int l) { return l % 8 + l / 8 * 16 + 8; };
  constexpr auto low = [](int l) { return l / 8 * 8 + l % 8 / 2 + l % 2 * 16; };
  constexpr auto high = [](int l) { return l / 8 * 8 + l % 8 / 2 + l % 2 * 16 + 4; };
  BlockRow<E> next[16];
  FUSEDCNN_UNROLL
  for (int i = 0; i < 8; ++i) {
    next[i] = shuffle(rows[i], rows[i + 8], left);
    next[i + 8] = shuffle(rows[i], rows[i + 8], right);
  }
  FUSEDCNN_UNROLL
  for (int round = 0; round < 3; ++round) {
    FUSEDCNN_UNROLL
    for (int i = 0; i < 8; ++i) {
      const int from = i / 4 * 8 + i % 4, to = i / 4 * 8 + i % 4 * 2;
      rows[to] = shuffle(next[from], next[from + 4], low);
      rows[to + 1] = shuffle(next[from], next[from + 4], high);
    }
    FUSEDCNN_UNROLL
    for (int i = 0; i < 16; ++i) next[i] = rows[i];
  }
}

// to[c][r] = from[r][c]: log2(N) rounds of interleaving row i with row i + N/2. Each round rotates
// the joint index (row bits, column bits) by one bit, so that after all of them the two halves
// have changed places.
template <typename E>
FUSEDCNN_INLINE void transpose_block(BlockRow<E> (&rows)[kBlock<E>]) {
  constexpr int kN = kBlock<E>;
  if constexpr (sizeof(E) == 2 && sizeof(BlockRow<E>) == 32) return transpose_words<E>(rows);
  if constexpr (kN == 8 && sizeof(E) == 4) return transpose_halves<E>(rows);
  constexpr auto low = [](int l) { return l / 2 + l % 2 * kN; };
  constexpr auto high = [](int l) { return l / 2 + l % 2 * kN + kN / 2; };
  FUSEDCNN_UNROLL
  for (int round = 1; round < kN; round *= 2) {
    BlockRow<E> next[kN];
    FUSEDCNN_UNROLL
    for (int i = 0; i < kN / 2; ++i) {
      next[2 * i] = shuffle(rows[i], rows[i + kN / 2], low);
      next[2 * i + 1] = shuffle(rows[i], rows[i + kN / 2], high);
    }
    FUSEDCNN_UNROLL
    for (int i = 0; i < kN; ++i) rows[i] = next[i];
  }
}

#if defined(__AVX512F__)
// The same from memory, 16x16 of 4 bytes. Loads put quarters of four rows into one register, so
// that 32 shuffles within quarters are left of 64: on Intel's cores these all go through one port,
// which loads and blends do not need.
template <typename E>
FUSEDCNN_INLINE void load_transposed(const E* from, int64_t stride, BlockRow<E> (&rows)[16]) {
  const auto quarter = [&](int r, int q) __attribute__((always_inline)) {
    return _mm_loadu_ps(reinterpret_cast<const float*>(from + r * stride + 4 * q));
  };
  FUSEDCNN_UNROLL
  for (int q = 0; q < 4; ++q) {
    __m512 four[4];
    FUSEDCNN_UNROLL
    for (int r = 0; r < 4; ++r) {
      four[r] = _mm512_castps128_ps512(quarter(r, q));
      four[r] = _mm512_insertf32x4(four[r], quarter(r + 4, q), 1);
      four[r] = _mm512_insertf32x4(four[r], quarter(r + 8, q), 2);
      four[r] = _mm512_insertf32x4(four[r], quarter(r + 12, q), 3);
    }
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(four[0], four[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(four[0], four[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(four[2], four[3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(four[2], four[3]));
    rows[4 * q] = (BlockRow<E>)_mm512_unpacklo_pd(a, c);
    rows[4 * q + 1] = (BlockRow<E>)_mm512_unpackhi_pd(a, c);
    rows[4 * q + 2] = (BlockRow<E>)_mm512_unpacklo_pd(b, d);
    rows[4 * q + 3] = (BlockRow<E>)_mm512_unpackhi_pd(b, d);
  }
}
#endif

template <typename From, typename To, bool Whole>
FUSEDCNN_NOINLINE void transpose_tile(const From* from, int64_t from_stride, To* to,
                                      int64_t to_stride, int64_t rows, int64_t cols) {
  typedef Wider<From, To> E;
  constexpr int kN = kBlock<E>;
  BlockRow<E> block[kN];
  const auto read = [&]() __attribute__((always_inline)) {
#if defined(__AVX512F__)
    if constexpr (Whole && sizeof(E) == 4 && std::is_same_v<From, E>) {
      return load_transposed(from, from_stride, block);
    }
#endif
    FUSEDCNN_UNROLL
    for (int r = 0; r < kN; ++r) {
      block[r] = Whole || r < rows ? load_row<E>(from + r * from_stride, Whole ? kN : cols)
                                   : BlockRow<E>{};
    }
    transpose_block<E>(block);
  };
  read();
  FUSEDCNN_UNROLL
  for (int c = 0; c < kN; ++c) {
    if (Whole || c < cols) store_row<E>(to + c * to_stride, block[c], Whole ? kN : rows);
  }
}

// Narrower matrices than this are copied element by element: most of a block would be empty.
constexpr int64_t kNarrow = 4;

// to[c * to_stride + r] = from[r * from_stride + c], converted, for r < rows and c < cols.
template <typename From, typename To>
void transpose_matrix(const From* from, int64_t from_stride, To* to, int64_t to_stride,
                      int64_t rows, int64_t cols) {
  constexpr int kN = kBlock<Wider<From, To>>;
  if (rows <= kNarrow) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c)
        to[c * to_stride + r] = convert<To>(from[r * from_stride + c]);
    }
    return;
  }
  if (cols <= kNarrow) {
    for (int64_t c = 0; c < cols; ++c) {
      for (int64_t r = 0; r < rows; ++r)
        to[c * to_stride + r] = convert<To>(from[r * from_stride + c]);
    }
    return;
  }
  for (int64_t r = 0; r < rows; r += kN) {
    for (int64_t c = 0; c < cols; c += kN) {
      const From* source = from + r * from_stride + c;
      To* target = to + c * to_stride + r;
      if (r + kN <= rows && c + kN <= cols) {
        transpose_tile<From, To, true>(source, from_stride, target, to_stride, kN, kN);
      } else {
        transpose_tile<From, To, false>(source, from_stride, target, to_stride,
                                        smaller<int64_t>(kN, rows - r),
                                        smaller<int64_t>(kN, cols - c));
      }
    }
  }
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
