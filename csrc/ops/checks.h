// Turns the operators' arguments into a Geometry, or throws an error that names the argument.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "core/geometry.h"

namespace fusedcnn {

// Sizes of the operator for these tensors. Input is [N, C, H, W] or [C, H, W] (batch 1).
// Throws std::runtime_error.
Geometry check_geometry(const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                        const std::vector<int64_t>& packed);

// The same for an input of these sizes, [N, C, H, W], and kPackedGeometrySize integers.
Geometry check_geometry(const int64_t (&input)[4], const torch::stable::Tensor& weight,
                        const int64_t* packed);

// The element type of `input`. Throws when no kernel has it.
DataType check_type(const torch::stable::Tensor& input);

bool same_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b);

// Throws unless `tensor` is on the device of `input` and of one of the types.
void check_tensor(const char* argument, const torch::stable::Tensor& tensor,
                  const torch::stable::Tensor& input,
                  std::initializer_list<torch::headeronly::ScalarType> types);

// Throws unless `tensor` is on the device of `input` and of the same type.
void check_like_input(const char* argument, const torch::stable::Tensor& tensor,
                      const torch::stable::Tensor& input);

// Throws unless `tensor` has this shape.
void check_shape(const char* argument, const torch::stable::Tensor& tensor,
                 const std::vector<int64_t>& expected);

// Throws unless the memory of every element is there: a storage can be released or cut short under
// its tensors (untyped_storage().resize_(0)), which sharding and offloading do.
void check_storage(const char* argument, const torch::stable::Tensor& tensor);

// Element strides as [N, C, H, W]; those of a [C, H, W] tensor get a batch stride of 0.
Strides strides_of(const torch::stable::Tensor& tensor);

// Whether torch's own layers would treat this 4-d tensor as channels_last.
bool is_channels_last(const torch::stable::Tensor& tensor);

// What torch's own allocator says of `bytes` that could not be had. Tools that look for the largest
// batch that fits know a shortage by these words.
std::string out_of_memory_text(int64_t bytes);

// An uninitialised tensor on the device of `like`: [n, c, h, w], or [c, h, w] when `batched` is
// false; dense, channels_last or contiguous.
torch::stable::Tensor empty_image(const torch::stable::Tensor& like, bool batched, int64_t n,
                                  int64_t c, int64_t h, int64_t w,
                                  torch::headeronly::ScalarType type, bool channels_last);

// An uninitialised tensor with device, type, sizes and strides of `like`, which is dense.
torch::stable::Tensor empty_twin(const torch::stable::Tensor& like);

torch::stable::Tensor empty_matrix(const torch::stable::Tensor& like, int64_t rows, int64_t columns,
                                   torch::headeronly::ScalarType type);

// An uninitialised contiguous tensor of one dimension on the device of `like`.
torch::stable::Tensor empty_vector(const torch::stable::Tensor& like, int64_t size,
                                   torch::headeronly::ScalarType type);

}  // namespace fusedcnn
