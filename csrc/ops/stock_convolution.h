// torch's own convolution, called below autograd, for the kernels that stand around it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "core/geometry.h"
#include "cpu/kernel.h"

namespace fusedcnn {

// [N, OC, conv h, conv w], the bias added, in dense channels_last memory.
torch::stable::Tensor stock_convolution(const torch::stable::Tensor& input,
                                        const torch::stable::Tensor& weight,
                                        const std::optional<torch::stable::Tensor>& bias,
                                        const Geometry& g, const cpu::ThreadPool& pool);

}  // namespace fusedcnn
