// What the kernels on tensor cores share.
#pragma once

#include "cuda/device.h"

namespace fusedcnn::cuda {
namespace {

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
