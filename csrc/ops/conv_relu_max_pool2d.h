// The CPU's forward operator, for those that are made of it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace fusedcnn {

// output [N, OC, OH, OW] and code of the same shape, or of shape [0] when `with_code` is false.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> conv_relu_max_pool2d(
    const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
    const std::optional<torch::stable::Tensor>& bias, const std::vector<int64_t>& packed,
    bool with_code);

}  // namespace fusedcnn
