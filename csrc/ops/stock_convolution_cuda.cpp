#include "ops/stock_convolution_cuda.h"

#include <algorithm>
#include <stdexcept>

#include "ops/checks.h"
#include "ops/torch_cuda.h"

namespace fusedcnn {
namespace {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

Tensor in_order(const Tensor& tensor, bool channels_last) {
  if (dense(tensor, channels_last)) return tensor;
  return torch::stable::contiguous(
      tensor, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

bool symmetric(const Geometry& g) {
  return g.h.padding == g.h.padding_after && g.w.padding == g.w.padding_after;
}

// What torch is called with: images that are padded beforehand have no padding left.
ConvolutionArgs call_args(const Geometry& g) {
  ConvolutionArgs args(g);
  if (!symmetric(g)) args.padding[0] = args.padding[1] = 0;
  return args;
}

// The input, padded where torch's convolution cannot.
Tensor image_of(const Tensor& input, const Geometry& g, bool channels_last) {
  if (symmetric(g)) return in_order(batched(input), channels_last);
  const int64_t sides[] = {g.w.padding, g.w.padding_after, g.h.padding, g.h.padding_after};
  return in_order(torch::stable::pad(batched(input), {sides, 4}), channels_last);
}

// `from`, which torch computed, as the gradient that the operator returns.
void put(Tensor* to, const Tensor& from) {
  const auto same = [](const auto& a, const auto& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  };
  if (same(to->sizes(), from.sizes()) && same(to->strides(), from.strides())) {
    *to = from;
  } else {
    torch::stable::copy_(*to, from);
  }
}

}  // namespace

const StockConvolution& cuda_convolution() {
  static const StockConvolution stock{
      reinterpret_cast<Convolution>(torch_cuda_function("aoti_torch_cuda_convolution")),
      reinterpret_cast<ConvolutionBackward>(
          torch_cuda_function("aoti_torch_cuda_convolution_backward"))};
  return stock;
}

bool plane_in_channels_last(const Tensor& input, const Tensor& weight, bool tensor_cores) {
  // The strides of one input channel fit both orders, and torch reads them as contiguous.
  if (weight.size(1) == 1 && input.size(input.dim() - 3) == 1) return false;
  // The caller's choice, where it is one: torch's own, too.
  if (is_channels_last(input) || is_channels_last(weight)) return true;
  // cuDNN's kernels on tensor cores are for channels_last, and it transposes what comes in planes
  // of channels: both operands, and the output back. Those on CUDA cores, Winograd's among them,
  // are for planes.
  return tensor_cores;
}

Tensor stock_convolution(const StockConvolution& stock, const Tensor& input, const Tensor& weight,
                         const Geometry& g, bool channels_last) {
  const WithoutGrad without_grad;
  const Tensor plane = convolution(stock.forward, image_of(input, g, channels_last),
                                   in_order(weight, channels_last), std::nullopt, call_args(g));
  // torch casts the operands of a convolution that is called under autocast.
  if (plane.scalar_type() != input.scalar_type()) {
    throw std::runtime_error("input: expected autocast's type, or autocast switched off");
  }
  return in_order(plane, channels_last);
}

Tensor empty_plane(const Tensor& like, const Geometry& g, bool channels_last) {
  return empty_image(like, true, g.batch, g.out_channels, g.h.conv, g.w.conv, like.scalar_type(),
                     channels_last);
}

void stock_convolution_backward(const StockConvolution& stock, const Tensor& plane,
                                const Tensor& input, const Tensor& weight, const Geometry& g,
                                bool channels_last, Tensor* grad_input, Tensor* grad_weight) {
  if (!grad_input && !grad_weight) return;
  const WithoutGrad without_grad;
  const ConvolutionArgs args = call_args(g);
  // Of an operand that is not read, only the sizes count. Its own memory may be gone; any other
  // order than the plane's, and torch would copy it.
  const auto stand_in = [&](int64_t n, int64_t c, int64_t h, int64_t w) {
    return empty_image(plane, true, n, c, h, w, plane.scalar_type(), channels_last);
  };
  const Tensor image = grad_weight
                           ? image_of(input, g, channels_last)
                           : stand_in(g.batch, g.in_channels, symmetric(g) ? g.h.in : g.h.padded(),
                                      symmetric(g) ? g.w.in : g.w.padded());
  const Tensor taps =
      grad_input ? in_order(weight, channels_last)
                 : stand_in(weight.size(0), weight.size(1), weight.size(2), weight.size(3));
  const ConvolutionGradients gradients =
      convolution_backward(stock.backward, plane, image, taps, args,
                           {grad_input != nullptr, grad_weight != nullptr, false});
  if (grad_input) {
    Tensor from = *gradients.input;
    if (!symmetric(g)) {
      from = torch::stable::narrow(from, 2, g.h.padding, g.h.in);
      from = torch::stable::narrow(from, 3, g.w.padding, g.w.in);
    }
    put(grad_input, grad_input->dim() == 3 ? torch::stable::squeeze(from, 0) : from);
  }
  if (grad_weight) put(grad_weight, *gradients.weight);
}

}  // namespace fusedcnn
