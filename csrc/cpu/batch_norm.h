// A block with batch normalisation by the batch, composed of the kernels that there are and the
// passes of batch_norm_passes.h. Torch-free.
//
// Forward: where a kernel takes the moments while it convolves and pools, it does. Otherwise, a few
// images at a time, the convolution goes into scratch memory, where a pass takes its moments and
// each window's largest value and code. When all moments are known, a pass over the pooled values
// makes the output of them. Where bn_weight is negative it is the least value that counts: there
// the weights change their sign, and so do the values in the end.
//
// Backward: sums over the pooled values come first. Then, a few images at a time, the convolution
// is computed again, its gradient put in its place, and the gradients of input and weight taken
// from that. Nothing as large as the batch's convolution output exists at any time.
//
// Working memory, beside the kernels': the plane, one image's convolution output or, where several
// are smaller than a megabyte, so many of them; for each thread one. The weights once in the
// forward; in the backward 16 times while that is less than 8 MB, otherwise once, and once more for
// each thread.
#pragma once

#include "core/batch_norm.h"
#include "cpu/kernel.h"

namespace fusedcnn::cpu {

// The kernel that is to compute a pass. Throws where none covers the problem.
using ChooseKernel = const Kernel& (*)(Pass pass, const Problem& problem);

// Batches are not empty.
void norm_forward(const NormForwardArgs& args, const ThreadPool& pool, ChooseKernel choose);

// Writes those gradients whose pointers are not null.
void norm_backward(const NormBackwardArgs& args, const ThreadPool& pool, ChooseKernel choose);

}  // namespace fusedcnn::cpu
