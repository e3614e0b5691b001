// The 3x3 block, and one image's codes and gradients with a pixel's output channels side by side.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/channels_together.h"
#include "cpu/kernels/simd.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// A 3x3 convolution of stride 1.
inline const char* why_not_3x3_convolution(const Problem& problem) {
  const Geometry& g = problem.geometry;
  for (const Axis* axis : {&g.h, &g.w}) {
    if (axis->kernel != 3 || axis->stride != 1 || axis->dilation != 1) {
      return "only for kernel 3, stride 1, dilation 1";
    }
  }
  if (g.groups != 1) return "only for groups = 1";
  if (problem.type == DataType::kFloat64) return "not for float64";
  if (problem.wide_code) return "only for codes of one byte";
  return nullptr;
}

// The same under a 2x2 pool of stride 2: each window sees a patch of 4x4 input pixels, and
// neighbouring patches are two pixels apart.
const char* why_not_3x3_block(const Problem& problem) {
  for (const Axis* axis : {&problem.geometry.h, &problem.geometry.w}) {
    if (axis->pool_kernel != 2 || axis->pool_stride != 2 || axis->pool_padding != 0 ||
        axis->pool_dilation != 1) {
      return "only for pool kernel 2, stride 2, padding 0, dilation 1";
    }
  }
  return why_not_3x3_convolution(problem);
}

// Calls body(S{}) with the storage type of a problem that why_not_3x3_block lets through.
template <typename Body>
void for_block_storage(DataType type, const Body& body) {
  switch (type) {
    case DataType::kFloat32: return body(float{});
    case DataType::kBFloat16: return body(BFloat16{});
    case DataType::kFloat16: return body(Float16{});
    case DataType::kFloat64: return;
  }
}

// Keeps an address in a register, so that the operands of FMAs need no index: on Intel's cores such
// an FMA takes two slots of the front end instead of one.
FUSEDCNN_INLINE void keep_address(const float*& address) { asm("" : "+r"(address)); }

// Whether blocks of a weight's channels are to be transposed: where the nine taps lie side by side,
// as in contiguous weights. They would need two blocks of 8 lanes.
inline bool taps_together(Strides weight) {
  return kLanes<float> == 16 && weight.w == 1 && weight.h == 3;
}

// Element q * stride + oc belongs to pooled pixel q and output channel oc.
struct Windows {
  const uint8_t* codes;
  int64_t code_stride;
  const float* grads;
  int64_t grad_stride;
};

// Image n's windows, where they are or copied into this thread's scratch.
template <typename S>
Windows read_windows(const BackwardArgs& args, int64_t n) {
  const Geometry& g = args.geometry;
  const int64_t size = g.out_channels * g.outputs();
  float* grads = static_cast<float*>(scratch(Slot::kLists, size * (sizeof(float) + 1)));
  uint8_t* codes = reinterpret_cast<uint8_t*>(grads + size);
  Windows windows;
  windows.grads =
      channels_together(g, static_cast<const S*>(args.grad_output) + n * args.grad_output_strides.n,
                        args.grad_output_strides, grads, windows.grad_stride);
  windows.codes =
      channels_together(g, static_cast<const uint8_t*>(args.code) + n * args.code_strides.n,
                        args.code_strides, codes, windows.code_stride);
  return windows;
}

#if defined(__AVX2__)
// Of up to 64 output channels of one window, those that chose each element of it: bit oc of
// element[e] is set where output channel oc chose e.
struct Chosen {
  uint64_t element[4] = {};

  FUSEDCNN_INLINE Chosen(const uint8_t* codes, int64_t count) {
#if defined(__AVX512BW__)
    const __mmask64 some = ~uint64_t{0} >> (64 - count);
    const __m512i code = _mm512_maskz_loadu_epi8(some, codes);
    FUSEDCNN_UNROLL
    for (int e = 0; e < 4; ++e) {
      element[e] = _mm512_mask_cmpeq_epi8_mask(some, code, _mm512_set1_epi8(static_cast<char>(e)));
    }
#else
    const auto add = [&](uint64_t eight, int64_t at) __attribute__((always_inline)) {
      const __m128i code = _mm_set_epi64x(-1, static_cast<int64_t>(eight));
      FUSEDCNN_UNROLL
      for (int e = 0; e < 4; ++e) {
        const __m128i same = _mm_cmpeq_epi8(code, _mm_set1_epi8(static_cast<char>(e)));
        element[e] |= static_cast<uint64_t>(_mm_movemask_epi8(same)) << at;
      }
    };
    int64_t oc = 0;
    for (; oc + 8 <= count; oc += 8) {
      uint64_t eight;
      memcpy(&eight, codes + oc, 8);
      add(eight, oc);
    }
    if (oc == count) return;
    uint64_t rest = ~uint64_t{0};
    for (int64_t i = count; i-- > oc;) rest = rest << 8 | codes[i];
    add(rest, oc);
#endif
  }
};
#endif

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
