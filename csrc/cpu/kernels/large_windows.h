// Pooling windows too large for their convolution outputs to be kept: running maxima.
//
// A task owns a slice of the convolution's rows of one image, and a part of the output channels. It
// computes a few rows at a time and takes them into the maxima of every pooled row whose windows
// they lie in. In a large batch each image is one slice. In a small one an image has several, so
// that several threads have work, and their maxima are joined in order. Where weights outgrow the
// caches, a task takes several images with each block of weights.
//
// Working memory, in elements of the accumulation type, for each thread, or for each image where
// tasks share one:
//   maxima    2 x (pooled rows, and again what neighbouring slices share, at most as many and 16
//             more) x row_size, that is out channels x cols, in whole vectors
// and for each thread the few convolution rows and what they need: forward_direct_large.h,
// forward_general_large.h. None of it grows with the window.
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

// Those of one slice of several images.
template <typename T>
struct MaximaOf {
  char* memory;
  int64_t first;  // image
  int64_t step;   // bytes from image to image
  int64_t size;   // elements of one image's

  Maxima<T> operator[](int64_t image) const {
    T* best = reinterpret_cast<T*>(memory + (image - first) * step);
    return {best, reinterpret_cast<Int<T>*>(best + size)};
  }
};

// The pooled outputs [first, last) whose windows reach over some of the convolution outputs
// [begin, end), though they may step over all of them.
FUSEDCNN_INLINE void pooled_range(const Axis& axis, int64_t begin, int64_t end, int64_t& first,
                                  int64_t& last) {
  const int64_t before = begin + axis.pool_padding - (axis.pool_kernel - 1) * axis.pool_dilation;
  first = before <= 0 ? 0 : (before + axis.pool_stride - 1) / axis.pool_stride;
  last = smaller(axis.out, (end - 1 + axis.pool_padding) / axis.pool_stride + 1);
}

// How the rows of the convolution's output are shared out. Depends on sizes alone, never on
// threads.
struct Slices {
  int64_t begin, end;  // the rows that windows reach
  int64_t count;       // slices of an image
  int64_t rows;        // of each slice but the last
  int64_t pooled;      // rows that a slice's windows lie in, at most
  int64_t images;      // of a task
  int64_t parts;       // of the output channels

  // images: of a task, at most; blocks: parts at most.
  Slices(const Geometry& g, int64_t images, int64_t blocks)
      : images(larger<int64_t>(1, smaller(images, g.batch))) {
    constexpr int64_t kLeastRows = 2;    // neighbours read some input rows twice
    constexpr double kLargeImage = 4e6;  // multiply-adds; a fraction of a millisecond
    conv_range(g.h, 0, g.h.out, begin, end);
    const double multiply_adds =
        double(end - begin) * g.w.conv * g.out_channels * g.in_channels_per_group() * g.taps();
    const int64_t tasks = (g.batch + this->images - 1) / this->images;
    const bool few = tasks < kSmallBatch && multiply_adds >= kLargeImage;
    const int64_t wanted = few ? Partials::kMost / larger<int64_t>(tasks, 1) : 1;
    count = larger<int64_t>(1, smaller(wanted, (end - begin) / kLeastRows));
    cut(g);
    // Where windows overlap much, every slice has maxima of most pooled rows.
    while (count > 1 && count * (pooled - 1) > 2 * g.h.out) {
      count = (count + 1) / 2;
      cut(g);
    }
    parts = smaller(blocks, larger<int64_t>(1, wanted / count));
  }

  int64_t first_row(int64_t slice) const { return begin + slice * rows; }
  int64_t last_row(int64_t slice) const { return smaller(end, begin + (slice + 1) * rows); }

 private:
  void cut(const Geometry& g) {
    rows = (end - begin + count - 1) / count;
    count = (end - begin + rows - 1) / rows;
    pooled = 0;
    for (int64_t s = 0; s < count; ++s) {
      int64_t first, last;
      pooled_range(g.h, first_row(s), last_row(s), first, last);
      pooled = larger(pooled, last - first);
    }
  }
};

// Runs `engine` over all images. It has
//   row_size          elements of a pooled row's maxima, in whole vectors
//   rows              of the convolution that it takes at a time
//   take_rows(first_image, images, part, begin, end, maxima, first)
//                     takes the convolution rows [begin, end) of one part of the output channels of
//                     some images into maxima[image], which begin at pooled row `first`
//   finish_row(image, oh, maxima)   writes one pooled row
template <typename T, typename Engine>
void run_large_windows(const Geometry& g, const Slices& slices, const ThreadPool& pool,
                       const Engine& engine) {
  constexpr int kN = kLanes<T>;
  const int64_t size = engine.row_size, slice_size = slices.pooled * size;
  const int64_t bytes = slice_size * int64_t{sizeof(T) + sizeof(Int<T>)};
  const auto clear = [&](const Maxima<T>& maxima) {
    for (int64_t i = 0; i < slice_size; i += kN) {
      store(maxima.best + i, broadcast(-static_cast<T>(__builtin_inff())));
      store(maxima.winner + i, Vector<Int<T>>{});
    }
  };
  const int64_t groups = (g.batch + slices.images - 1) / slices.images;
  const auto take_slice = [&](int64_t n, int64_t s, int64_t part, const MaximaOf<T>& maxima) {
    const int64_t images = smaller(slices.images, g.batch - n);
    int64_t first, last;
    pooled_range(g.h, slices.first_row(s), slices.last_row(s), first, last);
    for (int64_t y = slices.first_row(s); y < slices.last_row(s); y += engine.rows) {
      engine.take_rows(n, images, part, y, smaller(y + engine.rows, slices.last_row(s)), maxima,
                       first);
    }
  };

  if (slices.count * slices.parts == 1) {
    parallel_tasks(pool, groups, [&](int64_t group) {
      const int64_t n = group * slices.images, end = smaller(n + slices.images, g.batch);
      char* own = static_cast<char*>(scratch(Slot::kPartials, slices.images * bytes));
      const MaximaOf<T> maxima{own, n, bytes, slice_size};
      for (int64_t i = n; i < end; ++i) clear(maxima[i]);
      take_slice(n, 0, 0, maxima);
      for (int64_t i = n; i < end; ++i) {
        for (int64_t oh = 0; oh < g.h.out; ++oh) engine.finish_row(i, oh, maxima[i].at(oh * size));
      }
    });
    return;
  }
  char* all = static_cast<char*>(scratch(Slot::kPartials, g.batch * slices.count * bytes));
  const auto maxima_of = [&](int64_t s) {
    return MaximaOf<T>{all + s * bytes, 0, slices.count * bytes, slice_size};
  };
  parallel_tasks(pool, g.batch * slices.count,
                 [&](int64_t task) { clear(maxima_of(task % slices.count)[task / slices.count]); });
  parallel_tasks(pool, groups * slices.count * slices.parts, [&](int64_t task) {
    const int64_t part = task % slices.parts, s = task / slices.parts % slices.count;
    take_slice(task / (slices.parts * slices.count) * slices.images, s, part, maxima_of(s));
  });
  parallel_tasks(pool, g.batch * g.h.out, [&](int64_t task) {
    const int64_t n = task / g.h.out, oh = task % g.h.out;
    Maxima<T> joined{};
    for (int64_t s = 0; s < slices.count; ++s) {
      int64_t first, last;
      pooled_range(g.h, slices.first_row(s), slices.last_row(s), first, last);
      if (oh < first || oh >= last) continue;
      const Maxima<T> next = maxima_of(s)[n].at((oh - first) * size);
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
