// The convolution around which library kernels stand, in double, on the tensors of a call.
#pragma once

#include "core/arguments.h"

namespace selftest {

// Fills a plane of the call's type, in the order of args.plane_channels_last.
void stock_convolution(const fusedcnn::ForwardArgs& args, void* plane);

// Fills those gradients of `args` that are not null from args.plane.
void stock_convolution_backward(const fusedcnn::BackwardArgs& args);

}  // namespace selftest
