// From the arguments of the operators with a batch normalisation to a backend's: what the CPU and
// the CUDA operator have in common. See core/batch_norm.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "core/batch_norm.h"

namespace fusedcnn {

struct NormForwardCall {
  NormForwardArgs args;
  torch::stable::Tensor output;    // [N, OC, OH, OW]
  torch::stable::Tensor code;      // of the same shape, or of shape [0] when it is not wanted
  torch::stable::Tensor extremum;  // as the code
  torch::stable::Tensor mean;      // [OC]
  torch::stable::Tensor var;       // [OC]

  // An empty batch has nothing to compute: mean and var are NaN already.
  bool run() const { return args.block.geometry.batch > 0; }
};

// Checks the forward's arguments and allocates its results. Throws std::runtime_error.
NormForwardCall norm_forward_call(const torch::stable::Tensor& input,
                                  const torch::stable::Tensor& weight,
                                  const std::optional<torch::stable::Tensor>& bias,
                                  const std::optional<torch::stable::Tensor>& bn_weight,
                                  const std::optional<torch::stable::Tensor>& bn_bias,
                                  const std::vector<int64_t>& packed, double eps, bool with_code);

struct NormBackwardCall {
  NormBackwardArgs args;
  bool want_input, want_weight, want_affine;
  // Of shape [0] where they are not wanted.
  torch::stable::Tensor grad_input, grad_weight, grad_bn_weight, grad_bn_bias;

  // An empty batch has nothing to compute: its gradients are zero already.
  bool run() const {
    return args.block.geometry.batch > 0 && (want_input || want_weight || want_affine);
  }
};

// Checks the backward's arguments and allocates its results. `output_mask` holds one bit for input,
// one for weight, and one for bn_weight and bn_bias, lowest first. Throws std::runtime_error.
NormBackwardCall norm_backward_call(
    const torch::stable::Tensor& grad_output, const torch::stable::Tensor& input,
    const torch::stable::Tensor& weight, const std::optional<torch::stable::Tensor>& bn_weight,
    const torch::stable::Tensor& code, const torch::stable::Tensor& extremum,
    const torch::stable::Tensor& mean, const torch::stable::Tensor& var,
    const std::vector<int64_t>& packed, double eps, int64_t output_mask);

}  // namespace fusedcnn
