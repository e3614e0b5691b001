// Pooling windows too large for their convolution outputs to be kept: running maxima.
//
// A task owns a slice of the convolution's rows of one image, and a part of the output channels. It
// computes a few rows at a time and takes them into the maxima of every pooled row whose windows
// they lie in. A batch is one slice an image; of few images, slices follow one another, so that
// several threads have work, and their maxima are joined in order.
//
// Working memory of a thread, in elements of the accumulation type:
//   a few convolution rows         what forward_direct_large.h and forward_general_large.h say
//   maxima                         2 x pooled rows x row_size
// of which `row_size` is one pooled row's: at most all output channels x whole vectors. Where there
// are several slices, each has maxima of its own, of the pooled rows that it touches.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/partials.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/window_range.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Takes one more element of each lane's window. The first maximum wins; NaN beats everything, a
// later NaN too, as in torch.
template <typename T>
FUSEDCNN_INLINE void take(Vector<T> value, Vector<Int<T>> element, Vector<T>& best,
                          Vector<Int<T>>& winner) {
  const auto wins = (value > best) | (value != value);
  best = wins ? value : best;
  winner = wins ? element : winner;
}

// Maxima so far, and which element of the window each is. [pooled rows][row_size].
template <typename T>
struct Maxima {
  T* best;
  Int<T>* winner;

  Maxima at(int64_t offset) const { return {best + offset, winner + offset}; }
};

// How the rows of the convolution's output are shared out.
struct Slices {
  int64_t begin, end;  // the rows that windows reach
  int64_t count;
  int64_t rows;   // of each but the last
  int64_t parts;  // of the output channels

  // Parts at most: `blocks`. Depends on sizes alone, never on threads.
  Slices(const Geometry& g, int64_t blocks) {
    constexpr int64_t kLeastRows = 2;    // neighbours read some input rows twice
    constexpr double kLargeImage = 4e6;  // multiply-adds; a fraction of a millisecond
    conv_range(g.h, 0, g.h.out, begin, end);
    const double multiply_adds =
        double(end - begin) * g.w.conv * g.out_channels * g.in_channels_per_group() * g.taps();
    const int64_t wanted = g.batch < kSmallBatch && multiply_adds >= kLargeImage
                               ? Partials::kMost / larger<int64_t>(g.batch, 1)
                               : 1;
    count = larger<int64_t>(1, smaller(wanted, (end - begin) / kLeastRows));
    rows = (end - begin + count - 1) / count;
    count = (end - begin + rows - 1) / rows;
    parts = smaller(blocks, wanted / count);
  }

  int64_t first_row(int64_t slice) const { return begin + slice * rows; }
  int64_t last_row(int64_t slice) const { return smaller(end, begin + (slice + 1) * rows); }
};

// The pooled outputs [first, last) whose windows reach over some of the convolution outputs
// [begin, end), though they may step over all of them.
FUSEDCNN_INLINE void pooled_range(const Axis& axis, int64_t begin, int64_t end, int64_t& first,
                                  int64_t& last) {
  const int64_t before = begin + axis.pool_padding - (axis.pool_kernel - 1) * axis.pool_dilation;
  first = before <= 0 ? 0 : (before + axis.pool_stride - 1) / axis.pool_stride;
  last = smaller(axis.out, (end - 1 + axis.pool_padding) / axis.pool_stride + 1);
}

// Runs `engine` over all images. It has
//   row_size                                  elements of a pooled row's maxima, in whole vectors
//   rows                                      of the convolution that it takes at a time
//   take_rows(n, part, begin, end, maxima, first)
//     takes the convolution rows [begin, end) of one part of the output channels of image n into
//     the maxima, which begin at pooled row `first`
//   finish_row(n, oh, maxima)                 writes one pooled row
template <typename T, typename Engine>
void run_large_windows(const Geometry& g, const Slices& slices, const ThreadPool& pool,
                       const Engine& engine) {
  constexpr int kN = kLanes<T>;
  const int64_t size = engine.row_size;
  int64_t most = 0, first, last;  // pooled rows of a slice
  for (int64_t s = 0; s < slices.count; ++s) {
    pooled_range(g.h, slices.first_row(s), slices.last_row(s), first, last);
    most = larger(most, last - first);
  }
  const int64_t bytes = most * size * int64_t{sizeof(T) + sizeof(Int<T>)};
  const auto maxima_in = [&](void* memory) {
    T* best = static_cast<T*>(memory);
    return Maxima<T>{best, reinterpret_cast<Int<T>*>(best + most * size)};
  };
  const auto clear = [&](const Maxima<T>& maxima) {
    for (int64_t i = 0; i < most * size; i += kN) {
      store(maxima.best + i, broadcast(-static_cast<T>(__builtin_inff())));
      store(maxima.winner + i, Vector<Int<T>>{});
    }
  };
  const auto take_slice = [&](int64_t n, int64_t s, int64_t part, const Maxima<T>& maxima) {
    int64_t from, to;
    pooled_range(g.h, slices.first_row(s), slices.last_row(s), from, to);
    for (int64_t y = slices.first_row(s); y < slices.last_row(s); y += engine.rows) {
      engine.take_rows(n, part, y, smaller(y + engine.rows, slices.last_row(s)), maxima, from);
    }
  };

  if (slices.count * slices.parts == 1) {
    parallel_tasks(pool, g.batch, [&](int64_t n) {
      const Maxima<T> maxima = maxima_in(scratch(Slot::kPartials, bytes));
      clear(maxima);
      take_slice(n, 0, 0, maxima);
      for (int64_t oh = 0; oh < g.h.out; ++oh) engine.finish_row(n, oh, maxima.at(oh * size));
    });
    return;
  }
  char* all = static_cast<char*>(scratch(Slot::kPartials, g.batch * slices.count * bytes));
  parallel_tasks(pool, g.batch * slices.count,
                 [&](int64_t task) { clear(maxima_in(all + task * bytes)); });
  parallel_tasks(pool, g.batch * slices.count * slices.parts, [&](int64_t task) {
    const int64_t part = task % slices.parts, slice = task / slices.parts;
    take_slice(slice / slices.count, slice % slices.count, part, maxima_in(all + slice * bytes));
  });
  parallel_tasks(pool, g.batch * g.h.out, [&](int64_t task) {
    const int64_t n = task / g.h.out, oh = task % g.h.out;
    Maxima<T> joined{};
    for (int64_t s = 0; s < slices.count; ++s) {
      int64_t from, to;
      pooled_range(g.h, slices.first_row(s), slices.last_row(s), from, to);
      if (oh < from || oh >= to) continue;
      const Maxima<T> next = maxima_in(all + (n * slices.count + s) * bytes).at((oh - from) * size);
      if (!joined.best) {
        joined = next;
        continue;
      }
      for (int64_t i = 0; i < size; i += kN) {
        Vector<T> best = load(joined.best + i);
        Vector<Int<T>> winner = load(joined.winner + i);
        take<T>(load(next.best + i), load(next.winner + i), best, winner);
        store(joined.best + i, best);
        store(joined.winner + i, winner);
      }
    }
    engine.finish_row(n, oh, joined);
  });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
