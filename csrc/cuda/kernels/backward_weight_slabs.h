// What the grad_weight kernels share: sums over slabs of the pooled outputs, and a second stage
// that adds up the slabs in order.
#pragma once

#include "cuda/device.h"
#include "cuda/kernel.h"
#include "cuda/kernels/sizes.h"
#include "cuda/launch.h"

namespace fusedcnn::cuda {
namespace {

constexpr int kWeightThreads = 256;
constexpr int kWeightChannels = kWeightThreads / kWarp;  // output channels of a block
constexpr int kTaps = 4;                                 // weights of a lane
constexpr int kTapBlock = kTaps * kWarp;                 // weights of a warp
// Pooled outputs of one image that are summed in one chain; chains are then added up, since one
// long chain would round more than the stock layers do.
constexpr int kUnit = 128;
// Warps' worth of blocks to aim at: 8 blocks on each of 132 multiprocessors, twice over.
constexpr int64_t kWantedBlocks = 2048;
constexpr int64_t kMostPartialBytes = int64_t{64} << 20;

struct WeightSizes {
  AxisSizes h, w;
  int channels, out_channels;  // of a group
  int groups, channel_blocks, tap_blocks;
  int row;  // partial sums of one output channel: [channels][KH][KW], then the bias's
  int outputs, units_per_image;
  int64_t units, slabs;
};

// `wanted` slabs, or as many as there are units, or as kMostPartialBytes hold where each takes
// `bytes`: the least of these, and at least one.
inline int64_t slab_count(int64_t wanted, int64_t units, int64_t bytes) {
  const int64_t most = kMostPartialBytes / bytes < units ? kMostPartialBytes / bytes : units;
  const int64_t count = wanted < most ? wanted : most;
  return count < 1 ? 1 : count;
}

inline WeightSizes weight_sizes(const Geometry& g, int64_t element) {
  WeightSizes s{};
  s.h = sizes_of(g.h);
  s.w = sizes_of(g.w);
  s.channels = static_cast<int>(g.in_channels_per_group());
  s.out_channels = static_cast<int>(g.out_channels_per_group());
  s.groups = static_cast<int>(g.groups);
  s.channel_blocks = (s.out_channels + kWeightChannels - 1) / kWeightChannels;
  const int weights = s.channels * static_cast<int>(g.taps());
  s.tap_blocks = (weights + kTapBlock - 1) / kTapBlock;
  s.row = weights + 1;
  s.outputs = static_cast<int>(g.outputs());
  s.units_per_image = (s.outputs + kUnit - 1) / kUnit;
  s.units = g.batch * s.units_per_image;
  s.slabs =
      slab_count(kWantedBlocks / (static_cast<int64_t>(s.groups) * s.channel_blocks * s.tap_blocks),
                 s.units, g.out_channels * s.row * element);
  return s;
}

// Threads of the second stage: a warp's lanes have neighbouring sums, and its warps divide the
// slabs among them, since one thread would wait for each of hundreds of loads in turn.
constexpr int kFinishThreads = 512, kFinishWarps = kFinishThreads / kWarp;

// Adds up the slabs of every weight and of every bias, in an order that depends on nothing but
// their number. In double: there may be many slabs, few numbers, and the terms may cancel.
template <typename S>
FUSEDCNN_KERNEL(kFinishThreads)
grad_weight_finish_kernel(BackwardArgs args, WeightSizes sizes, const Accumulator<S>* partial) {
  using T = Accumulator<S>;
  SharedMemory memory;
  const Shared<double> sums = memory.array<double>(kFinishThreads);
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int taps = sizes.h.kernel * sizes.w.kernel;
  const int64_t size = static_cast<int64_t>(sizes.groups) * sizes.out_channels * sizes.row;
  for (int64_t first = block_index() * kWarp; first < size; first += grid_blocks() * kWarp) {
    const int64_t i = first + lane;
    double sum = 0;
    if (i < size) {
      for (int64_t slab = warp; slab < sizes.slabs; slab += kFinishWarps) {
        sum += partial[slab * size + i];
      }
    }
    sums[thread_index()] = sum;
    sync_threads();
    const int64_t oc = i / sizes.row;
    const int k = static_cast<int>(i % sizes.row);
    const bool is_bias = k == sizes.row - 1;
    if (warp == 0 && i < size && (is_bias ? args.grad_bias : args.grad_weight)) {
      for (int other = 1; other < kFinishWarps; ++other) sum += sums[other * kWarp + lane];
      const S result = narrow<S>(static_cast<T>(sum));
      if (is_bias) {
        static_cast<S*>(args.grad_bias)[oc] = result;
      } else {
        const Strides& to = args.grad_weight_strides;
        static_cast<S*>(
            args.grad_weight)[oc * to.n + k / taps * to.c + k % taps / sizes.w.kernel * to.h +
                              k % taps % sizes.w.kernel * to.w] = result;
      }
    }
    sync_threads();  // the next sums overwrite these
  }
}

template <typename S>
void launch_grad_weight_finish(const BackwardArgs& args, const WeightSizes& sizes,
                               const Accumulator<S>* partial, const Execution& execution) {
  const int64_t size = args.geometry.out_channels * sizes.row;
  launch("grad_weight_finish", grad_weight_finish_kernel<S>, blocks_for((size + kWarp - 1) / kWarp),
         kFinishThreads, shared_bytes<double>(kFinishThreads), execution, args, sizes, partial);
}

}  // namespace
}  // namespace fusedcnn::cuda
