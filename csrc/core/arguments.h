// What every backend's kernels are called with, and what selection may look at. Torch-free: raw
// pointers and sizes.
#pragma once

#include <cstdint>

#include "core/geometry.h"

namespace fusedcnn {

// Of one channel's convolution outputs, or of a part of them: how many, their mean, and the sum of
// their squared distances from it. Parts are put together in order, in double.
struct Moments {
  double count, mean, squares;
};

// Pointers are to elements of `type`, except the code's. Tensors have the sizes of the geometry:
// input [N, C, H, W], weight [OC, C/groups, KH, KW], bias [OC], output, grad_output and code
// [N, OC, OH, OW]. `wide_code`: the code's elements are int32 instead of uint8. `plane`: for
// library kernels, the stock convolution's output or its gradient, dense: [N, conv h, conv w, OC]
// where it is channels_last, as always on the CPU, otherwise [N, OC, conv h, conv w].
struct ForwardArgs {
  Geometry geometry;
  DataType type;
  bool wide_code;
  const void* input;
  Strides input_strides;
  const void* weight;
  Strides weight_strides;
  const void* bias;  // null: none
  int64_t bias_stride;
  void* output;
  void* code;  // null: not wanted
  // The code's too. Contiguous or channels_last, without gaps: what the operator allocates.
  Strides output_strides;
  const void* plane;
  bool plane_channels_last;
  // Batch normalisation's half of a forward, where relu is false: a window's maximum is the output
  // as it is, and codes are off only in windows without elements.
  bool relu = true;
  // Null, or where the kernel writes the moments of all convolution outputs, those that no window
  // sees too: [moment_slots][OC].
  Moments* moments = nullptr;
};

// Any of the three gradients may be null: not wanted. Each is overwritten, not added to.
struct BackwardArgs {
  Geometry geometry;
  DataType type;
  bool wide_code;
  const void* grad_output;
  Strides grad_output_strides;
  const void* code;
  Strides code_strides;
  const void* input;  // null allowed when grad_weight is null
  Strides input_strides;
  const void* weight;  // null allowed when grad_input is null
  Strides weight_strides;
  void* grad_input;
  Strides grad_input_strides;
  void* grad_weight;
  Strides grad_weight_strides;
  void* grad_bias;  // contiguous
  void* plane;
  bool plane_channels_last;
  // Adds to grad_weight, which is float (or double) and contiguous, instead of overwriting it; for
  // kernels that say that they can.
  bool accumulate = false;
};

// What selection may look at: enough to decide, nothing that changes from call to call.
struct Problem {
  Geometry geometry;
  DataType type;
  bool wide_code;
  bool channels_last = false;  // the channels of one of input's pixels lie side by side
  bool relu = true;            // see ForwardArgs
  bool moments = false;        // whether they are wanted
  // A convolution's own backward: the pool is 1x1, and every output has a gradient. Its code is one
  // byte of 0 with strides of 0, and grad_output [N, conv h, conv w, OC] without gaps.
  bool dense = false;
};

enum class Pass : int { kForward, kGradWeight, kGradInput };

constexpr const char* name(Pass pass) {
  return pass == Pass::kForward      ? "forward"
         : pass == Pass::kGradWeight ? "grad_weight"
                                     : "grad_input";
}

}  // namespace fusedcnn
