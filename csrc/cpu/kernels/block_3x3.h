// The 3x3 block, and one image's codes and gradients with a pixel's output channels side by side.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/channels_together.h"
#include "cpu/kernels/simd.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// A 3x3 convolution of stride 1 under a 2x2 pool of stride 2: each window sees a patch of 4x4
// input pixels, and neighbouring patches are two pixels apart.
const char* why_not_3x3_block(const Problem& problem) {
  const Geometry& g = problem.geometry;
  for (const Axis* axis : {&g.h, &g.w}) {
    if (axis->kernel != 3 || axis->stride != 1 || axis->dilation != 1) {
      return "only for kernel 3, stride 1, dilation 1";
    }
    if (axis->pool_kernel != 2 || axis->pool_stride != 2 || axis->pool_padding != 0 ||
        axis->pool_dilation != 1) {
      return "only for pool kernel 2, stride 2, padding 0, dilation 1";
    }
  }
  if (g.groups != 1) return "only for groups = 1";
  if (problem.type == DataType::kFloat64) return "not for float64";
  if (problem.wide_code) return "only for codes of one byte";
  return nullptr;
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

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
