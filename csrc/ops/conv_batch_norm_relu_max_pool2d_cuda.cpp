// The operators with batch normalisation on CUDA: checks, allocation, the stock convolution and
// what stands around it. The schemas are in conv_relu_max_pool2d.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cuda/batch_norm.h"
#include "ops/batch_norm_calls.h"
#include "ops/cuda_session.h"
#include "ops/stock_convolution_cuda.h"

namespace fusedcnn {
namespace {

using torch::stable::Tensor;

void check_sizes(const Geometry& g) {
  check_coordinates(g);
  if (g.h.conv * g.w.conv >= int64_t{1} << 31) {
    throw std::runtime_error(
        "input: expected fewer than 2^31 outputs of the convolution for an image and a channel on "
        "CUDA");
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> conv_batch_norm_relu_max_pool2d_cuda(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& bn_weight, const std::optional<Tensor>& bn_bias,
    const std::vector<int64_t>& packed, double eps, bool with_code) {
  NormForwardCall call =
      norm_forward_call(input, weight, bias, bn_weight, bn_bias, packed, eps, with_code);
  ForwardArgs& block = call.args.block;
  check_sizes(block.geometry);
  if (call.run()) {
    const Session session(input);
    session.check_batch_norm();
    std::optional<Tensor> plane;
    {  // its operands are not needed any longer
      const StockConvolution convolution(session, input, weight, block.geometry, Reads{true, true});
      plane = convolution.plane();
      block.plane_channels_last = convolution.channels_last();
    }
    block.plane = plane->const_data_ptr();
    session.run(cuda::batch_norm_forward_workspace(call.args), cuda::batch_norm_forward, call.args);
  }
  return {call.output, call.code, call.extremum, call.mean, call.var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_batch_norm_relu_max_pool2d_backward_cuda(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight,
    const std::optional<Tensor>& bn_weight, const Tensor& code, const Tensor& extremum,
    const Tensor& mean, const Tensor& var, const std::vector<int64_t>& packed, double eps,
    int64_t output_mask) {
  NormBackwardCall call = norm_backward_call(grad_output, input, weight, bn_weight, code, extremum,
                                             mean, var, packed, eps, output_mask);
  BackwardArgs& block = call.args.block;
  check_sizes(block.geometry);
  if (call.run()) {
    const Session session(input);
    session.check_batch_norm();
    std::optional<StockConvolution> convolution;
    std::optional<Tensor> plane;
    if (call.want_input || call.want_weight) {
      // Computed again, which costs less than to keep it.
      convolution.emplace(session, input, weight, block.geometry, Reads{true, true});
      plane = convolution->plane();
      block.plane = plane->mutable_data_ptr();
      block.plane_channels_last = convolution->channels_last();
    }
    session.run(cuda::batch_norm_backward_workspace(call.args), cuda::batch_norm_backward,
                call.args);
    if (plane) {
      convolution->backward(*plane, call.want_input ? &call.grad_input : nullptr,
                            call.want_weight ? &call.grad_weight : nullptr);
    }
  }
  return {call.grad_input, call.grad_weight, call.grad_bn_weight, call.grad_bn_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedcnn, CUDA, m) {
  m.impl("conv_batch_norm_relu_max_pool2d", TORCH_BOX(&conv_batch_norm_relu_max_pool2d_cuda));
  m.impl("conv_batch_norm_relu_max_pool2d_backward",
         TORCH_BOX(&conv_batch_norm_relu_max_pool2d_backward_cuda));
}

}  // namespace fusedcnn
