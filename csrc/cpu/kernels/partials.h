// Sums over the batch, taken in pieces whose number and order do not depend on threads.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/simd.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Each partial sum runs over a fixed run of images; then they are added in order.
struct Partials {
  // Enough for a small server's threads to share; each costs a pass over memory to clear, fill and
  // add.
  static constexpr int64_t kMost = 16;
  static constexpr int64_t kMostBytes = int64_t{8} << 20;

  int64_t batch;
  int64_t count;
  int64_t images;  // of one partial sum; the last may have fewer

  // bytes: of one partial sum.
  Partials(int64_t batch, int64_t bytes) : batch(batch) {
    count = smaller(kMost, larger<int64_t>(batch, 1));
    count = larger<int64_t>(1, smaller(count, kMostBytes / bytes));
    images = (batch + count - 1) / count;
  }

  int64_t begin(int64_t partial) const { return smaller(partial * images, batch); }

  // Adds all partial sums, [count][size], into the first.
  template <typename T>
  void add_up(const ThreadPool& pool, T* sums, int64_t size) const {
    constexpr int64_t kPiece = 1024;
    parallel_tasks(pool, (size + kPiece - 1) / kPiece, [&](int64_t piece) {
      const int64_t first = piece * kPiece, last = smaller(first + kPiece, size);
      for (int64_t p = 1; p < count; ++p) {
        const T* other = sums + p * size;
        for (int64_t i = first; i < last; ++i) sums[i] += other[i];
      }
    });
  }
};

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
