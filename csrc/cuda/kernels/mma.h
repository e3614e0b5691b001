// What the kernels on tensor cores share. The forward's and grad_input's hold their operands in
// shared memory as 32-bit words, the registers of a matrix instruction: a tf32 number, or two
// halves that are neighbours along K.
#pragma once

#include <cstring>

#include "cuda/device.h"
#include "cuda/kernel.h"

namespace fusedcnn::cuda {
namespace {

// Whether matrix instructions exist, on the GPU and in the code for it.
inline const char* why_not_sm_80(const Device& device) {
  if (device.capability < 80) return "the GPU is older than sm_80";
  return device.code < 80 ? "compiled for GPUs older than sm_80" : nullptr;
}

template <typename S>
constexpr int kPerWord = static_cast<int>(4 / sizeof(S));  // channels in a word

FUSEDCNN_DEVICE float float_from(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <typename S>
FUSEDCNN_DEVICE uint32_t two_halves(S low, S high) {
  return low.bits | static_cast<uint32_t>(high.bits) << 16;
}

// d += a b in the instruction of a storage type: K = 8 in tf32, 16 in the half formats.
FUSEDCNN_DEVICE void multiply(float, float (&d)[4], const uint32_t (&a)[4],
                              const uint32_t (&b)[2]) {
  mma_tf32_k8(d, a, b, d);
}
FUSEDCNN_DEVICE void multiply(BFloat16, float (&d)[4], const uint32_t (&a)[4],
                              const uint32_t (&b)[2]) {
  mma_bfloat16_k16(d, a, b, d);
}
FUSEDCNN_DEVICE void multiply(Float16, float (&d)[4], const uint32_t (&a)[4],
                              const uint32_t (&b)[2]) {
  mma_float16_k16(d, a, b, d);
}

}  // namespace
}  // namespace fusedcnn::cuda
