// The operators' schemas and their CPU implementations: checks, allocation, selection, call. The
// CUDA implementations are in conv_relu_max_pool2d_cuda.cpp.
#include "ops/conv_relu_max_pool2d.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <chrono>
#include <cstdint>
#include <exception>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/codes.h"
#include "cpu/select.h"
#include "ops/calls.h"
#include "ops/checks.h"
#include "ops/choice.h"
#include "ops/measured.h"
#include "ops/stock_convolution.h"
#include "ops/torch_threads.h"

namespace fusedcnn {
namespace {

using torch::stable::Tensor;

// The quickest kernel that covers the problem with these numbers of threads. run(kernel) computes
// the pass into its results.
template <typename Run>
const cpu::Kernel& quickest(Pass pass, const Problem& problem, const Run& run) {
  static Winners<cpu::Kernel> winners;
  const std::string key = std::string(name(pass)) + " " + cpu::selected_isa().name + " " +
                          std::to_string(torch::stable::get_num_threads()) + " " +
                          description(problem);
  const auto seconds = [&](const cpu::Kernel& kernel) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    return least_time([&] {
      const auto begin = std::chrono::steady_clock::now();
      run(kernel);
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    });
  };
  return *winners.quickest(key, cpu::candidates(pass, problem), /*may_measure=*/true, seconds);
}

// The kernel that is to compute the pass. run(kernel) does so, as often as measuring asks for.
template <typename Run>
const cpu::Kernel& choose(Pass pass, const Problem& problem, const Run& run) {
  const cpu::Kernel* kernel = cpu::select(pass, problem);
  if (!kernel) {
    const std::string forced = cpu::forced_kernel();
    throw std::runtime_error(
        refusal(pass, cpu::explain(pass, problem), forced.empty() ? nullptr : forced.c_str()));
  }
  if (cpu::benchmarking() && cpu::forced_kernel().empty()) kernel = &quickest(pass, problem, run);
  if (logging()) {
    log_choice("CPU", pass, problem, kernel->name, cpu::explain(pass, problem));
  }
  cpu::chosen(pass, *kernel);
  return *kernel;
}

// Chooses and runs, and where the stock convolution fails, runs the next kernel that covers the
// problem: what does not fit into memory may be the library's plane alone. A forced kernel fails as
// it does.
template <typename Run>
void run_or_without_library(Pass pass, const Problem& problem, const Run& run) {
  const cpu::Kernel& kernel = choose(pass, problem, run);
  if (!kernel.library || !cpu::forced_kernel().empty()) return run(kernel);
  try {
    run(kernel);
  } catch (const std::exception&) {
    for (const cpu::Kernel* const other : cpu::candidates(pass, problem)) {
      if (other->library) continue;
      cpu::chosen(pass, *other);
      return run(*other);
    }
    throw;
  }
}

}  // namespace

std::tuple<Tensor, Tensor> conv_relu_max_pool2d(const Tensor& input, const Tensor& weight,
                                                const std::optional<Tensor>& bias,
                                                const std::vector<int64_t>& packed,
                                                bool with_code) {
  const Geometry g = check_forward(input, weight, bias, packed);
  if (with_code && !g.places_fit_32_bits()) {
    throw std::runtime_error(
        "padding: expected a padded image of fewer than 2^32 elements where gradients are wanted");
  }
  ForwardCall call = forward_call(g, input, weight, bias, with_code);
  const auto run = [&](const cpu::Kernel& kernel) {
    std::optional<Tensor> plane;
    if (kernel.library) {
      plane = stock_convolution(input, weight, bias, g, thread_pool(g));
      call.args.plane = plane->const_data_ptr();
    }
    with_memory([&] { kernel.forward(call.args, thread_pool(g)); });
  };
  if (g.batch > 0) {
    const ForwardArgs& args = call.args;
    const Problem problem = problem_of(g, args.type, args.wide_code, args.input_strides);
    run_or_without_library(Pass::kForward, problem, run);
  }
  return {call.output, call.code};
}

namespace {

// grad_input, grad_weight, grad_bias; a gradient that is not wanted comes back with shape [0].
std::tuple<Tensor, Tensor, Tensor> conv_relu_max_pool2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& code,
    const std::vector<int64_t>& packed, int64_t output_mask) {
  const BackwardCall call = backward_call(grad_output, input, weight, code, packed, output_mask);
  const Geometry& g = call.args.geometry;
  // Not so on a GPU, where looking at them would mean waiting for it.
  if (!cpu::codes_fit(call.args)) {
    throw std::runtime_error(
        "code: expected the tensor that the forward returned, got elements outside their windows");
  }
  const Problem problem =
      problem_of(g, call.args.type, call.args.wide_code, call.args.input_strides);
  if (call.run_grad_weight()) {
    const auto run = [&](const cpu::Kernel& kernel) {
      with_memory([&] { kernel.backward(call.weight_args(), thread_pool(g)); });
    };
    run(choose(Pass::kGradWeight, problem, run));
  }
  if (call.run_grad_input()) {
    const auto run = [&](const cpu::Kernel& kernel) {
      with_memory([&] { kernel.backward(call.input_args(), thread_pool(g)); });
    };
    run(choose(Pass::kGradInput, problem, run));
  }
  return {call.grad_input, call.grad_weight, call.grad_bias};
}

// What the operators would choose for these arguments, which they refuse alike: see `explanation`.
std::string explain(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                    const std::vector<int64_t>& packed) {
  const Geometry g = check_forward(input, weight, bias, packed);
  const bool wide_code = g.window() > kLargestByteWindow;
  const Problem problem = problem_of(g, check_type(input), wide_code, strides_of(input));
  return explanation([&](Pass pass) { return cpu::explain(pass, problem); });
}

}  // namespace

STABLE_TORCH_LIBRARY(fusedcnn, m) {
  m.def(
      "conv_relu_max_pool2d(Tensor input, Tensor weight, Tensor? bias, int[] geometry, "
      "bool with_code) -> (Tensor output, Tensor code)");
  m.def(
      "conv_relu_max_pool2d_backward(Tensor grad_output, Tensor input, Tensor weight, "
      "Tensor code, int[] geometry, int output_mask) -> (Tensor, Tensor, Tensor)");
  // mean, var: of each channel of the convolution without its bias, float32 (or float64), var with
  // the divisor N. extremum: of each window, the output that its maximum comes from, without bias.
  m.def(
      "conv_batch_norm_relu_max_pool2d(Tensor input, Tensor weight, Tensor? bias, "
      "Tensor? bn_weight, Tensor? bn_bias, int[] geometry, float eps, bool with_code) -> "
      "(Tensor output, Tensor code, Tensor extremum, Tensor mean, Tensor var)");
  m.def(
      "conv_batch_norm_relu_max_pool2d_backward(Tensor grad_output, Tensor input, Tensor weight, "
      "Tensor? bn_weight, Tensor code, Tensor extremum, Tensor mean, Tensor var, int[] geometry, "
      "float eps, int output_mask) -> (Tensor grad_input, Tensor grad_weight, "
      "Tensor grad_bn_weight, Tensor grad_bn_bias)");
  m.def(
      "conv_relu_max_pool2d_chain(Tensor input, Tensor[] parameters, int[] geometries) -> Tensor");
  // output: input * weight^T + bias, through ReLU where that is asked for. dropped: output * kept /
  // keep, or of shape [0] without kept, the dropout's zeros and ones.
  m.def(
      "linear(Tensor input, Tensor weight, Tensor bias, bool relu, Tensor? kept, float keep) -> "
      "(Tensor output, Tensor dropped)");
  // Of the same; output: None where there was no ReLU.
  m.def(
      "linear_backward(Tensor grad, Tensor input, Tensor weight, Tensor? output, Tensor? kept, "
      "float keep, int output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)");
  m.def("explain(Tensor input, Tensor weight, Tensor? bias, int[] geometry) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fusedcnn, CPU, m) {
  m.impl("conv_relu_max_pool2d", TORCH_BOX(&conv_relu_max_pool2d));
  m.impl("conv_relu_max_pool2d_backward", TORCH_BOX(&conv_relu_max_pool2d_backward));
  m.impl("explain", TORCH_BOX(&explain));
}

}  // namespace fusedcnn
