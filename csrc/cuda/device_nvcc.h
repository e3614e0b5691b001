// The body of device.h under nvcc: the only file with intrinsics, PTX and __CUDA_ARCH__.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.h"

#define FUSEDCNN_KERNEL(threads) __global__ void __launch_bounds__(threads)
// With as few registers as it takes for `blocks` blocks to share a multiprocessor.
#define FUSEDCNN_KERNEL_RESIDENT(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define FUSEDCNN_DEVICE __device__ __forceinline__
#define FUSEDCNN_UNROLL _Pragma("unroll")
#define FUSEDCNN_NO_UNROLL _Pragma("unroll 1")

namespace fusedcnn::cuda {

// ---- threads ------------------------------------------------------------------------------------

FUSEDCNN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
// The same, of which the compiler does not know that it never changes: what follows from it is
// computed where it is used, and takes no registers in between.
FUSEDCNN_DEVICE int fresh_thread_index() {
  int index = thread_index();
  asm volatile("" : "+r"(index));
  return index;
}
FUSEDCNN_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
FUSEDCNN_DEVICE int64_t block_index() { return blockIdx.x; }
FUSEDCNN_DEVICE int64_t grid_blocks() { return gridDim.x; }

FUSEDCNN_DEVICE void sync_threads() { __syncthreads(); }
FUSEDCNN_DEVICE void sync_warp() { __syncwarp(); }

// The value that lane `lane` (or this lane's number xor `mask`) hands in.
template <typename T>
FUSEDCNN_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <typename T>
FUSEDCNN_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// One bit per lane, lowest first.
FUSEDCNN_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
FUSEDCNN_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }

// ---- shared memory ------------------------------------------------------------------------------

template <typename T>
using Shared = T*;

// Hands out the block's shared memory, array by array; every thread asks for the same arrays in the
// same order. The launch's `shared` bytes are the sum of their shared_bytes().
class SharedMemory {
 public:
  template <typename T>
  FUSEDCNN_DEVICE Shared<T> array(int64_t count) {
    extern __shared__ __align__(16) unsigned char memory[];
    T* const begin = reinterpret_cast<T*>(memory + used_);
    used_ += shared_bytes<T>(count);
    return begin;
  }

 private:
  int64_t used_ = 0;
};

// N neighbouring elements in one access; `from` and `to` are aligned to N * sizeof(T) bytes, at
// most 16.
template <int N, typename T>
struct alignas(N * sizeof(T)) Pack {
  T values[N];
};
template <int N, typename T>
FUSEDCNN_DEVICE Pack<N, T> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<N, T>*>(from);
}
template <int N, typename T>
FUSEDCNN_DEVICE void store_pack(T* to, const Pack<N, T>& pack) {
  *reinterpret_cast<Pack<N, T>*>(to) = pack;
}

// ---- global memory ------------------------------------------------------------------------------

// A load of memory that no thread of the launch writes.
template <typename T>
FUSEDCNN_DEVICE T load_constant(const T* from) {
  return __ldg(from);
}
FUSEDCNN_DEVICE BFloat16 load_constant(const BFloat16* from) {
  return {__ldg(reinterpret_cast<const unsigned short*>(from))};
}
FUSEDCNN_DEVICE Float16 load_constant(const Float16* from) {
  return {__ldg(reinterpret_cast<const unsigned short*>(from))};
}

// Copies Bytes (4, 8 or 16) bytes from global to shared memory, asynchronously where the GPU can;
// both sides are aligned to as much. The last Bytes - `valid` bytes become zero and are not read.
// Complete for this thread after commit_copies() and wait_copies(), for others after a barrier.
template <int Bytes, typename T>
FUSEDCNN_DEVICE void copy_async(Shared<T> to, const T* from, int valid = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
#if __CUDA_ARCH__ >= 800
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(at), "l"(from), "n"(Bytes),
               "r"(valid)
               : "memory");
#else
  unsigned char* const bytes = reinterpret_cast<unsigned char*>(to);
  for (int i = 0; i < Bytes; i += static_cast<int>(sizeof(T))) {
    T value{};
    if (i < valid) value = from[i / sizeof(T)];
    *reinterpret_cast<T*>(bytes + i) = value;
  }
#endif
}
// Ends a group of this thread's copies.
FUSEDCNN_DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}
// Waits until at most Pending of this thread's latest groups are under way.
template <int Pending>
FUSEDCNN_DEVICE void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
#endif
}

// ---- numbers ------------------------------------------------------------------------------------

FUSEDCNN_DEVICE float widen(float value) { return value; }
FUSEDCNN_DEVICE double widen(double value) { return value; }
FUSEDCNN_DEVICE float widen(BFloat16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
FUSEDCNN_DEVICE float widen(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }

// Rounds to nearest, ties to even.
template <typename S>
FUSEDCNN_DEVICE S narrow(Accumulator<S> value) {
  return value;
}
template <>
FUSEDCNN_DEVICE BFloat16 narrow<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
FUSEDCNN_DEVICE Float16 narrow<Float16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}

FUSEDCNN_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FUSEDCNN_DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }
// The larger one; NaN where either is NaN.
FUSEDCNN_DEVICE float max_or_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float larger = 0;
  asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return a > b || a != a ? a : b;
#endif
}
// Rounded to nearest.
FUSEDCNN_DEVICE double square_root(double value) { return sqrt(value); }
template <typename T>
FUSEDCNN_DEVICE T infinity() {
  return static_cast<T>(__int_as_float(0x7f800000));
}

// Rounds to tf32 (ten bits of mantissa), nearest, ties away from zero. sm_80 and later.
FUSEDCNN_DEVICE uint32_t to_tf32(float value) {
  uint32_t bits = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(value));
#else
  __trap();
#endif
  return bits;
}

// ---- matrix instructions: a warp's d = a b + c, M = 16, N = 8 -----------------------------------
//
// Lane l holds, with g = l / 4 and t = l % 4 (rows of a and d, columns of b and d):
//   d[0..3]  rows g, g, g + 8, g + 8; columns 2t, 2t + 1, 2t, 2t + 1
//   tf32, K = 8: a[0..3] (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b[0..1] (t, g), (t + 4, g)
//   tf32, K = 4: a[0..1] (g, t), (g + 8, t); b[0] (t, g)
//   16 bits, K = 16: a[0..3] rows g, g + 8, g, g + 8 at columns 2t and 2t + 1 (a[2], a[3]: + 8);
//     b[0..1] rows 2t and 2t + 1 (b[1]: + 8) of column g; the lower half of a register comes first
//   16 bits, K = 8: a[0..1] rows g, g + 8 at columns 2t and 2t + 1; b[0] rows 2t and 2t + 1
// `d` may be `c`. tf32 and bfloat16: sm_80 and later; float16 K = 16: sm_80, K = 8: sm_75.

FUSEDCNN_DEVICE void mma_tf32_k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 const float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
#else
  __trap();
#endif
}

FUSEDCNN_DEVICE void mma_tf32_k4(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1],
                                 const float (&c)[4]) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
  __trap();
#endif
}

#define FUSEDCNN_MMA_16BIT_K16(function, type)                                                  \
  FUSEDCNN_DEVICE void function(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],  \
                                const float (&c)[4]) {                                          \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                         \
                 ".f32 "                                                                        \
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"                  \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), \
                   "f"(c[1]), "f"(c[2]), "f"(c[3]));                                            \
  }
#define FUSEDCNN_MMA_16BIT_K8(function, type)                                                    \
  FUSEDCNN_DEVICE void function(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1],   \
                                const float (&c)[4]) {                                           \
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." type "." type                           \
                 ".f32 "                                                                         \
                 "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};\n"                               \
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                \
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3])); \
  }
#define FUSEDCNN_NO_MMA(function, registers_a, registers_b)                            \
  FUSEDCNN_DEVICE void function(float (&)[4], const uint32_t (&)[registers_a],         \
                                const uint32_t (&)[registers_b], const float (&)[4]) { \
    __trap();                                                                          \
  }
#if __CUDA_ARCH__ >= 800
FUSEDCNN_MMA_16BIT_K16(mma_float16_k16, "f16")
FUSEDCNN_MMA_16BIT_K16(mma_bfloat16_k16, "bf16")
FUSEDCNN_MMA_16BIT_K8(mma_bfloat16_k8, "bf16")
#else
FUSEDCNN_NO_MMA(mma_float16_k16, 4, 2)
FUSEDCNN_NO_MMA(mma_bfloat16_k16, 4, 2)
FUSEDCNN_NO_MMA(mma_bfloat16_k8, 2, 1)
#endif
FUSEDCNN_MMA_16BIT_K8(mma_float16_k8, "f16")
#undef FUSEDCNN_MMA_16BIT_K16
#undef FUSEDCNN_MMA_16BIT_K8
#undef FUSEDCNN_NO_MMA

// Loads four 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix
// l / 8, eight elements, aligned to 16 bytes; r[i] receives elements 2t and 2t + 1 of row g of
// matrix i, or, transposed, row 2t and 2t + 1 of column g.
template <typename T>
FUSEDCNN_DEVICE void load_matrices(uint32_t (&r)[4], Shared<T> row) {
  static_assert(sizeof(T) == 2);
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
template <typename T>
FUSEDCNN_DEVICE void load_matrices_transposed(uint32_t (&r)[4], Shared<T> row) {
  static_assert(sizeof(T) == 2);
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

// ---- launch -------------------------------------------------------------------------------------

// Runs `kernel` on blocks x threads, with `shared` bytes of shared memory, on the stream, and
// throws std::runtime_error naming the kernel when it cannot be launched. The one place that
// launches.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            int64_t shared, const Execution& execution, const Arguments&... arguments) {
  // Up to 48 KiB need no permission.
  if (shared > 48 * 1024) allow_shared(name, reinterpret_cast<const void*>(kernel), shared);
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
           static_cast<size_t>(shared), static_cast<cudaStream_t>(execution.stream)>>>(
      arguments...);
  check_launch(name, cudaGetLastError(), "launching");
}

}  // namespace fusedcnn::cuda
