#include "ops/stock_convolution.h"

#include "cpu/select.h"
#include "ops/checks.h"
#include "ops/convolution_call.h"

namespace fusedcnn {
namespace {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;

// oneDNN computes in the format of its operands; in this one a pixel's channels lie side by side.
Tensor channels_last(const Tensor& tensor, const cpu::ThreadPool& pool) {
  if (dense(tensor, true)) return tensor;
  if (!dense(tensor, false)) return torch::stable::contiguous(tensor, MemoryFormat::ChannelsLast);
  const Tensor to = empty_image(tensor, true, tensor.size(0), tensor.size(1), tensor.size(2),
                                tensor.size(3), tensor.scalar_type(), true);
  cpu::selected_isa().whole().list.to_channels_last(
      {element_size(check_type(tensor)), tensor.size(0), tensor.size(1),
       tensor.size(2) * tensor.size(3), tensor.const_data_ptr(), to.mutable_data_ptr()},
      pool);
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

}  // namespace fusedcnn
