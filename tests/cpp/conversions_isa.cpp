// The conversions of csrc/cpu/kernels/simd.h, compiled once per ISA like the kernels themselves.
#include "conversions_isa.h"

#include "cpu/kernels/simd.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

template <typename Storage>
void widen_all(const uint16_t* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(Storage{from[i]});
}

template <typename Storage>
void narrow_all(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = narrow<Storage>(from[i]).bits;
}

}  // namespace

selftest::Conversions conversions();

selftest::Conversions conversions() {
  return {widen_all<BFloat16>, narrow_all<BFloat16>, widen_all<Float16>, narrow_all<Float16>};
}

}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
