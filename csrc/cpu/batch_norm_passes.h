// The passes that stand around the convolutions of a block with batch normalisation: what each ISA
// has of them. Torch-free. core/batch_norm.h defines the quantities, batch_norm.cpp calls them.
//
// Each pass works on some rows of one image, in the calling thread. Image tensors are given as
// pointers to the image's first element, so that their n strides go unused. Arrays of channels,
// [OC], are of statistics_type, without gaps.
#pragma once

#include <cstdint>

#include "core/arguments.h"

namespace fusedcnn::cpu {

struct NormShape {
  Geometry geometry;
  DataType type;
  bool wide_code;
};

// From the convolution's outputs of some rows, their moments; and of some pooled rows, whose
// windows lie in the plane as far as they exist, the largest value and the code of the element that
// it comes from; in windows without elements 0 and off.
struct NormPoolArgs {
  const void* plane;  // [rows][conv w][OC], of the type, from row `plane_begin` of the image on
  int64_t plane_begin;
  int64_t conv_begin, conv_end;  // rows whose moments are added
  int64_t out_begin, out_end;    // pooled rows
  Moments* moments;              // [OC], added to
  void* extremum;                // [OC, OH, OW]
  void* code;                    // the same; null: not wanted
  Strides strides;               // of both, as the forward's output
  const uint8_t* ties;           // [OC]: where set, the first element wins; null: nowhere
};

// From the largest values, the block's output and final codes:
//   output = relu((value - mean - mean_rest) * scale + shift),   value: negated where `negated`
// Where that is not above zero the code becomes off.
struct NormOutputArgs {
  int64_t out_begin, out_end;
  void* extremum;  // in: the value negated where it is. out: the value
  void* output;    // may be the extremum, which is then lost
  void* code;      // null: not wanted
  Strides strides;
  const void *mean, *mean_rest, *scale, *shift;
  const uint8_t* negated;  // null: nowhere
};

// Where the code is on, of g = grad_output: the sums of g and of g * (extremum - mean).
struct NormSumsArgs {
  int64_t out_begin, out_end;
  const void* grad_output;
  Strides grad_output_strides;
  const void* code;
  Strides code_strides;
  const void* extremum;
  Strides extremum_strides;
  const void* mean;
  double *grads, *products;  // [OC], added to
};

// In place of the convolution's outputs y, the gradient that arrives at them:
//   (y - mean) * slope + offset + scale * (grad_output of the windows that y won)
struct NormGradientArgs {
  void* plane;  // [rows][conv w][OC], from row `plane_begin` of the image on
  int64_t plane_begin;
  int64_t conv_begin, conv_end;
  const void* grad_output;
  Strides grad_output_strides;
  const void* code;
  Strides code_strides;
  const void *mean, *slope, *offset, *scale;
};

// Sums of grad_weight, of statistics_type and without gaps, as [sums][OC][C / groups][taps]. The
// first is lost.
struct NormWeightArgs {
  void* sums;
  int64_t count;  // of sums, added in order
  int64_t out_channel_begin, out_channel_end;
  void* grad_weight;
  Strides strides;
};

struct NormPasses {
  void (*pool)(const NormShape& shape, const NormPoolArgs& args);
  void (*output)(const NormShape& shape, const NormOutputArgs& args);
  void (*sums)(const NormShape& shape, const NormSumsArgs& args);
  void (*gradient)(const NormShape& shape, const NormGradientArgs& args);
  // Values of any type from and to double, rounded once.
  void (*load)(DataType type, const void* from, int64_t stride, int64_t count, double* to);
  void (*store)(DataType type, const double* from, int64_t count, void* to);
  // Adds `count` values of the type to sums of statistics_type.
  void (*add)(DataType type, const void* values, int64_t count, void* sums);
  void (*weight)(const NormShape& shape, const NormWeightArgs& args);
};

}  // namespace fusedcnn::cpu
