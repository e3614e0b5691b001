#include "ops/batch_norm_calls.h"

#include <torch/csrc/stable/ops.h>

#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>

#include "ops/calls.h"
#include "ops/checks.h"

namespace fusedcnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

ScalarType statistics_scalar(DataType type) {
  return statistics_type(type) == DataType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

void check_eps(double eps) {
  // Infinity and NaN pass, as in torch.
  if (eps <= 0) {
    std::ostringstream text;
    text << "eps: expected a positive number, got " << eps;
    throw std::runtime_error(text.str());
  }
}

void check_affine(const char* argument, const Tensor& tensor, const Tensor& input,
                  const Geometry& g) {
  const ScalarType own = input.scalar_type(), statistics = statistics_scalar(check_type(input));
  own == statistics ? check_tensor(argument, tensor, input, {own})
                    : check_tensor(argument, tensor, input, {own, statistics});
  check_shape(argument, tensor, {g.out_channels});
  check_storage(argument, tensor);
}

// Throws unless both, where there are both, have one type.
Affine affine_of(const Tensor& input, const Geometry& g, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& bias) {
  const DataType type = check_type(input);
  if (weight) check_affine("bn_weight", *weight, input, g);
  if (bias) check_affine("bn_bias", *bias, input, g);
  if (weight && bias) check_tensor("bn_bias", *bias, input, {weight->scalar_type()});
  Affine affine{statistics_type(type), nullptr, 0, nullptr, 0};
  if (weight) affine.weight = weight->const_data_ptr(), affine.weight_stride = weight->stride(0);
  if (bias) affine.bias = bias->const_data_ptr(), affine.bias_stride = bias->stride(0);
  if (weight || bias) affine.type = check_type(weight ? *weight : *bias);
  return affine;
}

void check_result_of_forward(const char* argument, const Tensor& tensor, const Tensor& input,
                             ScalarType type, const std::vector<int64_t>& sizes) {
  check_tensor(argument, tensor, input, {type});
  check_shape(argument, tensor, sizes);
  check_storage(argument, tensor);
}

}  // namespace

NormForwardCall norm_forward_call(const Tensor& input, const Tensor& weight,
                                  const std::optional<Tensor>& bias,
                                  const std::optional<Tensor>& bn_weight,
                                  const std::optional<Tensor>& bn_bias,
                                  const std::vector<int64_t>& packed, double eps, bool with_code) {
  const Geometry g = check_forward(input, weight, bias, packed);
  const Affine affine = affine_of(input, g, bn_weight, bn_bias);
  check_eps(eps);
  const ScalarType statistics = statistics_scalar(check_type(input));
  ForwardCall block = forward_call(g, input, weight, bias, with_code);
  NormForwardCall call{
      {block.args, affine, eps, nullptr, nullptr, nullptr},
      block.output,
      block.code,
      with_code ? empty_twin(block.output) : empty_vector(input, 0, input.scalar_type()),
      empty_vector(input, g.out_channels, statistics),
      empty_vector(input, g.out_channels, statistics)};
  call.args.extremum = with_code ? call.extremum.mutable_data_ptr() : nullptr;
  call.args.mean = call.mean.mutable_data_ptr();
  call.args.var = call.var.mutable_data_ptr();
  if (!call.run()) {
    for (const Tensor* of_nothing : {&call.mean, &call.var}) {
      torch::stable::fill_(*of_nothing, std::numeric_limits<double>::quiet_NaN());
    }
  }
  return call;
}

NormBackwardCall norm_backward_call(const Tensor& grad_output, const Tensor& input,
                                    const Tensor& weight, const std::optional<Tensor>& bn_weight,
                                    const Tensor& code, const Tensor& extremum, const Tensor& mean,
                                    const Tensor& var, const std::vector<int64_t>& packed,
                                    double eps, int64_t output_mask) {
  if (output_mask < 0 || output_mask > 7) {
    throw std::runtime_error(
        "output_mask: expected 0 to 7, the sum of 1 for input, 2 for weight "
        "and 4 for bn_weight and bn_bias, got " +
        std::to_string(output_mask));
  }
  const BackwardCall block =
      backward_call(grad_output, input, weight, code, packed, output_mask & 3);
  const Geometry& g = block.args.geometry;
  const Affine affine = affine_of(input, g, bn_weight, std::nullopt);
  check_eps(eps);
  const ScalarType statistics = statistics_scalar(block.args.type);
  const auto code_sizes = code.sizes();
  check_result_of_forward("extremum", extremum, input, input.scalar_type(),
                          {code_sizes.begin(), code_sizes.end()});
  check_result_of_forward("mean", mean, input, statistics, {g.out_channels});
  check_result_of_forward("var", var, input, statistics, {g.out_channels});
  if (block.want_input || block.want_weight) {  // the convolution is computed again
    check_storage("input", input);
    check_storage("weight", weight);
  }
  const bool want_affine = output_mask & 4;
  const auto empty_gradient = [&] {
    return empty_vector(input, want_affine ? g.out_channels : 0,
                        bn_weight ? bn_weight->scalar_type() : statistics);
  };
  NormBackwardCall call{{block.args, affine, eps, extremum.const_data_ptr(), strides_of(extremum),
                         mean.const_data_ptr(), mean.stride(0), var.const_data_ptr(), var.stride(0),
                         nullptr, nullptr},
                        block.want_input,
                        block.want_weight,
                        want_affine,
                        block.grad_input,
                        block.grad_weight,
                        empty_gradient(),
                        empty_gradient()};
  if (want_affine) {
    call.args.grad_bn_weight = call.grad_bn_weight.mutable_data_ptr();
    call.args.grad_bn_bias = call.grad_bn_bias.mutable_data_ptr();
  }
  if (g.batch == 0) {
    for (Tensor* gradient : {&call.grad_weight, &call.grad_bn_weight, &call.grad_bn_bias}) {
      torch::stable::zero_(*gradient);
    }
  }
  return call;
}

}  // namespace fusedcnn
