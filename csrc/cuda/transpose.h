// Tensors from one order of dimensions to another, on CUDA: what a stock convolution needs that is
// called in channels_last, where the caller's tensors are contiguous.
#pragma once

#include "cuda/kernel.h"

namespace fusedcnn::cuda {

// Bits are moved, never computed with. `to` lies apart from `from`.
struct TransposeArgs {
  int64_t element_bytes;  // 1, 2, 4 or 8
  int64_t images, channels, rows, columns;
  const void* from;  // [images, channels, rows, columns]
  Strides strides;
  void* to;  // [images, rows, columns, channels] without gaps
};

// Each of `images` matrices without gaps, [rows][columns]: of a contiguous tensor, channels by
// pixels, for channels_last; of a channels_last one, pixels by channels, for contiguous.
inline TransposeArgs matrices(int64_t element_bytes, int64_t images, int64_t rows, int64_t columns,
                              const void* from, void* to) {
  return {element_bytes, images, rows, 1, columns, from, {rows * columns, columns, columns, 1}, to};
}

// One launch.
void transpose(const TransposeArgs& args, const Execution& execution);

}  // namespace fusedcnn::cuda
