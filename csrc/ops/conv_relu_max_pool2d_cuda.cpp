// The operators on CUDA: checks, allocation, selection, launch. The schemas are in
// conv_relu_max_pool2d.cpp. A library of its own, which only a torch with CUDA loads.
#include <dlfcn.h>
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

namespace fusedcnn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

// torch's current stream on the device. libtorch_cuda exports the function, but Python loads that
// library without making its symbols known to others, and a torch without CUDA has no such library
// to link against: so it is looked up, once.
void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t device_index, void** stream);
  static const Function function = [] {
    constexpr char kName[] = "aoti_torch_get_current_cuda_stream";
    void* found = dlsym(RTLD_DEFAULT, kName);
    if (!found) {
      if (void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) {
        found = dlsym(library, kName);
      }
    }
    return reinterpret_cast<Function>(found);
  }();
  if (!function) {
    throw std::runtime_error("fusedcnn: this process's torch has no CUDA streams");
  }
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

  // Selects a kernel and calls run(kernel, execution).
  template <typename Run>
  void run(Pass pass, const Problem& problem, const Run& run) {
    std::string reason;
    const cuda::Kernel* const kernel = cuda::select(pass, problem, target_, &reason);
    if (!kernel) {
      throw std::runtime_error(std::string("fusedcnn: no ") + name(pass) +
                               " kernel covers this call on CUDA: " + reason);
    }
    const int64_t bytes = kernel->workspace_bytes ? kernel->workspace_bytes(problem) : 0;
    // Freed at return, to torch's allocator, which hands it out again in the stream's order only.
    const Tensor workspace = empty_vector(input_, bytes, ScalarType::Byte);
    run(*kernel, cuda::Execution{stream_, bytes ? workspace.mutable_data_ptr() : nullptr});
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
  const ForwardCall call = forward_call(g, input, weight, bias, with_code);
  if (g.batch > 0) {
    Session(input).run(Pass::kForward, {g, call.args.type, call.args.wide_code},
                       [&](const cuda::Kernel& kernel, const cuda::Execution& execution) {
                         kernel.forward(call.args, execution);
                       });
  }
  return {call.output, call.code};
}

std::tuple<Tensor, Tensor, Tensor> conv_relu_max_pool2d_backward_cuda(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Tensor& code,
    const std::vector<int64_t>& packed, int64_t output_mask) {
  const BackwardCall call = backward_call(grad_output, input, weight, code, packed, output_mask);
  check_coordinates(call.args.geometry);
  if (call.run_grad_weight() || call.run_grad_input()) {
    Session session(input);
    const Problem problem{call.args.geometry, call.args.type, call.args.wide_code};
    const auto run = [&](Pass pass, const BackwardArgs& args) {
      session.run(pass, problem, [&](const cuda::Kernel& kernel, const cuda::Execution& execution) {
        kernel.backward(args, execution);
      });
    };
    if (call.run_grad_weight()) run(Pass::kGradWeight, call.weight_args());
    if (call.run_grad_input()) run(Pass::kGradInput, call.input_args());
  }
  return {call.grad_input, call.grad_weight, call.grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedcnn, CUDA, m) {
  m.impl("conv_relu_max_pool2d", TORCH_BOX(&conv_relu_max_pool2d_cuda));
  m.impl("conv_relu_max_pool2d_backward", TORCH_BOX(&conv_relu_max_pool2d_backward_cuda));
}

}  // namespace fusedcnn
