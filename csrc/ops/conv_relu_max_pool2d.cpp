// The operators' schemas and their CPU implementations: checks, allocation, selection, call. The
// CUDA implementations are in conv_relu_max_pool2d_cuda.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/codes.h"
#include "cpu/out_of_memory.h"
#include "cpu/select.h"
#include "ops/calls.h"
#include "ops/checks.h"
#include "ops/stock_convolution.h"

namespace fusedcnn {
namespace {

using torch::stable::Tensor;

// torch's own threads: a second OpenMP runtime in the process costs milliseconds per call. What a
// task throws is kept aside, since the way through torch's C interface would lose all but the fact.
void run_on_torch_threads(int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context) {
  struct Run {
    void (*body)(int64_t, int64_t, void*);
    void* context;
    std::atomic_flag failed;
    std::exception_ptr error;  // of the first that failed
  } run{body, context, {}, nullptr};
  const auto guarded = [](int64_t begin, int64_t end, void* opaque) {
    Run& run = *static_cast<Run*>(opaque);
    try {
      run.body(begin, end, run.context);
    } catch (...) {
      if (!run.failed.test_and_set()) run.error = std::current_exception();
    }
  };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, tasks, 1, guarded, &run));
  if (run.error) std::rethrow_exception(run.error);
}

void run_inline(int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context) {
  body(0, tasks, context);
}

// Below this many multiply-adds, waking a second thread costs more than it saves (a few
// microseconds, in which one core does about this much).
constexpr double kSerialMultiplyAdds = 1e6;

cpu::ThreadPool thread_pool(const Geometry& g) {
  const double conv_outputs =
      std::min(double(g.outputs()) * double(g.window()), double(g.h.conv) * double(g.w.conv));
  const double multiply_adds =
      double(g.batch) * g.out_channels * conv_outputs * g.in_channels_per_group() * g.taps();
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

// body(), with a shortage of working memory as the error that torch's own allocator raises.
template <typename Body>
void with_memory(const Body& body) {
  try {
    body();
  } catch (const cpu::OutOfMemory& error) {
    throw std::runtime_error(out_of_memory_text(error.bytes));
  }
}

// output [N, OC, OH, OW] and code of the same shape, or of shape [0] when `with_code` is false.
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
  if (g.batch > 0) {
    const cpu::Kernel& kernel =
        select_or_throw(cpu::Pass::kForward, {g, call.args.type, call.args.wide_code});
    std::optional<Tensor> plane;
    if (kernel.library) {
      plane = stock_convolution(input, weight, bias, g);
      call.args.plane = plane->const_data_ptr();
    }
    with_memory([&] { kernel.forward(call.args, thread_pool(g)); });
  }
  return {call.output, call.code};
}

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
  const cpu::Problem problem{g, call.args.type, call.args.wide_code};
  const cpu::ThreadPool pool = thread_pool(g);
  const auto kernel_if = [&](bool wanted, cpu::Pass pass) {
    return wanted ? &select_or_throw(pass, problem) : nullptr;
  };
  const cpu::Kernel* const for_weight = kernel_if(call.run_grad_weight(), cpu::Pass::kGradWeight);
  const cpu::Kernel* const for_input = kernel_if(call.run_grad_input(), cpu::Pass::kGradInput);
  with_memory([&] {
    if (for_weight && !for_weight->library) for_weight->backward(call.weight_args(), pool);
    if (for_input && !for_input->library) for_input->backward(call.input_args(), pool);
  });
  const bool library_weight = for_weight && for_weight->library;
  const bool library_input = for_input && for_input->library;
  if (library_weight || library_input) {
    const Tensor plane = empty_plane(input, g);
    BackwardArgs args = call.args;
    args.plane = plane.mutable_data_ptr();
    with_memory([&] { (library_weight ? for_weight : for_input)->backward(args, pool); });
    const auto wanted = [](bool want, const Tensor& gradient) {
      return want ? std::optional<Tensor>(gradient) : std::nullopt;
    };
    stock_convolution_backward(plane, input, weight, g, wanted(library_input, call.grad_input),
                               wanted(library_weight && call.want_weight, call.grad_weight),
                               wanted(library_weight && call.want_bias, call.grad_bias));
  }
  return {call.grad_input, call.grad_weight, call.grad_bias};
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
