// What the grad_weight kernels share: sums over slabs of the pooled outputs, and a second stage
// that adds up the slabs in order.
#pragma once

#include "cuda/device.h"
#include "cuda/kernel.h"
#include "cuda/kernels/sizes.h"
#include "cuda/launch.h"

namespace fusedcnn::cuda {
namespace {

constexpr int64_t kMostPartialBytes = int64_t{64} << 20;

// Partial sums of a slab: [out channels][row], of which a row holds [channels][3][3] weights' and
// then the bias's.
struct SlabSums {
  int out_channels, row;
  int64_t slabs;
};

// `wanted` slabs, or as many as there are units, or as kMostPartialBytes hold where each takes
// `bytes`: the least of these, and at least one.
inline int64_t slab_count(int64_t wanted, int64_t units, int64_t bytes) {
  const int64_t most = kMostPartialBytes / bytes < units ? kMostPartialBytes / bytes : units;
  const int64_t count = wanted < most ? wanted : most;
  return count < 1 ? 1 : count;
}

// Threads of the second stage: a warp's lanes have neighbouring sums, and its warps divide the
// slabs among them, since one thread would wait for each of hundreds of loads in turn.
constexpr int kFinishThreads = 512, kFinishWarps = kFinishThreads / kWarp;

// Adds up the slabs of every weight and of every bias, in an order that depends on nothing but
// their number. In double: there may be many slabs, few numbers, and the terms may cancel.
template <typename S>
FUSEDCNN_KERNEL(kFinishThreads)
grad_weight_finish_kernel(BackwardArgs args, SlabSums sizes, const Accumulator<S>* partial) {
  using T = Accumulator<S>;
  SharedMemory memory;
  const Shared<double> sums = memory.array<double>(kFinishThreads);
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int64_t size = static_cast<int64_t>(sizes.out_channels) * sizes.row;
  for (int64_t first = block_index() * kWarp; first < size; first += grid_blocks() * kWarp) {
    const int64_t i = first + lane;
    const int64_t oc = i / sizes.row;
    const int k = static_cast<int>(i % sizes.row);
    const bool is_bias = k == sizes.row - 1;
    // Sums that nobody wants have not been written.
    const bool wanted = i < size && (is_bias ? args.grad_bias : args.grad_weight);
    double sum = 0;
    if (wanted) {
      for (int64_t slab = warp; slab < sizes.slabs; slab += kFinishWarps) {
        sum += partial[slab * size + i];
      }
    }
    sums[thread_index()] = sum;
    sync_threads();
    if (warp == 0 && wanted) {
      for (int other = 1; other < kFinishWarps; ++other) sum += sums[other * kWarp + lane];
      const S result = narrow<S>(static_cast<T>(sum));
      if (is_bias) {
        static_cast<S*>(args.grad_bias)[oc] = result;
      } else {
        const Strides& to = args.grad_weight_strides;
        static_cast<S*>(
            args.grad_weight)[oc * to.n + k / 9 * to.c + k % 9 / 3 * to.h + k % 3 * to.w] = result;
      }
    }
    sync_threads();  // the next sums overwrite these
  }
}

template <typename S>
void launch_grad_weight_finish(const BackwardArgs& args, const SlabSums& sizes,
                               const Accumulator<S>* partial, const Execution& execution) {
  const int64_t size = args.geometry.out_channels * sizes.row;
  launch("grad_weight_finish", grad_weight_finish_kernel<S>, blocks_for((size + kWarp - 1) / kWarp),
         kFinishThreads, shared_bytes<double>(kFinishThreads), execution, args, sizes, partial);
}

}  // namespace
}  // namespace fusedcnn::cuda
