// The convolution around which library kernels stand, in double, on the tensors of a call.
#pragma once

#include "core/arguments.h"

namespace selftest {

// plane: [N, conv h, conv w, OC] of the call's type.
void stock_convolution(const fusedcnn::ForwardArgs& args, void* plane);

// Fills those gradients of `args` that are not null.
void stock_convolution_backward(const fusedcnn::BackwardArgs& args, const void* plane);

}  // namespace selftest
