// torch's own convolution on CUDA, called below autograd, for the kernels that stand around it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "core/geometry.h"
#include "ops/cuda_session.h"

namespace fusedcnn {

// Whether torch's convolution of these is called, and leaves its output, in channels_last.
bool in_channels_last(const Session& session, const torch::stable::Tensor& input,
                      const torch::stable::Tensor& weight);

// The operands that a call reads: the convolution both, its backward weight for grad_input and
// input for grad_weight.
struct Reads {
  bool input, weight;
};

// The convolution of one call of an operator. Its operands are put into its order once, for all
// that follows.
class StockConvolution {
 public:
  StockConvolution(const Session& session, const torch::stable::Tensor& input,
                   const torch::stable::Tensor& weight, const Geometry& g, Reads reads);

  bool channels_last() const { return channels_last_; }

  // [N, OC, conv h, conv w] without the bias, dense in that order.
  torch::stable::Tensor plane() const;

  // Puts the gradients that `plane` implies into those tensors that are not null: replaces them
  // where torch computed them in their order.
  void backward(const torch::stable::Tensor& plane, torch::stable::Tensor* grad_input,
                torch::stable::Tensor* grad_weight) const;

 private:
  torch::stable::Tensor in_order(const torch::stable::Tensor& tensor) const;
  torch::stable::Tensor image_of(const torch::stable::Tensor& input, bool read) const;
  torch::stable::Tensor taps_of(const torch::stable::Tensor& weight, bool read) const;
  torch::stable::Tensor empty(const torch::stable::Tensor& like, int64_t n, int64_t c, int64_t h,
                              int64_t w) const;
  void put(torch::stable::Tensor* to, const torch::stable::Tensor& from) const;

  const Session& session_;
  const Geometry& g_;
  const bool channels_last_;
  const torch::stable::Tensor image_, taps_;
};

}  // namespace fusedcnn
