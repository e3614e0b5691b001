// From the operators' arguments to a backend's: what the CPU and the CUDA operator have in common.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "core/arguments.h"

namespace fusedcnn {

// Checks the forward's arguments against each other. Throws std::runtime_error.
Geometry check_forward(const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                       const std::optional<torch::stable::Tensor>& bias,
                       const std::vector<int64_t>& packed);

// What selection sees of a call; input: its strides.
Problem problem_of(const Geometry& g, DataType type, bool wide_code, const Strides& input);

struct ForwardCall {
  ForwardArgs args;
  torch::stable::Tensor output;  // [N, OC, OH, OW]
  torch::stable::Tensor code;    // of the same shape, or of shape [0] when it is not wanted
};

// Allocates the results of arguments that check_forward has accepted.
ForwardCall forward_call(const Geometry& g, const torch::stable::Tensor& input,
                         const torch::stable::Tensor& weight,
                         const std::optional<torch::stable::Tensor>& bias, bool with_code);

struct BackwardCall {
  BackwardArgs args;  // without the gradients, which differ from pass to pass
  bool want_input, want_weight, want_bias;
  // Of shape [0] where they are not wanted.
  torch::stable::Tensor grad_input, grad_weight, grad_bias;

  // With the gradients of grad_weight kernels, or of grad_input kernels.
  BackwardArgs weight_args() const;
  BackwardArgs input_args() const;

  // Which kernels have work. An empty batch still has gradients of zero for weight and bias.
  bool run_grad_weight() const { return want_weight || want_bias; }
  bool run_grad_input() const { return want_input && args.geometry.batch > 0; }
};

// Checks the backward's arguments and allocates its results. `output_mask` holds one bit for each
// of input, weight and bias, lowest first. Throws std::runtime_error.
BackwardCall backward_call(const torch::stable::Tensor& grad_output,
                           const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                           const torch::stable::Tensor& code, const std::vector<int64_t>& packed,
                           int64_t output_mask);

}  // namespace fusedcnn
