#include "calls.h"

#include <exception>

#include "check.h"
#include "storage.h"

namespace selftest {
namespace {

using fusedcnn::BackwardArgs;
using fusedcnn::ForwardArgs;
using fusedcnn::Geometry;
using fusedcnn::Pass;
using fusedcnn::Strides;

// Whether body() threw nothing.
template <typename Body>
bool completes(const std::string& what, const Body& body) {
  try {
    body();
  } catch (const std::exception& error) {
    return check(false, what + ": " + error.what());
  }
  return true;
}

Shape input_shape(const Geometry& g) { return {g.batch, g.in_channels, g.h.in, g.w.in}; }
Shape weight_shape(const Geometry& g) {
  return {g.out_channels, g.in_channels_per_group(), g.h.kernel, g.w.kernel};
}
Shape output_shape(const Geometry& g) { return {g.batch, g.out_channels, g.h.out, g.w.out}; }

}  // namespace

bool run_forward(const Call& call, const Operands& operands, Forward* result,
                 const std::string& what, bool want_code) {
  const Geometry& g = call.problem.geometry;
  const fusedcnn::DataType type = call.problem.type;
  const bool wide = call.problem.wide_code;
  const auto place = [&](Shape shape) { return strides_for(call.layout, shape); };
  const Tensor input = tensor_of(type, input_shape(g), place(input_shape(g)), operands.input);
  const Tensor weight = tensor_of(type, weight_shape(g), place(weight_shape(g)), operands.weight);
  const bool has_bias = !operands.bias.empty();
  const int64_t bias_stride = call.layout == Layout::kContiguous ? 1 : 3;
  const Tensor bias = tensor_of(type, {1, 1, 1, has_bias ? g.out_channels : 0},
                                {0, 0, 0, bias_stride}, operands.bias);
  // Outputs are the operator's own: contiguous or channels_last.
  const bool channels_last =
      call.layout == Layout::kChannelsLast || call.layout == Layout::kPermuted;
  const Strides output_strides =
      strides_for(channels_last ? Layout::kChannelsLast : Layout::kContiguous, output_shape(g));
  const int64_t size = element_size(type);
  Tensor output(output_shape(g), output_strides, size, signalling_nan(type));
  Tensor code(output_shape(g), output_strides, wide ? 4 : 1, 0xeeeeeeeeeeeeeeee);

  ForwardArgs args{};
  args.geometry = g;
  args.type = type;
  args.wide_code = wide;
  args.relu = call.problem.relu;
  args.input = input.data();
  args.input_strides = input.strides();
  args.weight = weight.data();
  args.weight_strides = weight.strides();
  args.bias = has_bias ? bias.data() : nullptr;
  args.bias_stride = has_bias ? bias_stride : 0;
  args.output = output.data();
  args.code = want_code ? code.data() : nullptr;
  args.output_strides = output_strides;
  const bool completed = completes(what, [&] { call.kernel->forward(args, call.way); });

  result->output = values_of(type, output);
  if (want_code) result->code = code_values_of(wide, code);
  return check(output.gaps_intact() && code.gaps_intact(), what + ": wrote between the elements") &&
         completed;
}

bool run_backward(const Call& call, const Operands& operands, const std::vector<int32_t>& codes,
                  Gradients* result, const std::string& what, bool want_weight, bool want_bias) {
  const Geometry& g = call.problem.geometry;
  const fusedcnn::DataType type = call.problem.type;
  const bool wide = call.problem.wide_code;
  const bool weight_pass = call.kernel->pass == Pass::kGradWeight;
  const auto place = [&](Shape shape) { return strides_for(call.layout, shape); };
  // Of a dense problem, what such a call is given.
  const bool dense = call.problem.dense;
  const Tensor grad_output =
      tensor_of(type, output_shape(g),
                strides_for(dense ? Layout::kChannelsLast : call.layout, output_shape(g)),
                operands.grad_output);
  const Tensor code =
      codes_of(wide, output_shape(g), dense ? Strides{} : place(output_shape(g)), codes);
  const Tensor input = tensor_of(type, input_shape(g), place(input_shape(g)), operands.input);
  const Tensor weight = tensor_of(type, weight_shape(g), place(weight_shape(g)), operands.weight);
  const auto fresh = [type](Shape shape, Strides strides) {
    return Tensor(shape, strides, element_size(type), signalling_nan(type));
  };
  Tensor grad_input = fresh(input_shape(g), place(input_shape(g)));
  Tensor grad_weight = fresh(weight_shape(g), place(weight_shape(g)));
  Tensor grad_bias = fresh({1, 1, 1, g.out_channels}, {0, 0, 0, 1});

  BackwardArgs args{};
  args.geometry = g;
  args.type = type;
  args.wide_code = wide;
  args.grad_output = grad_output.data();
  args.grad_output_strides = grad_output.strides();
  args.code = code.data();
  args.code_strides = code.strides();
  if (weight_pass) {
    if (want_weight) {
      args.input = input.data();
      args.input_strides = input.strides();
      args.grad_weight = grad_weight.data();
      args.grad_weight_strides = grad_weight.strides();
    }
    if (want_bias) args.grad_bias = grad_bias.data();
  } else {
    args.weight = weight.data();
    args.weight_strides = weight.strides();
    args.grad_input = grad_input.data();
    args.grad_input_strides = grad_input.strides();
  }
  const bool completed = completes(what, [&] { call.kernel->backward(args, call.way); });

  *result = {};
  if (!weight_pass) result->input = values_of(type, grad_input);
  if (weight_pass && want_weight) result->weight = values_of(type, grad_weight);
  if (weight_pass && want_bias) result->bias = values_of(type, grad_bias);
  return check(grad_input.gaps_intact() && grad_weight.gaps_intact(),
               what + ": wrote between the elements") &&
         completed;
}

}  // namespace selftest
