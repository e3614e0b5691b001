// Moments of images that the Winograd kernels leave to the general kernel: of its convolution
// without a pool, once more.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/conv_tiles.h"
#include "cpu/kernels/forward_general_large.h"
#include "cpu/plan.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Of one channel's outputs: `rows` of `cols`, `pitch` apart. `shift`: near them.
template <typename T>
FUSEDCNN_NOINLINE void add_channel(const T* from, int64_t rows, int64_t cols, int64_t pitch,
                                   double shift, double& sum, double& squares) {
  for (int64_t y = 0; y < rows; ++y, from += pitch) {
    for (int64_t x = 0; x < cols; ++x) {
      const double distance = from[x] - shift;
      sum += distance;
      squares += distance * distance;
    }
  }
}

// An image's moments are [bands][OC], bands of `band` convolution rows. `only`, where given, picks
// the images: [batch], nonzero for yes.
template <typename S>
void general_moments(const ForwardArgs& args, const ThreadPool& pool, int64_t band,
                     const uint8_t* only) {
  using T = Accumulator<S>;
  const Geometry& g = args.geometry;
  const Geometry conv = without_pool(g, smaller(band, g.h.conv));
  const ForwardPlan plan(conv, sizeof(T), kLanes<T>);
  const ForwardShared<T> shared = share_weights<S>(args, pool, plan);
  const int64_t bands = (g.h.conv + band - 1) / band;
  parallel_tasks(pool, g.batch * bands, [&](int64_t task) {
    const int64_t n = task / bands, begin = task % bands * band;
    if (only && !only[n]) return;
    const int64_t end = smaller(begin + band, g.h.conv);
    const int64_t out_channels = conv.out_channels_per_group();
    Moments* const moments = args.moments + task * g.out_channels;
    BandScratch<T> scratch(plan, conv.in_channels_per_group());
    for (int64_t i = 0; i < conv.groups * shared.blocks; ++i) {
      const int64_t first = i % shared.blocks * kTileChannels;
      const int64_t in_block = smaller<int64_t>(kTileChannels, out_channels - first);
      double shift[kTileChannels] = {}, sum[kTileChannels] = {}, squares[kTileChannels] = {};
      for (int64_t y = begin; y < end; y += plan.band) {
        const int64_t rows = smaller(plan.band, end - y);
        scratch.template pack<S>(plan, args, conv, n, i / shared.blocks, y);
        scratch.convolve(shared, conv, i, in_block, rows);
        for (int64_t r = 0; r < in_block; ++r) {
          const T* const from = scratch.conv + r * scratch.conv_channel;
          if (y == begin) shift[r] = *from - *from == 0 ? *from : 0;
          add_channel(from, rows, g.w.conv, plan.pitch, shift[r], sum[r], squares[r]);
        }
      }
      const auto count = static_cast<double>((end - begin) * g.w.conv);
      for (int64_t r = 0; r < in_block; ++r) {
        const double mean = sum[r] / count, distances = squares[r] - sum[r] * mean;
        moments[i / shared.blocks * out_channels + first + r] = {count, shift[r] + mean,
                                                                 distances < 0 ? 0 : distances};
      }
    }
  });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
