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
  cpu::selected_isa().whole().list.transpose(
      {element_size(check_type(from)), from.size(0), from.size(1), from.size(2) * from.size(3),
       from.const_data_ptr(), to.mutable_data_ptr(), to_channels_last},
      pool);
}

Tensor empty_channels_last(const Tensor& tensor) {
  return empty_image(tensor, true, tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3),
                     tensor.scalar_type(), true);
}

// oneDNN computes in the format of its operands; in this one a pixel's channels lie side by side.
Tensor channels_last(const Tensor& tensor, const cpu::ThreadPool& pool) {
  if (dense(tensor, true)) return tensor;
  if (!dense(tensor, false)) return torch::stable::contiguous(tensor, MemoryFormat::ChannelsLast);
  const Tensor to = empty_channels_last(tensor);
  transpose(tensor, to, true, pool);
  return to;
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

void stock_grad_input(const Tensor& plane, const Tensor& input, const Tensor& weight,
                      const Geometry& g, const Tensor& grad_input, const cpu::ThreadPool& pool) {
  const WithoutGrad without_grad;
  const Tensor taps = channels_last(weight, pool);
  // Of the input only the sizes are wanted, and its memory may be gone.
  const Tensor from = *convolution_backward(aoti_torch_cpu_convolution_backward, plane,
                                            empty_channels_last(batched(input)), taps,
                                            ConvolutionArgs(g), {true, false, false})
                           .input;
  Tensor to = batched(grad_input);
  if (dense(from, true) && !dense(to, true) && dense(to, false)) {
    transpose(from, to, false, pool);
  } else {
    torch::stable::copy_(to, from);
  }
}

}  // namespace fusedcnn
