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

// Copies the gradients that `plane` implies into those tensors that are given.
void stock_convolution_backward(const torch::stable::Tensor& plane,
                                const torch::stable::Tensor& input,
                                const torch::stable::Tensor& weight, const Geometry& g,
                                const std::optional<torch::stable::Tensor>& grad_input,
                                const std::optional<torch::stable::Tensor>& grad_weight,
                                const std::optional<torch::stable::Tensor>& grad_bias,
                                const cpu::ThreadPool& pool);

}  // namespace fusedcnn
