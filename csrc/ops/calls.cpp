#include "ops/calls.h"

#include <stdexcept>
#include <string>

#include "ops/checks.h"

namespace fusedcnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

ScalarType code_type(const Geometry& g) {
  return g.window() > kLargestByteWindow ? ScalarType::Int : ScalarType::Byte;
}

}  // namespace

Geometry check_forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::vector<int64_t>& packed) {
  check_type(input);
  check_like_input("weight", weight, input);
  const Geometry g = check_geometry(input, weight, packed);
  if (bias) {
    check_like_input("bias", *bias, input);
    check_shape("bias", *bias, {g.out_channels});
    check_storage("bias", *bias);
  }
  check_storage("input", input);
  check_storage("weight", weight);
  return g;
}

Problem problem_of(const Geometry& g, DataType type, bool wide_code, const Strides& input) {
  return {g, type, wide_code, input.c == 1 && g.in_channels > 1};
}

ForwardCall forward_call(const Geometry& g, const Tensor& input, const Tensor& weight,
                         const std::optional<Tensor>& bias, bool with_code) {
  const bool batched = input.dim() == 4;
  const bool channels_last = batched && (is_channels_last(input) || is_channels_last(weight));
  const auto empty_output = [&](ScalarType type) {
    return empty_image(input, batched, g.batch, g.out_channels, g.h.out, g.w.out, type,
                       channels_last);
  };
  ForwardCall call{{},
                   empty_output(input.scalar_type()),
                   with_code ? empty_output(code_type(g)) : empty_vector(input, 0, code_type(g))};
  ForwardArgs& args = call.args;
  args.geometry = g;
  args.type = check_type(input);
  args.wide_code = code_type(g) == ScalarType::Int;
  args.input = input.const_data_ptr();
  args.input_strides = strides_of(input);
  args.weight = weight.const_data_ptr();
  args.weight_strides = strides_of(weight);
  args.bias = bias ? bias->const_data_ptr() : nullptr;
  args.bias_stride = bias ? bias->stride(0) : 0;
  args.output = call.output.mutable_data_ptr();
  args.code = with_code ? call.code.mutable_data_ptr() : nullptr;
  args.output_strides = strides_of(call.output);
  return call;
}

BackwardArgs BackwardCall::weight_args() const {
  BackwardArgs result = args;
  if (want_weight) {
    result.grad_weight = grad_weight.mutable_data_ptr();
    result.grad_weight_strides = strides_of(grad_weight);
  }
  if (want_bias) result.grad_bias = grad_bias.mutable_data_ptr();
  return result;
}

BackwardArgs BackwardCall::input_args() const {
  BackwardArgs result = args;
  result.grad_input = grad_input.mutable_data_ptr();
  result.grad_input_strides = strides_of(grad_input);
  return result;
}

BackwardCall backward_call(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                           const Tensor& code, const std::vector<int64_t>& packed,
                           int64_t output_mask) {
  const DataType type = check_type(input);
  check_like_input("weight", weight, input);
  check_like_input("grad_output", grad_output, input);
  const Geometry g = check_geometry(input, weight, packed);
  const bool batched = input.dim() == 4;
  std::vector<int64_t> expected = {g.out_channels, g.h.out, g.w.out};
  if (batched) expected.insert(expected.begin(), g.batch);
  check_shape("grad_output", grad_output, expected);
  check_shape("code", code, expected);
  if (!same_device(code, input) || code.scalar_type() != code_type(g)) {
    throw std::runtime_error(
        "code: expected the tensor that the forward returned, on input's device");
  }
  if (output_mask < 0 || output_mask > 7) {
    throw std::runtime_error(
        "output_mask: expected 0 to 7, the sum of 1 for input, 2 for weight "
        "and 4 for bias, got " +
        std::to_string(output_mask));
  }
  const ScalarType scalar = input.scalar_type();
  const bool want_input = output_mask & 1, want_weight = output_mask & 2,
             want_bias = output_mask & 4;
  check_storage("grad_output", grad_output);
  check_storage("code", code);
  if (want_weight) check_storage("input", input);
  if (want_input) check_storage("weight", weight);
  BackwardCall call{{},
                    want_input,
                    want_weight,
                    want_bias,
                    want_input ? empty_image(input, batched, g.batch, g.in_channels, g.h.in, g.w.in,
                                             scalar, is_channels_last(input))
                               : empty_vector(input, 0, scalar),
                    want_weight
                        ? empty_image(input, true, g.out_channels, g.in_channels_per_group(),
                                      g.h.kernel, g.w.kernel, scalar, is_channels_last(weight))
                        : empty_vector(input, 0, scalar),
                    empty_vector(input, want_bias ? g.out_channels : 0, scalar)};
  BackwardArgs& args = call.args;
  args.geometry = g;
  args.type = type;
  args.wide_code = code_type(g) == ScalarType::Int;
  args.grad_output = grad_output.const_data_ptr();
  args.grad_output_strides = strides_of(grad_output);
  args.code = code.const_data_ptr();
  args.code_strides = strides_of(code);
  args.input = input.const_data_ptr();
  args.input_strides = strides_of(input);
  args.weight = weight.const_data_ptr();
  args.weight_strides = strides_of(weight);
  return call;
}

}  // namespace fusedcnn
