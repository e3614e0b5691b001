// A block with batch normalisation around the stock convolution, on CUDA: see core/batch_norm.h.
// Neither is of a pass that selection chooses for: there is one of each.
#pragma once

#include "core/batch_norm.h"
#include "cuda/kernel.h"

namespace fusedcnn::cuda {

// Both read args.block.plane, the convolution's output without its bias, for an input and a weight,
// which may be null. Neither has anything to do for an empty batch. They only launch. All sums have
// an order of their own, whatever the device.

// Fills output, code, extremum, mean and var. Three launches.
void batch_norm_forward(const NormForwardArgs& args, const Execution& execution);
// Bytes of the execution's workspace.
int64_t batch_norm_forward_workspace(const NormForwardArgs& args);

// Fills grad_bn_weight and grad_bn_bias, and replaces the plane by its gradient unless it is null.
// Three launches, or two; and one each for gradients and codes that are not in the plane's order.
void batch_norm_backward(const NormBackwardArgs& args, const Execution& execution);
int64_t batch_norm_backward_workspace(const NormBackwardArgs& args);

}  // namespace fusedcnn::cuda
