// What a block with batch normalisation by the batch (convolution, normalisation, ReLU, max-pool)
// is called with, on every backend. Torch-free: raw pointers and sizes.
//
// y is the convolution's output without its bias; each channel has M = N * conv h * conv w of them.
// Mean and var (with the divisor M) are y's. With scale = bn_weight / sqrt(var + eps),
//   output = relu((extremum - mean) * scale + bn_bias).
// A window's extremum is its largest y, or its least where bn_weight is negative: normalisation and
// ReLU are monotone. The first wins a tie; where bn_weight is zero, all elements tie.
#pragma once

#include <cstdint>

#include "core/arguments.h"

namespace fusedcnn {

// bn_weight and bn_bias, both [OC] and of `type`; null: one, or zero.
struct Affine {
  DataType type;
  const void* weight;
  int64_t weight_stride;
  const void* bias;
  int64_t bias_stride;
};

// The type that a block's statistics have.
constexpr DataType statistics_type(DataType type) {
  return type == DataType::kFloat64 ? DataType::kFloat64 : DataType::kFloat32;
}

struct NormForwardArgs {
  // bias: y has none of it, but where it is not finite the channel's statistics and outputs are
  // NaN. code: off where the output is not above zero, as without batch normalisation.
  ForwardArgs block;
  Affine affine;
  double eps;
  void* extremum;  // [N, OC, OH, OW] of the block's type, with output's strides; null where code is
  void* mean;      // [OC] of statistics_type
  void* var;       // the same
};

struct NormBackwardArgs {
  BackwardArgs block;  // without the gradients, which differ from pass to pass
  Affine affine;       // bias is null: no gradient depends on it
  double eps;
  const void* extremum;  // [N, OC, OH, OW] of the block's type
  Strides extremum_strides;
  const void* mean;  // [OC] of statistics_type
  int64_t mean_stride;
  const void* var;
  int64_t var_stride;
  void* grad_bn_weight;  // [OC] of the affine type; null: not wanted
  void* grad_bn_bias;    // the same
};

}  // namespace fusedcnn
