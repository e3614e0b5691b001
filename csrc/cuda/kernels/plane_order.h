// Pooled gradients and codes in the order of a channels_last plane, for the passes around the stock
// convolution.
//
// A pooled output of a half type is 3 bytes in and 3 out; the plane's gradient that is made of it
// under a window of 2x2 is 8.
#pragma once

#include "cuda/kernel.h"
#include "cuda/transpose.h"

namespace fusedcnn::cuda {
namespace {

inline int64_t pooled_bytes(const Geometry& g, int64_t element) {
  const int64_t bytes = g.batch * g.out_channels * g.h.out * g.w.out * element;
  return (bytes + 255) / 256 * 256;
}
inline int64_t code_bytes(bool wide_code) { return wide_code ? 4 : 1; }
// Bytes that `in_plane_order` may work in.
inline int64_t plane_order_bytes(const Geometry& g, DataType type, bool wide_code) {
  return pooled_bytes(g, element_size(type)) + pooled_bytes(g, code_bytes(wide_code));
}

// The arguments with the gradients of pooled outputs and their codes in the plane's order: those
// that are not are copied into the workspace, in a launch for each. Planes of channels take any.
inline BackwardArgs in_plane_order(const BackwardArgs& args, const Execution& execution) {
  BackwardArgs result = args;
  if (!args.plane_channels_last) return result;
  const Geometry& g = args.geometry;
  const int64_t row = g.w.out * g.out_channels;
  const Strides dense{g.h.out * row, 1, row, g.out_channels};
  char* const memory = static_cast<char*>(execution.workspace);
  const auto move = [&](int64_t element, const void* from, const Strides& strides, void* to) {
    transpose({element, g.batch, g.out_channels, g.h.out, g.w.out, from, strides, to}, execution);
  };
  if (args.grad_output_strides.c != 1) {
    move(element_size(args.type), args.grad_output, args.grad_output_strides, memory);
    result.grad_output = memory;
    result.grad_output_strides = dense;
  }
  if (args.code_strides.c != 1) {
    char* const codes = memory + pooled_bytes(g, element_size(args.type));
    move(code_bytes(args.wide_code), args.code, args.code_strides, codes);
    result.code = codes;
    result.code_strides = dense;
  }
  return result;
}

}  // namespace
}  // namespace fusedcnn::cuda
