#include "ops/stock_convolution.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include "ops/checks.h"

namespace fusedcnn {
namespace {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

struct Pairs {
  int64_t stride[2], padding[2], dilation[2];
  static constexpr int64_t kNone[2] = {0, 0};  // output_padding

  explicit Pairs(const Geometry& g)
      : stride{g.h.stride, g.w.stride},
        padding{g.h.padding, g.w.padding},
        dilation{g.h.dilation, g.w.dilation} {}
};

Tensor batched(const Tensor& image) {
  return image.dim() == 4 ? image : torch::stable::unsqueeze(image, 0);
}

// oneDNN computes in the format of its operands; in this one a pixel's channels lie side by side.
Tensor channels_last(const Tensor& tensor) {
  return torch::stable::contiguous(tensor, MemoryFormat::ChannelsLast);
}

// Whether memory is [N, H, W, C] without gaps; the strides of sizes of 1 say nothing.
bool dense_channels_last(const Tensor& tensor) {
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

}  // namespace

Tensor stock_convolution(const Tensor& input, const Tensor& weight,
                         const std::optional<Tensor>& bias, const Geometry& g) {
  const Pairs pairs(g);
  const Tensor image = channels_last(batched(input)), taps = channels_last(weight);
  AtenTensorHandle bias_handle = bias ? bias->get() : nullptr, result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution(
      image.get(), taps.get(), bias ? &bias_handle : nullptr, pairs.stride, 2, pairs.padding, 2,
      pairs.dilation, 2, /*transposed=*/0, Pairs::kNone, 2, g.groups, &result));
  const Tensor plane(result);
  return dense_channels_last(plane) ? plane : channels_last(plane);
}

Tensor empty_plane(const Tensor& like, const Geometry& g) {
  return empty_image(like, true, g.batch, g.out_channels, g.h.conv, g.w.conv, like.scalar_type(),
                     true);
}

void stock_convolution_backward(const Tensor& plane, const Tensor& input, const Tensor& weight,
                                const Geometry& g, const std::optional<Tensor>& grad_input,
                                const std::optional<Tensor>& grad_weight,
                                const std::optional<Tensor>& grad_bias) {
  const Pairs pairs(g);
  const Tensor image = channels_last(batched(input)), taps = channels_last(weight);
  const int64_t* bias_sizes = &g.out_channels;
  const int32_t wanted[] = {grad_input.has_value(), grad_weight.has_value(), grad_bias.has_value()};
  AtenTensorHandle results[3] = {};
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution_backward(
      plane.get(), image.get(), taps.get(), grad_bias ? &bias_sizes : nullptr, 1, pairs.stride, 2,
      pairs.padding, 2, pairs.dilation, 2, /*transposed=*/0, Pairs::kNone, 2, g.groups, wanted, 3,
      &results[0], &results[1], &results[2]));
  const auto put = [](const std::optional<Tensor>& to, AtenTensorHandle result) {
    if (!result) return;
    const Tensor from(result);
    if (!to) return;
    Tensor target = to->dim() == 3 ? torch::stable::unsqueeze(*to, 0) : *to;
    torch::stable::copy_(target, from);
  };
  put(grad_input, results[0]);
  put(grad_weight, results[1]);
  put(grad_bias, results[2]);
}

}  // namespace fusedcnn
