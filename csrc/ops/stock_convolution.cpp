#include "ops/stock_convolution.h"

#include "cpu/select.h"
#include "ops/checks.h"
#include "ops/convolution_call.h"

namespace fusedcnn {
namespace {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

void transpose(const Tensor& from, const Tensor& to, bool to_channels_last,
               const cpu::ThreadPool& pool) {
  const cpu::Isa* isa = &cpu::selected_isa();
  while (isa->base) isa = isa->base;
  isa->list.transpose(
      {element_size(check_type(from)), from.size(0), from.size(1), from.size(2) * from.size(3),
       from.const_data_ptr(), to.mutable_data_ptr(), to_channels_last},
      pool);
}

// oneDNN computes in the format of its operands; in this one a pixel's channels lie side by side.
Tensor channels_last(const Tensor& tensor, const cpu::ThreadPool& pool) {
  if (dense(tensor, true)) return tensor;
  if (!dense(tensor, false)) return torch::stable::contiguous(tensor, MemoryFormat::ChannelsLast);
  const Tensor to = empty_image(tensor, true, tensor.size(0), tensor.size(1), tensor.size(2),
                                tensor.size(3), tensor.scalar_type(), true);
  transpose(tensor, to, true, pool);
  return to;
}

// The gradient that torch computed, into the one that the operator returns.
void put(const std::optional<Tensor>& to, const std::optional<Tensor>& result,
         const cpu::ThreadPool& pool) {
  if (!to) return;
  const Tensor& from = *result;
  Tensor target = to->dim() == 3 ? torch::stable::unsqueeze(*to, 0) : *to;
  if (from.dim() == 4 && dense(from, true) && !dense(target, true) && dense(target, false)) {
    return transpose(from, target, false, pool);
  }
  torch::stable::copy_(target, from);
}

}  // namespace

Tensor stock_convolution(const Tensor& input, const Tensor& weight,
                         const std::optional<Tensor>& bias, const Geometry& g,
                         const cpu::ThreadPool& pool) {
  const WithoutGrad without_grad;
  const Tensor image = channels_last(batched(input), pool), taps = channels_last(weight, pool);
  return channels_last(
      convolution(aoti_torch_cpu_convolution, image, taps, bias, ConvolutionArgs(g)), pool);
}

Tensor empty_plane(const Tensor& like, const Geometry& g) {
  return empty_image(like, true, g.batch, g.out_channels, g.h.conv, g.w.conv, like.scalar_type(),
                     true);
}

void stock_convolution_backward(const Tensor& plane, const Tensor& input, const Tensor& weight,
                                const Geometry& g, const std::optional<Tensor>& grad_input,
                                const std::optional<Tensor>& grad_weight,
                                const std::optional<Tensor>& grad_bias,
                                const cpu::ThreadPool& pool) {
  const WithoutGrad without_grad;
  const Tensor image = channels_last(batched(input), pool), taps = channels_last(weight, pool);
  const ConvolutionGradients gradients = convolution_backward(
      aoti_torch_cpu_convolution_backward, plane, image, taps, ConvolutionArgs(g),
      {grad_input.has_value(), grad_weight.has_value(), grad_bias.has_value()});
  put(grad_input, gradients.input, pool);
  put(grad_weight, gradients.weight, pool);
  put(grad_bias, gradients.bias, pool);
}

}  // namespace fusedcnn
