// What the passes of a block with batch normalisation share: runs of channels as vectors, and
// pooled rows with a pixel's channels side by side.
#pragma once

#include "cpu/batch_norm_passes.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/storage_lanes.h"
#include "cpu/kernels/transpose.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// body(N, first channel) for blocks of N channels that do not overlap: the widest vectors that
// there are first, single channels last.
template <typename T, typename Body>
FUSEDCNN_INLINE void for_channels(int64_t channels, const Body& body) {
  constexpr int kWide = kLanes<T>, kLeast = 16 / sizeof(T);
  int64_t c = 0;
  for (; c + kWide <= channels; c += kWide) body(std::integral_constant<int, kWide>{}, c);
  if constexpr (kLeast < kWide) {
    for (; c + kLeast <= channels; c += kLeast) body(std::integral_constant<int, kLeast>{}, c);
  }
  for (; c < channels; ++c) body(std::integral_constant<int, 1>{}, c);
}

template <typename E, int N>
using LaneVector = typename Lanes<E, N>::Type;

// N stored values as what they are computed in.
template <int N, typename S>
FUSEDCNN_INLINE LaneVector<Accumulator<S>, N> load_values(const S* from) {
  using T = Accumulator<S>;
  if constexpr (std::is_same_v<S, T>) {
    return *reinterpret_cast<const typename Lanes<T, N>::Unaligned*>(from);
  } else if constexpr (N == kLanes<T>) {
    return widen_vector(from);
  } else {
    LaneVector<T, N> values = {};
    for (int l = 0; l < N; ++l) values[l] = widen(from[l]);
    return values;
  }
}

template <int N, typename S>
FUSEDCNN_INLINE void store_values(S* to, LaneVector<Accumulator<S>, N> values) {
  using T = Accumulator<S>;
  if constexpr (std::is_same_v<S, T>) {
    *reinterpret_cast<typename Lanes<T, N>::Unaligned*>(to) = values;
  } else if constexpr (N == kLanes<T>) {
    narrow_vector(values, to);
  } else {
    for (int l = 0; l < N; ++l) to[l] = narrow<S>(values[l]);
  }
}

template <typename T, int N>
FUSEDCNN_INLINE LaneVector<T, N> splat(T value) {
  return value - LaneVector<T, N>{};
}

// N codes as integers of a value's width.
template <typename T, int N, typename C>
FUSEDCNN_INLINE LaneVector<Int<T>, N> load_codes(const C* from) {
#if defined(__AVX512F__)
  // Compilers take a conversion of bytes apart, lane by lane.
  if constexpr (sizeof(C) == 1 && sizeof(T) == 4 && N == 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (LaneVector<Int<T>, N>)_mm512_cvtepu8_epi32(bytes);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(C) == 1 && sizeof(T) == 4 && N == 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return (LaneVector<Int<T>, N>)_mm256_cvtepu8_epi32(bytes);
  }
#endif
  LaneVector<C, N> codes;
  memcpy(&codes, from, sizeof codes);
  return __builtin_convertvector(codes, LaneVector<Int<T>, N>);
}

template <typename T, int N, typename C>
FUSEDCNN_INLINE void store_codes(C* to, LaneVector<Int<T>, N> codes) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 1 && sizeof(T) == 4 && N == 16) {
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)codes));
  }
#endif
  const auto stored = __builtin_convertvector(codes, LaneVector<C, N>);
  memcpy(to, &stored, sizeof stored);
}

template <typename T, typename C>
constexpr Int<T> kOffLane = static_cast<Int<T>>(kOff<C>);

// An element's bits, which transposing copies move.
template <typename E>
using Moved = std::conditional_t<sizeof(E) == 2, int16_t, E>;

// Pooled pixels, numbered row by row, with their channels side by side.
template <typename E>
struct Pixels {
  const E* data;
  int64_t stride;  // from pixel to pixel
};

// Pooled rows [begin, end) of an image: as they lie, or laid out in `to`, [pixels][OC].
template <typename E>
Pixels<E> pixels_of(const Geometry& g, const void* image, const Strides& s, int64_t begin,
                    int64_t end, E* to) {
  const E* from = static_cast<const E*>(image) + begin * s.h;
  const int64_t channels = g.out_channels, count = (end - begin) * g.w.out;
  if ((s.c == 1 || channels == 1) && (s.h == g.w.out * s.w || end - begin == 1)) {
    return {from, s.w};
  }
  if (s.w == 1 && s.h == g.w.out) {
    transpose_matrix(reinterpret_cast<const Moved<E>*>(from), s.c, reinterpret_cast<Moved<E>*>(to),
                     channels, channels, count);
    return {to, channels};
  }
  E* at = to;
  for (int64_t h = begin; h < end; ++h, from += s.h) {
    for (int64_t w = 0; w < g.w.out; ++w, at += channels) {
      for (int64_t c = 0; c < channels; ++c) at[c] = from[w * s.w + c * s.c];
    }
  }
  return {to, channels};
}

// Pooled rows whose values, of `bytes` each with all that belongs to them, stay in L1 or nearly so.
inline int64_t rows_at_a_time(const Geometry& g, int64_t bytes) {
  constexpr int64_t kBytes = 32 << 10;
  return larger<int64_t>(1, kBytes / (g.w.out * g.out_channels * bytes));
}

// body(S{}, C{}) with the types of stored values and codes.
template <typename Body>
void for_types(const NormShape& shape, const Body& body) {
  for_storage(shape.type, [&]<typename S>(S value) {
    shape.wide_code ? body(value, int32_t{}) : body(value, uint8_t{});
  });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
