// The CPU implementations of the operators with batch normalisation by the batch: checks,
// allocation, call. Their schemas are in conv_relu_max_pool2d.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/batch_norm.h"
#include "cpu/codes.h"
#include "cpu/select.h"
#include "ops/batch_norm_calls.h"
#include "ops/checks.h"
#include "ops/choice.h"
#include "ops/choose.h"
#include "ops/torch_threads.h"

namespace fusedcnn {
namespace {

using torch::stable::Tensor;

// output, code, extremum [N, OC, OH, OW], the latter two of shape [0] when `with_code` is false;
// mean, var [OC].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_batch_norm_relu_max_pool2d(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& bn_weight, const std::optional<Tensor>& bn_bias,
    const std::vector<int64_t>& packed, double eps, bool with_code) {
  const NormForwardCall call =
      norm_forward_call(input, weight, bias, bn_weight, bn_bias, packed, eps, with_code);
  const Geometry& g = call.args.block.geometry;
  if (with_code && !g.places_fit_32_bits()) {
    throw std::runtime_error(
        "padding: expected a padded image of fewer than 2^32 elements where gradients are wanted");
  }
  if (call.run()) {
    with_memory([&] { cpu::norm_forward(call.args, thread_pool(g), choose); });
  }
  return {call.output, call.code, call.extremum, call.mean, call.var};
}

// grad_input, grad_weight, grad_bn_weight, grad_bn_bias; a gradient that is not wanted comes back
// with shape [0].
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_batch_norm_relu_max_pool2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& bn_weight, const Tensor& code, const Tensor& extremum,
    const Tensor& mean, const Tensor& var, const std::vector<int64_t>& packed, double eps,
    int64_t output_mask) {
  const NormBackwardCall call = norm_backward_call(grad_output, input, weight, bn_weight, code,
                                                   extremum, mean, var, packed, eps, output_mask);
  if (!cpu::codes_fit(call.args.block)) {
    throw std::runtime_error(
        "code: expected the tensor that the forward returned, got elements outside their windows");
  }
  if (call.run()) {
    const Geometry& g = call.args.block.geometry;
    NormBackwardArgs args = call.args;
    if (call.want_weight) {
      args.block.grad_weight = call.grad_weight.mutable_data_ptr();
      args.block.grad_weight_strides = strides_of(call.grad_weight);
    }
    if (call.want_input) {
      args.block.grad_input = call.grad_input.mutable_data_ptr();
      args.block.grad_input_strides = strides_of(call.grad_input);
    }
    with_memory([&] { cpu::norm_backward(args, thread_pool(g), choose); });
  }
  return {call.grad_input, call.grad_weight, call.grad_bn_weight, call.grad_bn_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedcnn, CPU, m) {
  m.impl("conv_batch_norm_relu_max_pool2d", TORCH_BOX(&conv_batch_norm_relu_max_pool2d));
  m.impl("conv_batch_norm_relu_max_pool2d_backward",
         TORCH_BOX(&conv_batch_norm_relu_max_pool2d_backward));
}

}  // namespace fusedcnn
