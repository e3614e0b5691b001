// The direct forward under large windows (large_windows.h): a lane is an output channel.
//
// Maxima are [pooled cols][out channels] of a pooled row. A few convolution rows at a time are
// computed (X, U and V: direct_rows.h), about kDirectBandBytes of X and V, but at least
// kDirectLeastRows: working memory is bounded by the larger of that and
//   X  (kDirectLeastRows x stride + dilated kernel) rows x padded cols x C
//   V  kDirectLeastRows x conv cols x 2 vectors
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/ahead.h"
#include "cpu/kernels/direct_rows.h"
#include "cpu/kernels/large_windows.h"
#include "cpu/kernels/output_lanes.h"
#include "cpu/kernels/window_range.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

constexpr int64_t kDirectLeastRows = 4;

// Whether the direct kernel keeps maxima instead of convolution outputs.
FUSEDCNN_INLINE bool running_maxima(const Problem& problem) {
  return problem.wide_code || problem.geometry.window() >= 36;
}

// Takes convolution rows of one block of output channels into the maxima. conv: V of the rows
// [begin, end); maxima: from pooled row `first` on, at the block's first output channel, `padded`
// elements between pooled outputs.
template <int Z, typename T>
FUSEDCNN_NOINLINE void take_block(const Geometry& g, const T* conv, int64_t begin, int64_t end,
                                  const Maxima<T>& maxima, int64_t padded, int64_t first) {
  constexpr int kN = kLanes<T>;
  int64_t oh, last, top, bottom, left, right;
  for (pooled_range(g.h, begin, end, oh, last); oh < last; ++oh) {
    window_range(g.h, oh, begin, end, top, bottom);
    const int64_t y0 = oh * g.h.pool_stride - g.h.pool_padding - begin;
    for (int64_t ow = 0; ow < g.w.out; ++ow) {
      window_range(g.w, ow, 0, g.w.conv, left, right);
      const int64_t x0 = ow * g.w.pool_stride - g.w.pool_padding;
      const Maxima<T> at = maxima.at(((oh - first) * g.w.out + ow) * padded);
      Vector<T> best[Z];
      Vector<Int<T>> winner[Z];
      FUSEDCNN_UNROLL
      for (int z = 0; z < Z; ++z) {
        best[z] = load(at.best + z * kN);
        winner[z] = load(at.winner + z * kN);
      }
      for (int64_t ph = top; ph < bottom; ++ph) {
        const T* from =
            conv +
            ((y0 + ph * g.h.pool_dilation) * g.w.conv + x0 + left * g.w.pool_dilation) * Z * kN;
        auto element = broadcast(static_cast<Int<T>>(ph * g.w.pool_kernel + left));
        for (int64_t pw = left; pw < right;
             ++pw, from += g.w.pool_dilation * Z * kN, element += 1) {
          FUSEDCNN_UNROLL
          for (int z = 0; z < Z; ++z) take<T>(load(from + z * kN), element, best[z], winner[z]);
        }
      }
      FUSEDCNN_UNROLL
      for (int z = 0; z < Z; ++z) {
        store(at.best + z * kN, best[z]);
        store(at.winner + z * kN, winner[z]);
      }
    }
  }
}

template <typename S, typename C>
struct DirectLarge {
  using T = Accumulator<S>;
  static constexpr int kN = kLanes<T>;

  const ForwardArgs& args;
  const DirectShared<T>& shared;
  const Slices& slices;
  int64_t row_size, rows;

  DirectLarge(const ForwardArgs& args, const DirectShared<T>& shared, const Slices& slices)
      : args(args), shared(shared), slices(slices) {
    const Geometry& g = args.geometry;
    row_size = g.w.out * shared.padded;
    const int64_t bytes = (g.h.stride * shared.cols * g.in_channels + g.w.conv * kDirectWide * kN) *
                          int64_t{sizeof(T)};
    rows = smaller(slices.rows, larger(kDirectLeastRows, kDirectBandBytes / bytes));
  }

  FUSEDCNN_NOINLINE void take_rows(int64_t n, int64_t images, int64_t part, int64_t begin,
                                   int64_t end, const MaximaOf<T>& maxima_of, int64_t first) const {
    const Geometry& g = args.geometry;
    const int64_t x_size = direct_input_size(g, shared, end - begin);
    T* x = static_cast<T*>(scratch(Slot::kPlanes, images * x_size * int64_t{sizeof(T)}));
    for (int64_t i = 0; i < images; ++i) {
      direct_input<S>(args, shared, n + i, begin, end, x + i * x_size);
    }
    T* conv = static_cast<T*>(
        scratch(Slot::kConv, (end - begin) * g.w.conv * kDirectWide * kN * int64_t{sizeof(T)}));
    Ahead none;
    int64_t block = 0;
    for_direct_blocks(shared, [&]<int Z>(int64_t oc) {
      if (block++ % slices.parts != part) return;
      for (int64_t i = 0; i < images; ++i) {
        direct_block<Z>(g, shared, x + i * x_size, end - begin, oc, conv, none);
        take_block<Z>(g, conv, begin, end, maxima_of[n + i].at(oc), shared.padded, first);
      }
    });
  }

  FUSEDCNN_NOINLINE void finish_row(int64_t n, int64_t oh, const Maxima<T>& maxima) const {
    const Geometry& g = args.geometry;
    C* codes = static_cast<C*>(scratch(Slot::kPatch, row_size * int64_t{sizeof(C)}));
    typedef C Codes __attribute__((vector_size(kN * sizeof(C))));
    const Vector<T> least = broadcast(-static_cast<T>(__builtin_inff()));
    for (int64_t ow = 0; ow < g.w.out; ++ow) {
      const int64_t first = first_element(g, oh, ow);
      const Vector<Int<T>> off_code = broadcast(static_cast<Int<T>>(kOff<C>));
      const Vector<Int<T>> first_code =
          first < 0 ? off_code : broadcast(static_cast<Int<T>>(first));
      for (int64_t i = ow * shared.padded; i < (ow + 1) * shared.padded; i += kN) {
        Vector<T> best = load(maxima.best + i);
        Vector<Int<T>> winner = load(maxima.winner + i);
        if (args.relu) {
          const auto off = best <= Vector<T>{};  // false for NaN, which ReLU lets through
          winner = off ? off_code : winner;
          if (first >= 0) best = off ? Vector<T>{} : best;
          store(maxima.best + i, best);
        } else {  // where nothing won, all is minus infinity
          winner = best == least ? first_code : winner;
        }
        const Codes narrow = __builtin_convertvector(winner, Codes);
        memcpy(codes + i, &narrow, sizeof narrow);
      }
    }
    const int64_t at = n * args.output_strides.n + oh * args.output_strides.h;
    write_strip(maxima.best, shared.padded, g.w.out, g.out_channels,
                static_cast<S*>(args.output) + at, args.output_strides);
    if (args.code) {
      write_strip(codes, shared.padded, g.w.out, g.out_channels, static_cast<C*>(args.code) + at,
                  args.output_strides);
    }
  }
};

template <typename S, typename C>
void forward_direct_large(const ForwardArgs& args, const ThreadPool& pool) {
  using T = Accumulator<S>;
  const Geometry& g = args.geometry;
  with_direct_shared<S>(args, pool, [&](const DirectShared<T>& shared) {
    constexpr int64_t kBlock = kDirectWide * kLanes<T>;
    // Weights of more than half an L2 come from further away for every image, unless several
    // images take each block of them.
    constexpr int64_t kLargeWeights = int64_t{1} << 20;
    const int64_t weights = shared.padded * g.in_channels * g.taps() * int64_t{sizeof(T)};
    const int64_t image = direct_input_size(g, shared, g.h.conv) * int64_t{sizeof(T)};
    const int64_t images = weights > kLargeWeights ? 2 * kDirectBandBytes / image : 1;
    // Parts of two blocks: each copies its input anew, which costs a fifth of one block's work.
    const Slices slices(g, images, (shared.padded + 2 * kBlock - 1) / (2 * kBlock));
    run_large_windows<T>(g, slices, pool, DirectLarge<S, C>(args, shared, slices));
  });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
