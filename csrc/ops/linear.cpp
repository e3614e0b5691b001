// A linear layer with ReLU and dropout, for layers whose weights fit the caches: the CPU operator
// behind FusedSimpleCNN's training. Gradients are recorded by who calls it.
#include "cpu/linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/select.h"
#include "ops/checks.h"
#include "ops/torch_threads.h"

namespace fusedcnn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const cpu::LinearPasses& passes() { return *cpu::selected_isa().whole().list.linear; }

cpu::LinearShape check_linear(const Tensor& input, const Tensor& weight) {
  check_tensor("input", input, input, {ScalarType::Float, ScalarType::Double});
  check_like_input("weight", weight, input);
  if (input.dim() != 2) throw std::runtime_error("input: expected [N, in_features]");
  if (weight.dim() != 2) throw std::runtime_error("weight: expected [out_features, in_features]");
  check_shape("weight", weight, {weight.size(0), input.size(1)});
  check_storage("input", input);
  check_storage("weight", weight);
  return {check_type(input), input.size(0), input.size(1), weight.size(0)};
}

void check_result(const char* argument, const Tensor& tensor, const Tensor& input,
                  const cpu::LinearShape& s) {
  check_like_input(argument, tensor, input);
  check_shape(argument, tensor, {s.rows, s.out});
  check_storage(argument, tensor);
}

// Row by row without gaps; a vector likewise.
Tensor dense(const Tensor& tensor) {
  const int64_t rank = tensor.dim();
  const bool rows = rank == 1 || tensor.stride(0) == tensor.size(1);
  return rows && tensor.stride(rank - 1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}

const void* data(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

cpu::ThreadPool pool_of(const cpu::LinearShape& s) {
  return thread_pool(double(s.rows) * double(s.in) * double(s.out));
}

std::tuple<Tensor, Tensor> linear(const Tensor& input, const Tensor& weight, const Tensor& bias,
                                  bool relu, const std::optional<Tensor>& kept, double keep) {
  const cpu::LinearShape s = check_linear(input, weight);
  check_like_input("bias", bias, input);
  check_shape("bias", bias, {s.out});
  check_storage("bias", bias);
  if (kept) check_result("kept", *kept, input, s);
  const Tensor rows = dense(input), columns = dense(weight), shift = dense(bias);
  const std::optional<Tensor> ones = dense(kept);
  Tensor output = empty_matrix(input, s.rows, s.out);
  Tensor dropped =
      kept ? empty_matrix(input, s.rows, s.out) : empty_vector(input, 0, input.scalar_type());
  const cpu::LinearArgs args{s,
                             rows.const_data_ptr(),
                             columns.const_data_ptr(),
                             shift.const_data_ptr(),
                             relu,
                             data(ones),
                             keep,
                             output.mutable_data_ptr(),
                             kept ? dropped.mutable_data_ptr() : nullptr};
  with_memory([&] { passes().forward(args, pool_of(s)); });
  return {output, dropped};
}

// A gradient that is not wanted comes back with shape [0].
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& input,
                                                   const Tensor& weight,
                                                   const std::optional<Tensor>& output,
                                                   const std::optional<Tensor>& kept, double keep,
                                                   int64_t output_mask) {
  const cpu::LinearShape s = check_linear(input, weight);
  check_result("grad", grad, input, s);
  if (output) check_result("output", *output, input, s);
  if (kept) check_result("kept", *kept, input, s);
  if (output_mask < 0 || output_mask > 7) {
    throw std::runtime_error("output_mask: expected 0 to 7, got " + std::to_string(output_mask));
  }
  const Tensor incoming = dense(grad), rows = dense(input), columns = dense(weight);
  const std::optional<Tensor> after = dense(output), ones = dense(kept);
  const auto matrix = [&](bool wanted, int64_t height) {
    return wanted ? empty_matrix(input, height, s.in) : empty_vector(input, 0, input.scalar_type());
  };
  Tensor grad_input = matrix(output_mask & 1, s.rows), grad_weight = matrix(output_mask & 2, s.out);
  Tensor grad_bias = empty_vector(input, output_mask & 4 ? s.out : 0, input.scalar_type());
  const auto place = [&](int64_t bit, Tensor& tensor) {
    return output_mask & bit ? tensor.mutable_data_ptr() : nullptr;
  };
  const cpu::LinearBackwardArgs args{s,
                                     incoming.const_data_ptr(),
                                     rows.const_data_ptr(),
                                     columns.const_data_ptr(),
                                     data(after),
                                     data(ones),
                                     keep,
                                     place(1, grad_input),
                                     place(2, grad_weight),
                                     place(4, grad_bias)};
  with_memory([&] { passes().backward(args, pool_of(s)); });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedcnn, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
}

}  // namespace fusedcnn
