// What every backend's kernels are called with, and what selection may look at. Torch-free: raw
// pointers and sizes.
#pragma once

#include <cstdint>

#include "core/geometry.h"

namespace fusedcnn {

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
};

// What selection may look at: enough to decide, nothing that changes from call to call.
struct Problem {
  Geometry geometry;
  DataType type;
  bool wide_code;
  bool channels_last = false;  // the channels of one of input's pixels lie side by side
};

enum class Pass : int { kForward, kGradWeight, kGradInput };

constexpr const char* name(Pass pass) {
  return pass == Pass::kForward      ? "forward"
         : pass == Pass::kGradWeight ? "grad_weight"
                                     : "grad_input";
}

}  // namespace fusedcnn
