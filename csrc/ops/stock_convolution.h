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

// A gradient for that output: in its memory format, uninitialised.
torch::stable::Tensor empty_plane(const torch::stable::Tensor& like, const Geometry& g);

// The input's gradient that `plane` implies, into `grad_input`.
void stock_grad_input(const torch::stable::Tensor& plane, const torch::stable::Tensor& input,
                      const torch::stable::Tensor& weight, const Geometry& g,
                      const torch::stable::Tensor& grad_input, const cpu::ThreadPool& pool);

}  // namespace fusedcnn
