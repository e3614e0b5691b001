// Vectors of the ISA that this object is compiled for, as GCC/Clang vector extensions.
// Everything here has internal linkage: an inline function shared between ISA objects would be
// merged by the linker into one machine's copy.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "core/geometry.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Never wider than the ISA's registers: the compiler would split such vectors through memory.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
#endif

#define FUSEDCNN_INLINE inline __attribute__((always_inline))
#define FUSEDCNN_NOINLINE __attribute__((noinline))
// In front of the loops over a register tile: only loops unrolled early let the compiler see that
// an array of accumulators can live in registers from the start.
#define FUSEDCNN_UNROLL _Pragma("GCC unroll 36")

template <typename T>
struct VectorOf {
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  typedef T Type __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));
};

template <typename T>
using Vector = typename VectorOf<T>::Type;
template <typename T>
constexpr int kLanes = VectorOf<T>::kLanes;

// The integer of a lane's width: what comparisons yield and codes are counted in.
template <typename T>
struct IntOf;
template <>
struct IntOf<float> {
  using Type = int32_t;
};
template <>
struct IntOf<double> {
  using Type = int64_t;
};
template <>
struct IntOf<uint32_t> {
  using Type = int32_t;
};
template <typename T>
using Int = typename IntOf<T>::Type;

template <typename T>
FUSEDCNN_INLINE Vector<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::Unaligned*>(from);
}

template <typename T>
FUSEDCNN_INLINE void store(T* to, Vector<T> value) {
  *reinterpret_cast<typename VectorOf<T>::Unaligned*>(to) = value;
}

template <typename T>
FUSEDCNN_INLINE Vector<T> broadcast(T value) {
  return value - Vector<T>{};
}

// Lane l of the result is element pick(l) of `a` followed by `b`. (__builtin_shuffle, whose indices
// are a vector, is GCC's alone.)
template <typename V, typename Pick, int... Lanes>
FUSEDCNN_INLINE V shuffle(V a, V b, Pick pick, std::integer_sequence<int, Lanes...>) {
  return __builtin_shufflevector(a, b, pick(Lanes)...);
}

template <typename V, typename Pick>
FUSEDCNN_INLINE V shuffle(V a, V b, Pick pick) {
  return shuffle(a, b, pick, std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>{});
}

constexpr auto kEven = [](int l) { return 2 * l; };
constexpr auto kOdd = [](int l) { return 2 * l + 1; };

// Keeps a loaded vector in a register. GCC otherwise folds the load into every instruction that
// uses the value, which costs a load port each time.
template <typename V>
FUSEDCNN_INLINE void keep(V& value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#else
  (void)value;
#endif
}

template <typename T>
FUSEDCNN_INLINE T smaller(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
FUSEDCNN_INLINE T larger(T a, T b) {
  return a < b ? b : a;
}

// The larger of each lane; b where either is NaN. Written so that it does not wait for a comparison
// of the same operands.
FUSEDCNN_INLINE Vector<float> maximum(Vector<float> a, Vector<float> b) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vector<float>)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (Vector<float>)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

FUSEDCNN_INLINE int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// ---- storage types ------------------------------------------------------------------------------
//
// Half types are stored in 16 bits and computed in float. Both conversions are written in integer
// operations that the compiler vectorises on every ISA.

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename Storage>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <typename Storage>
using Accumulator = typename AccumulatorOf<Storage>::Type;

FUSEDCNN_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

FUSEDCNN_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FUSEDCNN_INLINE float widen(float value) { return value; }
FUSEDCNN_INLINE double widen(double value) { return value; }
FUSEDCNN_INLINE float widen(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

FUSEDCNN_INLINE float widen(Float16 value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);  // keeps subnormals whatever the thread's mode, as vectors do
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  // Exponent and mantissa in float's place; the product moves the exponent's bias from 15 to 127
  // and normalises subnormal halves on the way. Infinity and NaN get float's largest exponent.
  const float moved = float_of(magnitude << 13) * float_of(0x77800000);  // 2^112
  const uint32_t special = magnitude >= 0x7c00 ? 0x7f800000u : 0;
  return float_of(sign | bits_of(moved) | special);
#endif
}

template <typename Storage>
Storage narrow(Accumulator<Storage> value);

template <>
FUSEDCNN_INLINE float narrow<float>(float value) {
  return value;
}

template <>
FUSEDCNN_INLINE double narrow<double>(double value) {
  return value;
}

// Both round to nearest, ties to even, and keep NaN a NaN.
template <>
FUSEDCNN_INLINE BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(value != value ? 0x7fc0 : rounded)};
}

template <>
FUSEDCNN_INLINE Float16 narrow<Float16>(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  // Normal halves: move the exponent's bias from 127 to 15 and round at bit 13.
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Subnormal halves (below 2^-14): adding 0.5 lines the 10 mantissa bits up with float's last.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00 : half;  // rounds past the largest half: infinity
  half = magnitude > 0x7f800000 ? 0x7e00 : half;
  return {static_cast<uint16_t>(sign | half)};
}

// A vector of floats from or to storage. The scalar conversions define the result; where the
// machine converts a vector in one instruction, the results are the same but for a NaN's payload.
template <typename S>
FUSEDCNN_INLINE Vector<float> widen_vector(const S* from) {
  Vector<float> values = {};
  for (int l = 0; l < kLanes<float>; ++l) values[l] = widen(from[l]);
  return values;
}

template <typename S>
FUSEDCNN_INLINE void narrow_vector(Vector<float> values, S* to) {
  for (int l = 0; l < kLanes<float>; ++l) to[l] = narrow<S>(values[l]);
}

template <>
FUSEDCNN_INLINE Vector<float> widen_vector(const float* from) {
  return load(from);
}

#if defined(__AVX512F__)
template <>
FUSEDCNN_INLINE Vector<float> widen_vector(const BFloat16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (Vector<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}

template <>
FUSEDCNN_INLINE void narrow_vector(Vector<float> values, BFloat16* to) {
  const __m512i bits = (__m512i)values;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  __m512i half = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)values, (__m512)values, _CMP_UNORD_Q);
  half = _mm512_mask_mov_epi32(half, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(half));
}

template <>
FUSEDCNN_INLINE Vector<float> widen_vector(const Float16* from) {
  return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

template <>
FUSEDCNN_INLINE void narrow_vector(Vector<float> values, Float16* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
template <>
FUSEDCNN_INLINE Vector<float> widen_vector(const Float16* from) {
  return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

template <>
FUSEDCNN_INLINE void narrow_vector(Vector<float> values, Float16* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT));
}
#endif

// Calls body(S{}) with the storage type of `type`.
template <typename Body>
void for_storage(DataType type, const Body& body) {
  switch (type) {
    case DataType::kFloat32: return body(float{});
    case DataType::kFloat64: return body(double{});
    case DataType::kBFloat16: return body(BFloat16{});
    case DataType::kFloat16: return body(Float16{});
  }
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
