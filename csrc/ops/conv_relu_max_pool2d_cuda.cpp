// The operators on CUDA: checks, allocation, selection, launch. The schemas are in
// conv_relu_max_pool2d.cpp. A library of its own, which only a torch with CUDA loads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "ops/calls.h"
#include "ops/checks.h"
#include "ops/choice.h"
#include "ops/cuda_session.h"
#include "ops/stock_convolution_cuda.h"

namespace fusedcnn {
namespace {

using torch::stable::Tensor;

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
    const auto run = [&](const cuda::Kernel& kernel) {
      std::optional<Tensor> plane;
      if (kernel.library) {
        const StockConvolution convolution(session, input, weight, g, Reads{true, true});
        plane = convolution.plane();
        args.plane = plane->const_data_ptr();
        args.plane_channels_last = convolution.channels_last();
      }
      session.run(kernel, kernel.forward, args);
    };
    const Problem problem = problem_of(g, args.type, args.wide_code, args.input_strides);
    run(session.choose(Pass::kForward, problem, with_code, run));
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
    // Replaces the gradients that are not null.
    const auto run_library = [&](const cuda::Kernel& kernel, Tensor* grad_input,
                                 Tensor* grad_weight, bool want_bias) {
      args.plane_channels_last = in_channels_last(session, input, weight);
      std::optional<Tensor> plane;
      if (grad_input || grad_weight) {
        plane = empty_image(input, true, g.batch, g.out_channels, g.h.conv, g.w.conv,
                            input.scalar_type(), args.plane_channels_last);
      }
      args.plane = plane ? plane->mutable_data_ptr() : nullptr;
      args.grad_bias = want_bias ? call.grad_bias.mutable_data_ptr() : nullptr;
      session.run(kernel, kernel.backward, args);
      if (plane) {
        // Copies of its operands would have taken memory beside the workspace.
        const Reads reads{grad_weight != nullptr, grad_input != nullptr};
        StockConvolution(session, input, weight, g, reads)
            .backward(*plane, grad_input, grad_weight);
      }
    };
    const auto run_alone = [&](const cuda::Kernel& kernel) {
      const bool for_weight = kernel.pass == Pass::kGradWeight;
      if (!kernel.library) {
        return session.run(kernel, kernel.backward,
                           for_weight ? call.weight_args() : call.input_args());
      }
      // The operator's own results stay where the other kernels write.
      Tensor grad_input = call.grad_input, grad_weight = call.grad_weight;
      run_library(kernel, for_weight ? nullptr : &grad_input,
                  for_weight && call.want_weight ? &grad_weight : nullptr,
                  for_weight && call.want_bias);
    };
    const auto kernel_if = [&](bool wanted, Pass pass) {
      const int results = static_cast<int>(output_mask);
      return wanted ? &session.choose(pass, problem, results, run_alone) : nullptr;
    };
    const cuda::Kernel* const for_weight = kernel_if(call.run_grad_weight(), Pass::kGradWeight);
    const cuda::Kernel* const for_input = kernel_if(call.run_grad_input(), Pass::kGradInput);
    const bool library_weight = for_weight && for_weight->library;
    const bool library_input = for_input && for_input->library;
    if (for_weight && !library_weight) run_alone(*for_weight);
    if (for_input && !library_input) run_alone(*for_input);
    if (library_weight || library_input) {
      run_library(library_weight ? *for_weight : *for_input,
                  library_input ? &call.grad_input : nullptr,
                  library_weight && call.want_weight ? &call.grad_weight : nullptr,
                  library_weight && call.want_bias);
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
