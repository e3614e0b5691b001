// grad_weight and grad_bias of a 3x3 convolution of stride 1 under a 2x2 pool: vectors of output
// channels where there are few input channels, vectors of input channels otherwise.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/backward_weight_winners_3x3_wide.h"
#include "cpu/kernels/block_3x3.h"
#if defined(__AVX512BW__)
#include "cpu/kernels/backward_weight_winners_3x3_narrow.h"
#endif

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

#if defined(__AVX512BW__)
// Twice as many as one call of the narrow kernel takes: its cost grows with each call, the wide
// one's with each block.
constexpr int64_t kNarrowChannels = 2 * kWeightChannels;
#else
constexpr int64_t kNarrowChannels = 0;
#endif

const char* why_not_grad_weight_winners_3x3(const Problem& problem) {
  const Geometry& g = problem.geometry;
  // The general kernel fills vectors with all channels of three pixels.
  if (g.in_channels <= kNarrowChannels && g.out_channels < 8) {
    return "for few input channels at least 8 output channels";
  }
  return why_not_3x3_block(problem);
}

void grad_weight_winners_3x3(const BackwardArgs& args, const ThreadPool& pool) {
  for_block_storage(args.type, [&]<typename S>(S) {
#if defined(__AVX512BW__)
    if (args.geometry.in_channels <= kNarrowChannels) {
      return grad_weight_winners_3x3_narrow<S>(args, pool);
    }
#endif
    grad_weight_winners_3x3_wide<S>(args, pool);
  });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
