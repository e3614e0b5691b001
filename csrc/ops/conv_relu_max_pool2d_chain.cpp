// The CPU implementation of the operator for blocks in a row and the fully connected layers behind
// them: checks, selection, call. Its schema is in conv_relu_max_pool2d.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/chain.h"
#include "cpu/select.h"
#include "ops/calls.h"
#include "ops/checks.h"
#include "ops/choose.h"
#include "ops/conv_relu_max_pool2d.h"
#include "ops/convolution_call.h"
#include "ops/torch_threads.h"

namespace fusedcnn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] void fail(const std::string& message) { throw std::runtime_error(message); }

std::string parameter(size_t i) { return "parameters[" + std::to_string(i) + "]"; }

void check_parameter(size_t i, const Tensor& tensor, const Tensor& input, int64_t rank) {
  // Names are made only of what is wrong.
  try {
    check_like_input("", tensor, input);
    check_storage("", tensor);
  } catch (const std::runtime_error& error) {
    fail(parameter(i) + error.what());
  }
  if (tensor.dim() != rank) {
    fail(parameter(i) + ": expected " + std::to_string(rank) + " dimensions, got " +
         std::to_string(tensor.dim()));
  }
}

void check_bias(size_t i, const Tensor& bias, int64_t size) {
  if (bias.size(0) == size) return;
  fail(parameter(i) + ": expected [" + std::to_string(size) + "], as the weight before it has, " +
       "got [" + std::to_string(bias.size(0)) + "]");
}

// Of one block; there may be one for all.
const int64_t* geometry_of(size_t block, const std::vector<int64_t>& geometries) {
  const bool one = geometries.size() == kPackedGeometrySize;
  return geometries.data() + (one ? 0 : block * kPackedGeometrySize);
}

// One operator for a block after the other, where one needs the stock convolution or is measured.
Tensor by_block(const Tensor& input, size_t blocks, const std::vector<Tensor>& parameters,
                const std::vector<int64_t>& geometries) {
  Tensor images = input;
  for (size_t i = 0; i < blocks; ++i) {
    const int64_t* const packed = geometry_of(i, geometries);
    images = std::get<0>(conv_relu_max_pool2d(
        images, parameters[2 * i], parameters[2 * i + 1],
        std::vector<int64_t>(packed, packed + kPackedGeometrySize), /*with_code=*/false));
  }
  return images;
}

// What a call is made of, layer by layer.
struct Chain {
  const Tensor& input;
  const std::vector<Tensor>& parameters;
  cpu::ChainArgs args;
  int64_t sizes[4];  // of what the next layer takes
  size_t at = 0;     // its weight among the parameters
  double multiply_adds = 0;
  bool by_block = cpu::benchmarking();  // what a kernel around the stock convolution needs, too
  std::vector<Tensor> kept;             // copies of parameters that do not lie in one piece

  Chain(const Tensor& input, const std::vector<Tensor>& parameters)
      : input(input),
        parameters(parameters),
        sizes{input.size(0), input.size(1), input.size(2), input.size(3)} {
    args.batch = sizes[0];
    args.input = static_cast<const float*>(input.const_data_ptr());
    args.input_strides = strides_of(input);
    args.linear = cpu::selected_isa().whole().list.linear;
  }

  void add_block(const int64_t* packed) {
    const Tensor &weight = parameters[at], &bias = parameters[at + 1];
    check_parameter(at, weight, input, 4);
    check_parameter(at + 1, bias, input, 1);
    const Geometry g = geometry(weight, packed);
    check_bias(at + 1, bias, g.out_channels);
    ForwardArgs call{};
    call.geometry = g;
    call.type = DataType::kFloat32;
    call.wide_code = g.window() > kLargestByteWindow;
    call.weight = weight.const_data_ptr();
    call.weight_strides = strides_of(weight);
    call.bias = bias.const_data_ptr();
    call.bias_stride = bias.stride(0);
    const cpu::Kernel* kernel = nullptr;
    if (args.batch > 0) {
      // Between blocks images are contiguous.
      const Strides strides = at == 0 ? args.input_strides : Strides{0, 0, 0, 1};
      kernel = &choose(Pass::kForward, problem_of(g, call.type, call.wide_code, strides));
      by_block = by_block || kernel->library;
    }
    args.blocks.push_back({call, kernel, thread_pool(g)});
    multiply_adds += fusedcnn::multiply_adds(g);
    sizes[1] = g.out_channels;
    sizes[2] = g.h.out;
    sizes[3] = g.w.out;
    at += 2;
  }

  void add_layer() {
    check_parameter(at, parameters[at], input, 2);
    check_parameter(at + 1, parameters[at + 1], input, 1);
    const Tensor weight = in_one_piece(parameters[at]), bias = in_one_piece(parameters[at + 1]);
    const int64_t features = sizes[1] * sizes[2] * sizes[3];
    if (weight.size(1) != features) {
      fail(parameter(at) + ": expected [out_features, " + std::to_string(features) +
           "], as many as the layer before it returns, got [" + std::to_string(weight.size(0)) +
           ", " + std::to_string(weight.size(1)) + "]");
    }
    check_bias(at + 1, bias, weight.size(0));
    cpu::LinearArgs call{};
    call.rows = args.batch;
    call.in_features = features;
    call.out_features = weight.size(0);
    call.weight = static_cast<const float*>(weight.const_data_ptr());
    call.bias = static_cast<const float*>(bias.const_data_ptr());
    call.relu = at + 2 < parameters.size();
    const double products = double(args.batch) * double(features) * double(call.out_features);
    args.layers.push_back({call, thread_pool(products)});
    multiply_adds += products;
    sizes[1] = call.out_features;
    sizes[2] = sizes[3] = 1;
    at += 2;
  }

  Tensor in_one_piece(const Tensor& tensor) {
    if (tensor.is_contiguous()) return tensor;
    const WithoutGrad without_grad;
    kept.push_back(torch::stable::contiguous(tensor));
    return kept.back();
  }

 private:
  Geometry geometry(const Tensor& weight, const int64_t* packed) const {
    try {
      return check_geometry(sizes, weight, packed);
    } catch (const std::runtime_error& error) {
      fail("block " + std::to_string(at / 2) + ": " + error.what());
    }
  }
};

// parameters: weight and bias in turn of each block, then of each fully connected layer; between
// those there is ReLU. geometries: of the blocks, one behind the other, or one for all.
// Returns [N, OC, OH, OW] of the last block, or [N, out_features] of the last layer.
Tensor conv_relu_max_pool2d_chain(const Tensor& input, const std::vector<Tensor>& parameters,
                                  const std::vector<int64_t>& geometries) {
  if (parameters.empty() || parameters.size() % 2 != 0) {
    fail("parameters: expected a weight and a bias for each block and layer, got " +
         std::to_string(parameters.size()) + " tensors");
  }
  size_t blocks = 1;  // the weights of four dimensions
  while (2 * blocks < parameters.size() && parameters[2 * blocks].dim() == 4) ++blocks;
  if (geometries.size() != kPackedGeometrySize &&
      geometries.size() != blocks * kPackedGeometrySize) {
    fail("geometries: expected " + std::to_string(kPackedGeometrySize) + " integers, or as many " +
         "for each of " + std::to_string(blocks) + " blocks, got " +
         std::to_string(geometries.size()));
  }
  check_tensor("input", input, input, {ScalarType::Float});
  if (input.dim() != 4) {
    fail("input: expected [N, C, H, W], got " + std::to_string(input.dim()) + " dimensions");
  }
  check_storage("input", input);
  Chain chain(input, parameters);
  for (size_t i = 0; i < blocks; ++i) chain.add_block(geometry_of(i, geometries));
  while (chain.at < parameters.size()) chain.add_layer();

  cpu::ChainArgs& args = chain.args;
  const int64_t n = args.batch;
  const Tensor output = args.layers.empty()
                            ? empty_image(input, true, n, chain.sizes[1], chain.sizes[2],
                                          chain.sizes[3], ScalarType::Float, false)
                            : empty_matrix(input, n, chain.sizes[1], ScalarType::Float);
  if (n == 0) return output;
  args.output = static_cast<float*>(output.mutable_data_ptr());
  Tensor images = input;
  if (chain.by_block) {
    images = chain.in_one_piece(by_block(input, blocks, parameters, geometries));
    if (args.layers.empty()) return images;
    args.input = static_cast<const float*>(images.const_data_ptr());
    args.input_strides = strides_of(images);
    args.blocks.clear();
  }
  with_memory([&] {
    // So few images that threads would wait for each other: each layer is shared out instead.
    const int64_t threads = torch::stable::get_num_threads();
    const bool few = threads > 1 && n < 2 * threads;
    const cpu::ThreadPool pool = thread_pool(chain.multiply_adds);
    cpu::chain_forward(args, few ? nullptr : &pool);
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedcnn, CPU, m) {
  m.impl("conv_relu_max_pool2d_chain", TORCH_BOX(&conv_relu_max_pool2d_chain));
}

}  // namespace fusedcnn
