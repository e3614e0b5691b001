// Everything of CUDA that a kernel may use: thread indices, barriers, warp shuffles, shared memory,
// asynchronous copies, matrix instructions, conversions, and the launch. Kernels hold no other
// CUDA, so that the same sources also run on a CPU, where tests/cuda_on_cpu implements this header:
// threads become fibers, and every barrier, shuffle and shared-memory access is checked.
//
// Rules for kernels:
//   - Shared memory only through SharedMemory and Shared<T>; never the same array as two types.
//   - No return before a barrier; collectives with all 32 lanes, in uniform control flow; no
//     assumption that a warp runs in step: sync_warp() where its lanes share memory.
//   - Sums across blocks in two stages, through the workspace; no atomics on floats.
//   - Block sizes are multiples of 32. C++17, no extended lambdas.
#pragma once

#include <cstdint>

namespace fusedcnn::cuda {

// Storage types of the half formats; arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type that sums of storage type S are taken in.
template <typename S>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <typename S>
using Accumulator = typename AccumulatorOf<S>::Type;

constexpr int kWarp = 32;
// Every array in shared memory begins at a multiple of this many bytes.
constexpr int64_t kSharedAlignment = 16;

// Bytes that an array of `count` elements takes of a launch's shared memory.
template <typename T>
constexpr int64_t shared_bytes(int64_t count) {
  return (count * static_cast<int64_t>(sizeof(T)) + kSharedAlignment - 1) / kSharedAlignment *
         kSharedAlignment;
}

}  // namespace fusedcnn::cuda

#if defined(FUSEDCNN_CUDA_ON_CPU)
#include "cuda_on_cpu/device_on_cpu.h"
#else
#include "cuda/device_nvcc.h"
#endif
