// torch's convolution through its C interface, on any device: the device's functions are
// parameters.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "core/geometry.h"

namespace fusedcnn {

using Convolution = decltype(&aoti_torch_cpu_convolution);
using ConvolutionBackward = decltype(&aoti_torch_cpu_convolution_backward);

// A geometry's convolution as torch takes it: with as many zeros after an image as before it. Where
// there is one output, the geometry has any stride, and torch one that leaves no room for a second.
struct ConvolutionArgs {
  int64_t stride[2], padding[2], dilation[2];
  int64_t groups, out_channels;
  static constexpr int64_t kNone[2] = {0, 0};  // output_padding

  explicit ConvolutionArgs(const Geometry& g)
      : stride{stride_of(g.h), stride_of(g.w)},
        padding{g.h.padding, g.w.padding},
        dilation{g.h.dilation, g.w.dilation},
        groups(g.groups),
        out_channels(g.out_channels) {}

 private:
  static int64_t stride_of(const Axis& axis) {
    return axis.conv > 1 ? axis.stride : axis.padded() - axis.extent() + 1;
  }
};

inline torch::stable::Tensor convolution(Convolution function, const torch::stable::Tensor& image,
                                         const torch::stable::Tensor& weight,
                                         const std::optional<torch::stable::Tensor>& bias,
                                         const ConvolutionArgs& args) {
  AtenTensorHandle bias_handle = bias ? bias->get() : nullptr, result = nullptr;
  TORCH_ERROR_CODE_CHECK(function(
      image.get(), weight.get(), bias ? &bias_handle : nullptr, args.stride, 2, args.padding, 2,
      args.dilation, 2, /*transposed=*/0, ConvolutionArgs::kNone, 2, args.groups, &result));
  return torch::stable::Tensor(result);
}

struct Wanted {
  bool input, weight, bias;
};
struct ConvolutionGradients {
  std::optional<torch::stable::Tensor> input, weight, bias;
};

// plane: of the convolution's output.
inline ConvolutionGradients convolution_backward(ConvolutionBackward function,
                                                 const torch::stable::Tensor& plane,
                                                 const torch::stable::Tensor& image,
                                                 const torch::stable::Tensor& weight,
                                                 const ConvolutionArgs& args, Wanted wanted) {
  const int64_t* bias_sizes = &args.out_channels;
  const int32_t mask[] = {wanted.input, wanted.weight, wanted.bias};
  AtenTensorHandle results[3] = {};
  TORCH_ERROR_CODE_CHECK(function(
      plane.get(), image.get(), weight.get(), wanted.bias ? &bias_sizes : nullptr, 1, args.stride,
      2, args.padding, 2, args.dilation, 2, /*transposed=*/0, ConvolutionArgs::kNone, 2,
      args.groups, mask, 3, &results[0], &results[1], &results[2]));
  const auto own = [](AtenTensorHandle result) {
    return result ? std::optional(torch::stable::Tensor(result)) : std::nullopt;
  };
  return {own(results[0]), own(results[1]), own(results[2])};
}

// Nothing that is called here is recorded for a backward: the operator's own is.
class WithoutGrad {
 public:
  WithoutGrad() : before_(aoti_torch_grad_mode_is_enabled()) {
    aoti_torch_grad_mode_set_enabled(false);
  }
  ~WithoutGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  WithoutGrad(const WithoutGrad&) = delete;
  WithoutGrad& operator=(const WithoutGrad&) = delete;

 private:
  const bool before_;
};

inline torch::stable::Tensor batched(const torch::stable::Tensor& image) {
  return image.dim() == 4 ? image : torch::stable::unsqueeze(image, 0);
}

// Whether memory is [N, H, W, C], or [N, C, H, W], without gaps; strides of sizes of 1 say nothing.
inline bool dense(const torch::stable::Tensor& tensor, bool channels_last) {
  constexpr int kOrders[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
  int64_t expected = 1;
  for (const int d : kOrders[channels_last]) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

}  // namespace fusedcnn
