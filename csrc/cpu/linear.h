// What linear layers' kernels are called with. Torch-free.
#pragma once

#include <cstdint>

#include "core/geometry.h"
#include "cpu/kernel.h"

namespace fusedcnn::cpu {

// Dense, of float32 or float64: input [rows, in], weight [out, in], bias [out], output and the rest
// [rows, out].
struct LinearShape {
  DataType type;
  int64_t rows, in, out;
};

// output = input * weight^T + bias, through ReLU where that is asked for. NaN passes.
struct LinearArgs {
  LinearShape shape;
  const void *input, *weight, *bias;
  bool relu;
  const void* kept;  // null: no dropout; zeros and ones
  double keep;       // the share of ones
  void* output;
  void* dropped;  // output * (kept / keep)
};

// Gradients of the same, each null where it is not wanted. They are overwritten; without rows,
// grad_weight and grad_bias are zero.
struct LinearBackwardArgs {
  LinearShape shape;
  const void *grad, *input, *weight;
  const void* output;  // null: no ReLU
  const void* kept;
  double keep;
  void *grad_input, *grad_weight, *grad_bias;
};

// Working memory: 64 transposed rows, the gradient before dropout and ReLU, and for each thread two
// panels of 32 columns at most.
//
// Results depend neither on the number of threads nor on the run. Those of a row may depend, by
// rounding, on how many rows there are, as with other libraries' products of matrices.
struct LinearPasses {
  void (*forward)(const LinearArgs& args, const ThreadPool& pool);
  // The same without dropout, of few rows, whose results do not depend on how many there are.
  void (*by_rows)(const LinearArgs& args, const ThreadPool& pool);
  void (*backward)(const LinearBackwardArgs& args, const ThreadPool& pool);
};

}  // namespace fusedcnn::cpu
