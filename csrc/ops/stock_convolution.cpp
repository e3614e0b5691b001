#include "ops/stock_convolution.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/select.h"
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

Tensor batched(const Tensor& image) {
  return image.dim() == 4 ? image : torch::stable::unsqueeze(image, 0);
}

// Whether memory is [N, H, W, C], or [N, C, H, W], without gaps; strides of sizes of 1 say nothing.
bool dense(const Tensor& tensor, bool channels_last) {
  constexpr int kOrders[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
  int64_t expected = 1;
  for (const int d : kOrders[channels_last]) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

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
void put(const std::optional<Tensor>& to, AtenTensorHandle result, const cpu::ThreadPool& pool) {
  if (!result) return;
  const Tensor from(result);
  if (!to) return;
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
  const Pairs pairs(g);
  const Tensor image = channels_last(batched(input), pool), taps = channels_last(weight, pool);
  AtenTensorHandle bias_handle = bias ? bias->get() : nullptr, result = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution(
      image.get(), taps.get(), bias ? &bias_handle : nullptr, pairs.stride, 2, pairs.padding, 2,
      pairs.dilation, 2, /*transposed=*/0, Pairs::kNone, 2, g.groups, &result));
  return channels_last(Tensor(result), pool);
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
  const Pairs pairs(g);
  const Tensor image = channels_last(batched(input), pool), taps = channels_last(weight, pool);
  const int64_t* bias_sizes = &g.out_channels;
  const int32_t wanted[] = {grad_input.has_value(), grad_weight.has_value(), grad_bias.has_value()};
  AtenTensorHandle results[3] = {};
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution_backward(
      plane.get(), image.get(), taps.get(), grad_bias ? &bias_sizes : nullptr, 1, pairs.stride, 2,
      pairs.padding, 2, pairs.dilation, 2, /*transposed=*/0, Pairs::kNone, 2, g.groups, wanted, 3,
      &results[0], &results[1], &results[2]));
  put(grad_input, results[0], pool);
  put(grad_weight, results[1], pool);
  put(grad_bias, results[2], pool);
}

}  // namespace fusedcnn
