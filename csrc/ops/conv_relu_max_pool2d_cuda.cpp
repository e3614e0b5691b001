// The operators on CUDA: checks, allocation, selection, launch. The schemas are in
// conv_relu_max_pool2d.cpp. A library of its own, which only a torch with CUDA loads.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/launch.h"
#include "cuda/select.h"
#include "ops/calls.h"
#include "ops/checks.h"
#include "ops/choice.h"
#include "ops/stock_convolution_cuda.h"
#include "ops/torch_cuda.h"

namespace fusedcnn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// torch's current stream on the device.
void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t device_index, void** stream);
  static const auto function =
      reinterpret_cast<Function>(torch_cuda_function("aoti_torch_get_current_cuda_stream"));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

// The kernels' coordinates have 32 bits, and they add two of them.
void check_coordinates(const Geometry& g) {
  for (const Axis* axis : {&g.h, &g.w}) {
    if (axis->padded() + axis->reach() >= int64_t{1} << 29) {
      throw std::runtime_error(
          "input, padding: expected fewer than 2^29 elements along each axis on CUDA");
    }
  }
}

// One call's device, stream and working memory.
class Session {
 public:
  explicit Session(const Tensor& input)
      : input_(input),
        guard_(input.get_device_index()),
        target_{cuda::use_device(input.get_device_index()), cuda::tf32_allowed()},
        stream_(current_stream(input.get_device_index())) {}

  const cuda::Kernel& select(Pass pass, const Problem& problem) const {
    const cuda::Kernel* const kernel = cuda::select(pass, problem, target_);
    if (!kernel) {
      const std::string forced = cuda::forced_kernel();
      throw std::runtime_error(
          refusal(pass, explain(pass, problem), forced.empty() ? nullptr : forced.c_str()));
    }
    if (logging()) log_choice("CUDA", pass, problem, kernel->name, explain(pass, problem));
    return *kernel;
  }

  std::vector<Verdict> explain(Pass pass, const Problem& problem) const {
    return cuda::explain(pass, problem, target_);
  }

  // Runs function(args, execution), the kernel's, with the memory that it asks for.
  template <typename Args>
  void run(const cuda::Kernel& kernel,
           void (*function)(const Args& args, const cuda::Execution& execution),
           const Args& args) const {
    const Problem problem = problem_of(args.geometry, args.type, args.wide_code, {});
    const int64_t bytes = kernel.workspace_bytes ? kernel.workspace_bytes(problem) : 0;
    // Freed at return, to torch's allocator, which hands it out again in the stream's order only.
    const Tensor workspace = empty_vector(input_, bytes, ScalarType::Byte);
    function(args, cuda::Execution{stream_, bytes ? workspace.mutable_data_ptr() : nullptr});
  }

  // The order of a library kernel's plane.
  bool plane_channels_last(const Tensor& weight, DataType type) const {
    const bool half = type == DataType::kBFloat16 || type == DataType::kFloat16;
    const bool tf32 = type == DataType::kFloat32 && target_.allow_tf32;
    return plane_in_channels_last(input_, weight,
                                  half || (tf32 && target_.device.capability >= 80));
  }

 private:
  const Tensor& input_;
  const DeviceGuard guard_;
  const cuda::Target target_;
  void* const stream_;
};

std::tuple<Tensor, Tensor> conv_relu_max_pool2d_cuda(const Tensor& input, const Tensor& weight,
                                                     const std::optional<Tensor>& bias,
                                                     const std::vector<int64_t>& packed,
                                                     bool with_code) {
  const Geometry g = check_forward(input, weight, bias, packed);
  check_coordinates(g);
  ForwardCall call = forward_call(g, input, weight, bias, with_code);
  ForwardArgs& args = call.args;
  if (g.batch > 0) {
    const Session session(input);
    const cuda::Kernel& kernel = session.select(
        Pass::kForward, problem_of(g, args.type, args.wide_code, args.input_strides));
    std::optional<Tensor> plane;
    if (kernel.library) {
      args.plane_channels_last = session.plane_channels_last(weight, args.type);
      plane = stock_convolution(cuda_convolution(), input, weight, g, args.plane_channels_last);
      args.plane = plane->const_data_ptr();
    }
    session.run(kernel, kernel.forward, args);
  }
  return {call.output, call.code};
}

std::tuple<Tensor, Tensor, Tensor> conv_relu_max_pool2d_backward_cuda(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& code,
    const std::vector<int64_t>& packed, int64_t output_mask) {
  BackwardCall call = backward_call(grad_output, input, weight, code, packed, output_mask);
  BackwardArgs& args = call.args;
  const Geometry& g = args.geometry;
  check_coordinates(g);
  if (call.run_grad_weight() || call.run_grad_input()) {
    const Session session(input);
    const Problem problem = problem_of(g, args.type, args.wide_code, args.input_strides);
    const auto kernel_if = [&](bool wanted, Pass pass) {
      return wanted ? &session.select(pass, problem) : nullptr;
    };
    const cuda::Kernel* const for_weight = kernel_if(call.run_grad_weight(), Pass::kGradWeight);
    const cuda::Kernel* const for_input = kernel_if(call.run_grad_input(), Pass::kGradInput);
    const bool library_weight = for_weight && for_weight->library;
    const bool library_input = for_input && for_input->library;
    if (for_weight && !library_weight) {
      session.run(*for_weight, for_weight->backward, call.weight_args());
    }
    if (for_input && !library_input) {
      session.run(*for_input, for_input->backward, call.input_args());
    }
    if (library_weight || library_input) {
      args.plane_channels_last = session.plane_channels_last(weight, args.type);
      const Tensor plane = empty_plane(input, g, args.plane_channels_last);
      args.plane = plane.mutable_data_ptr();
      const cuda::Kernel& kernel = library_weight ? *for_weight : *for_input;
      session.run(kernel, kernel.backward, args);
      stock_convolution_backward(cuda_convolution(), plane, input, weight, g,
                                 args.plane_channels_last,
                                 library_input ? &call.grad_input : nullptr,
                                 library_weight && call.want_weight ? &call.grad_weight : nullptr,
                                 library_weight && call.want_bias ? &call.grad_bias : nullptr);
    }
  }
  return {call.grad_input, call.grad_weight, call.grad_bias};
}

// See the CPU's.
std::string explain_cuda(const Tensor& input, const Tensor& weight,
                         const std::optional<Tensor>& bias, const std::vector<int64_t>& packed) {
  const Geometry g = check_forward(input, weight, bias, packed);
  check_coordinates(g);
  const bool wide_code = g.window() > kLargestByteWindow;
  const Problem problem = problem_of(g, check_type(input), wide_code, strides_of(input));
  const Session session(input);
  return explanation([&](Pass pass) { return session.explain(pass, problem); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedcnn, CUDA, m) {
  m.impl("conv_relu_max_pool2d", TORCH_BOX(&conv_relu_max_pool2d_cuda));
  m.impl("conv_relu_max_pool2d_backward", TORCH_BOX(&conv_relu_max_pool2d_backward_cuda));
  m.impl("explain", TORCH_BOX(&explain_cuda));
}

}  // namespace fusedcnn
