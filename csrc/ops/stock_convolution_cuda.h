// torch's own convolution on CUDA, called below autograd, for the kernels that stand around it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "core/geometry.h"
#include "ops/convolution_call.h"

namespace fusedcnn {

struct StockConvolution {
  Convolution forward;
  ConvolutionBackward backward;
};
// libtorch_cuda's, looked up once.
const StockConvolution& cuda_convolution();

// Whether the convolution is called, and leaves its output, in channels_last. tensor_cores: whether
// they multiply operands of this type.
bool plane_in_channels_last(const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                            bool tensor_cores);

// [N, OC, conv h, conv w] without the bias, dense in that order.
torch::stable::Tensor stock_convolution(const StockConvolution& stock,
                                        const torch::stable::Tensor& input,
                                        const torch::stable::Tensor& weight, const Geometry& g,
                                        bool channels_last);

// A gradient for that output, uninitialised.
torch::stable::Tensor empty_plane(const torch::stable::Tensor& like, const Geometry& g,
                                  bool channels_last);

// Puts the gradients that `plane` implies into those tensors that are not null: replaces them where
// torch computed them in their order. Reads input for grad_weight only, weight for grad_input only.
void stock_convolution_backward(const StockConvolution& stock, const torch::stable::Tensor& plane,
                                const torch::stable::Tensor& input,
                                const torch::stable::Tensor& weight, const Geometry& g,
                                bool channels_last, torch::stable::Tensor* grad_input,
                                torch::stable::Tensor* grad_weight);

}  // namespace fusedcnn
