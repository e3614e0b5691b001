// grad_weight and grad_bias of a 3x3 convolution of stride 1 under a 2x2 pool: vectors of output
// channels where there are few input channels, vectors of input channels otherwise.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/backward_weight_winners_3x3_few_channels.h"
#include "cpu/kernels/backward_weight_winners_3x3_many_channels.h"
#include "cpu/kernels/block_3x3.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// The few_channels kernel's cost grows with each call, the other's with each vector of channels.
constexpr int64_t kFewChannels = kLanes<float> == 16 ? 2 * Patches::kChannels : 3;

const char* why_not_grad_weight_winners_3x3(const Problem& problem) {
  const Geometry& g = problem.geometry;
  // The general kernel fills vectors with all channels of three pixels.
  if (g.in_channels <= kFewChannels && g.out_channels < 8) {
    return "for few input channels at least 8 output channels";
  }
  return why_not_3x3_block(problem);
}

void grad_weight_winners_3x3(const BackwardArgs& args, const ThreadPool& pool) {
  for_block_storage(args.type, [&]<typename S>(S) {
    args.geometry.in_channels <= kFewChannels
        ? grad_weight_winners_3x3_few_channels<S>(args, pool)
        : grad_weight_winners_3x3_many_channels<S>(args, pool);
  });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
