#include "ops/stock_convolution_cuda.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/transpose.h"
#include "ops/checks.h"
#include "ops/convolution_call.h"
#include "ops/torch_cuda.h"

namespace fusedcnn {
namespace {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

// libtorch_cuda's.
template <typename Function>
Function cuda_function(const char* name) {
  return reinterpret_cast<Function>(torch_cuda_function(name));
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

// Copies if one of the two is dense in channels_last and the other one contiguous, for which torch
// has no copy of its own. Returns whether they are.
bool turn(const Session& session, const Tensor& from, const Tensor& to) {
  for (const bool last : {false, true}) {
    if (!dense(from, !last) || !dense(to, last)) continue;
    const int64_t channels = to.size(1), pixels = to.size(2) * to.size(3);
    session.run(
        0, cuda::transpose,
        cuda::matrices(element_size(check_type(from)), to.size(0), last ? channels : pixels,
                       last ? pixels : channels, from.const_data_ptr(), to.mutable_data_ptr()));
    return true;
  }
  return false;
}

}  // namespace

bool in_channels_last(const Session& session, const Tensor& input, const Tensor& weight) {
  // The strides of one input channel fit both orders, and torch reads them as contiguous.
  if (weight.size(1) == 1 && input.size(input.dim() - 3) == 1) return false;
  // The caller's choice, where it is one: torch's own, too.
  if (is_channels_last(input) || is_channels_last(weight)) return true;
  // cuDNN's kernels on tensor cores are for channels_last, and it transposes what comes in planes
  // of channels: both operands, and the output back. Those on CUDA cores, Winograd's among them,
  // are for planes.
  return session.on_tensor_cores(check_type(input));
}

StockConvolution::StockConvolution(const Session& session, const Tensor& input,
                                   const Tensor& weight, const Geometry& g, Reads reads)
    : session_(session),
      g_(g),
      channels_last_(in_channels_last(session, input, weight)),
      image_(image_of(input, reads.input)),
      taps_(taps_of(weight, reads.weight)) {}

Tensor StockConvolution::empty(const Tensor& like, int64_t n, int64_t c, int64_t h,
                               int64_t w) const {
  return empty_image(like, true, n, c, h, w, like.scalar_type(), channels_last_);
}

Tensor StockConvolution::in_order(const Tensor& tensor) const {
  if (dense(tensor, channels_last_)) return tensor;
  if (!dense(tensor, !channels_last_)) {
    return torch::stable::contiguous(
        tensor, channels_last_ ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }
  const Tensor to = empty(tensor, tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3));
  turn(session_, tensor, to);
  return to;
}

// Of an operand that is not read, only the sizes count. Its own memory may be gone; any other order
// than the plane's, and torch would copy it.
Tensor StockConvolution::image_of(const Tensor& input, bool read) const {
  const WithoutGrad without_grad;
  const bool pad = !symmetric(g_);
  if (!read) {
    return empty(input, g_.batch, g_.in_channels, pad ? g_.h.padded() : g_.h.in,
                 pad ? g_.w.padded() : g_.w.in);
  }
  const Tensor images = batched(input);
  if (!pad) return in_order(images);
  // Padded where torch's convolution cannot.
  const int64_t sides[] = {g_.w.padding, g_.w.padding_after, g_.h.padding, g_.h.padding_after};
  return in_order(torch::stable::pad(images, {sides, 4}));
}

Tensor StockConvolution::taps_of(const Tensor& weight, bool read) const {
  const WithoutGrad without_grad;
  if (read) return in_order(weight);
  return empty(weight, weight.size(0), weight.size(1), weight.size(2), weight.size(3));
}

Tensor StockConvolution::plane() const {
  static const auto function = cuda_function<Convolution>("aoti_torch_cuda_convolution");
  const WithoutGrad without_grad;
  const Tensor plane = convolution(function, image_, taps_, std::nullopt, call_args(g_));
  // torch casts the operands of a convolution that is called under autocast.
  if (plane.scalar_type() != image_.scalar_type()) {
    throw std::runtime_error("input: expected autocast's type, or autocast switched off");
  }
  return in_order(plane);
}

void StockConvolution::backward(const Tensor& plane, Tensor* grad_input,
                                Tensor* grad_weight) const {
  static const auto function =
      cuda_function<ConvolutionBackward>("aoti_torch_cuda_convolution_backward");
  if (!grad_input && !grad_weight) return;
  const WithoutGrad without_grad;
  const ConvolutionGradients gradients =
      convolution_backward(function, plane, image_, taps_, call_args(g_),
                           {grad_input != nullptr, grad_weight != nullptr, false});
  if (grad_input) {
    Tensor from = *gradients.input;
    if (!symmetric(g_)) {
      from = torch::stable::narrow(from, 2, g_.h.padding, g_.h.in);
      from = torch::stable::narrow(from, 3, g_.w.padding, g_.w.in);
    }
    put(grad_input, grad_input->dim() == 3 ? torch::stable::squeeze(from, 0) : from);
  }
  if (grad_weight) put(grad_weight, *gradients.weight);
}

// `from`, which torch computed, as the gradient that the operator returns.
void StockConvolution::put(Tensor* to, const Tensor& from) const {
  const auto same = [](const auto& a, const auto& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  };
  if (same(to->sizes(), from.sizes()) && same(to->strides(), from.strides())) {
    *to = from;
  } else if (!turn(session_, batched(from), batched(*to))) {
    torch::stable::copy_(*to, from);
  }
}

}  // namespace fusedcnn
