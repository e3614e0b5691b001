// Strided tensors in memory of exactly the size that their elements span, with guarded gaps between
// the elements. The first byte past one end, by turns, lies on a page that nobody may touch; under
// AddressSanitizer both ends are the heap's, which it watches.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/geometry.h"

namespace selftest {

enum class Layout : int {
  kContiguous,
  kChannelsLast,
  kPadded,    // rows, planes and images apart from each other, as in a slice of a larger tensor
  kPermuted,  // no stride is 1, and W is the slowest dimension but the batch
  kCount
};
const char* name(Layout layout);

struct Shape {
  int64_t n, c, h, w;

  int64_t elements() const { return n * c * h * w; }
};

fusedcnn::Strides strides_for(Layout layout, Shape shape);

// One [N, C, H, W] tensor of `element_bytes` wide elements.
class Tensor {
 public:
  // The memory starts as `fill`, over and over. The default makes a NaN in all four element types.
  Tensor(Shape shape, fusedcnn::Strides strides, int64_t element_bytes, uint64_t fill = ~0ull);

  void* data() { return bytes_.get(); }
  const void* data() const { return bytes_.get(); }
  fusedcnn::Strides strides() const { return strides_; }

  // Element indices in the buffer, in the order of a contiguous tensor.
  const std::vector<int64_t>& places() const { return places_; }

  // Whether every byte that belongs to no element is still as it began.
  bool gaps_intact() const;

 private:
  fusedcnn::Strides strides_;
  int64_t element_bytes_;
  uint64_t fill_;
  int64_t size_;  // bytes
  std::unique_ptr<unsigned char[], std::function<void(unsigned char*)>> bytes_;
  std::vector<int64_t> places_;
};

// A tensor holding `values`, rounded to `type`, signalling NaNs in the gaps between them.
Tensor tensor_of(fusedcnn::DataType type, Shape shape, fusedcnn::Strides strides,
                 const std::vector<double>& values);
// A tensor of codes, bytes or int32.
Tensor codes_of(bool wide, Shape shape, fusedcnn::Strides strides,
                const std::vector<int32_t>& codes);

std::vector<double> values_of(fusedcnn::DataType type, const Tensor& tensor);
std::vector<int32_t> code_values_of(bool wide, const Tensor& tensor);

}  // namespace selftest
