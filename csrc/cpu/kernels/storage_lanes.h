// Vectors of stored values, as the integers that their bits are: for what only moves and compares
// them.
#pragma once

#include <type_traits>

#include "cpu/kernels/simd.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

template <typename S>
struct BitsOf {
  using Type = int16_t;
};
template <>
struct BitsOf<float> {
  using Type = int32_t;
};
template <typename S>
using Bits = typename BitsOf<S>::Type;

template <typename E, int N>
struct Lanes {
  typedef E Type __attribute__((vector_size(N * sizeof(E))));
  typedef E Unaligned __attribute__((vector_size(N * sizeof(E)), aligned(alignof(E)), may_alias));
};

// body(first channel) for blocks of N channels; the last one begins where it ends with them, so
// that some are done twice.
template <int N, typename Body>
FUSEDCNN_INLINE void for_blocks(int64_t channels, const Body& body) {
  for (int64_t c = 0; c < channels; c += N) body(smaller<int64_t>(c, channels - N));
}

// body(N) with the widest vector that the channels fill.
template <typename E, typename Body>
FUSEDCNN_INLINE void with_lanes(int64_t channels, const Body& body) {
  constexpr int kWide = kVectorBytes / sizeof(E), kLeast = 16 / sizeof(E);
  if (channels >= kWide) {
    body(std::integral_constant<int, kWide>{});
  } else if (channels >= kLeast) {
    body(std::integral_constant<int, kLeast>{});
  } else {
    body(std::integral_constant<int, 1>{});
  }
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
