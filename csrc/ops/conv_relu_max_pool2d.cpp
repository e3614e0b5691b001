// The operators' schemas and their CPU implementations: checks, allocation, selection, call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/plan.h"
#include "cpu/select.h"
#include "ops/checks.h"

namespace fusedcnn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// torch's own threads: a second OpenMP runtime in the process costs milliseconds per call.
void run_on_torch_threads(int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, tasks, 1, body, context));
}

void run_inline(int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context) {
  body(0, tasks, context);
}

// Below this many multiply-adds, waking a second thread costs more than it saves (a few
// microseconds, in which one core does about this much).
constexpr double kSerialMultiplyAdds = 1e6;

cpu::ThreadPool thread_pool(const Geometry& g) {
  const double multiply_adds = double(g.batch) * g.out_channels * g.outputs() * g.window() *
                               g.in_channels_per_group() * g.taps();
  return {multiply_adds < kSerialMultiplyAdds ? run_inline : run_on_torch_threads};
}

const cpu::Kernel& select_or_throw(cpu::Pass pass, const cpu::Problem& problem) {
  std::string reason;
  const cpu::Kernel* kernel = cpu::select(pass, problem, &reason);
  if (!kernel) {
    throw std::runtime_error(std::string("fusedcnn: no ") + name(pass) +
                             " kernel covers this call: " + reason);
  }
  return *kernel;
}

ScalarType code_type(const Geometry& g) {
  return g.window() > kLargestByteWindow ? ScalarType::Int : ScalarType::Byte;
}

// output [N, OC, OH, OW] and code of the same shape, or of shape [0] when `with_code` is false.
std::tuple<Tensor, Tensor> conv_relu_max_pool2d(const Tensor& input, const Tensor& weight,
                                                const std::optional<Tensor>& bias,
                                                const std::vector<int64_t>& packed,
                                                bool with_code) {
  const DataType type = check_type(input);
  check_like_input("weight", weight, input);
  const Geometry g = check_geometry(input, weight, packed);
  if (bias) {
    check_like_input("bias", *bias, input);
    check_shape("bias", *bias, {g.out_channels});
  }
  if (with_code && !cpu::backward_fits(g)) {
    throw std::runtime_error(
        "padding: expected a padded image of fewer than 2^32 elements where gradients are wanted");
  }
  const bool batched = input.dim() == 4;
  const bool channels_last = batched && (is_channels_last(input) || is_channels_last(weight));
  Tensor output = empty_image(batched, g.batch, g.out_channels, g.h.out, g.w.out,
                              input.scalar_type(), channels_last);
  Tensor code = with_code ? empty_image(batched, g.batch, g.out_channels, g.h.out, g.w.out,
                                        code_type(g), channels_last)
                          : empty_vector(0, code_type(g));
  if (g.batch == 0) return {output, code};

  cpu::ForwardArgs args{};
  args.geometry = g;
  args.type = type;
  args.wide_code = code_type(g) == ScalarType::Int;
  args.input = input.const_data_ptr();
  args.input_strides = strides_of(input);
  args.weight = weight.const_data_ptr();
  args.weight_strides = strides_of(weight);
  args.bias = bias ? bias->const_data_ptr() : nullptr;
  args.bias_stride = bias ? bias->stride(0) : 0;
  args.output = output.mutable_data_ptr();
  args.code = with_code ? code.mutable_data_ptr() : nullptr;
  args.output_strides = strides_of(output);
  select_or_throw(cpu::Pass::kForward, {g, type, args.wide_code}).forward(args, thread_pool(g));
  return {output, code};
}

// grad_input, grad_weight, grad_bias; `output_mask` holds one bit for each, lowest first, and a
// gradient that is not wanted comes back with shape [0].
std::tuple<Tensor, Tensor, Tensor> conv_relu_max_pool2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& code,
    const std::vector<int64_t>& packed, int64_t output_mask) {
  const DataType type = check_type(input);
  check_like_input("weight", weight, input);
  check_like_input("grad_output", grad_output, input);
  const Geometry g = check_geometry(input, weight, packed);
  const bool batched = input.dim() == 4;
  std::vector<int64_t> expected = {g.out_channels, g.h.out, g.w.out};
  if (batched) expected.insert(expected.begin(), g.batch);
  check_shape("grad_output", grad_output, expected);
  check_shape("code", code, expected);
  if (!code.is_cpu() || code.scalar_type() != code_type(g)) {
    throw std::runtime_error("code: expected the CPU tensor that the forward returned");
  }
  const ScalarType scalar = input.scalar_type();
  const bool want_input = output_mask & 1, want_weight = output_mask & 2,
             want_bias = output_mask & 4;
  Tensor grad_input = want_input ? empty_image(batched, g.batch, g.in_channels, g.h.in, g.w.in,
                                               scalar, is_channels_last(input))
                                 : empty_vector(0, scalar);
  Tensor grad_weight = want_weight
                           ? empty_image(true, g.out_channels, g.in_channels_per_group(),
                                         g.h.kernel, g.w.kernel, scalar, is_channels_last(weight))
                           : empty_vector(0, scalar);
  Tensor grad_bias = empty_vector(want_bias ? g.out_channels : 0, scalar);

  cpu::BackwardArgs args{};
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
  const cpu::Problem problem{g, type, args.wide_code};
  const cpu::ThreadPool pool = thread_pool(g);
  if (want_weight || want_bias) {
    cpu::BackwardArgs weight_args = args;
    if (want_weight) {
      weight_args.grad_weight = grad_weight.mutable_data_ptr();
      weight_args.grad_weight_strides = strides_of(grad_weight);
    }
    if (want_bias) weight_args.grad_bias = grad_bias.mutable_data_ptr();
    select_or_throw(cpu::Pass::kGradWeight, problem).backward(weight_args, pool);
  }
  if (want_input && g.batch > 0) {
    args.grad_input = grad_input.mutable_data_ptr();
    args.grad_input_strides = strides_of(grad_input);
    select_or_throw(cpu::Pass::kGradInput, problem).backward(args, pool);
  }
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY(fusedcnn, m) {
  m.def(
      "conv_relu_max_pool2d(Tensor input, Tensor weight, Tensor? bias, int[] geometry, "
      "bool with_code) -> (Tensor output, Tensor code)");
  m.def(
      "conv_relu_max_pool2d_backward(Tensor grad_output, Tensor input, Tensor weight, "
      "Tensor code, int[] geometry, int output_mask) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fusedcnn, CPU, m) {
  m.impl("conv_relu_max_pool2d", TORCH_BOX(&conv_relu_max_pool2d));
  m.impl("conv_relu_max_pool2d_backward", TORCH_BOX(&conv_relu_max_pool2d_backward));
}

}  // namespace fusedcnn
