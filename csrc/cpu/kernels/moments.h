// Moments of convolution outputs, added up while these are in registers.
//
// A chunk is up to kChunkWindows windows. Its outputs count from a shift, the mean of the chunk's
// first window: of d = y - shift a chunk adds up d and d * d, in T. A task's sums of chunks are
// double, from the shift of its first chunk. With n outputs of mean m, M2 their squared distances
// from it, and w outputs of a window:
//
//   n (m - shift)^2 <= n / w M2     the first window's outputs alone make up M2 >= w (m - shift)^2
//   sum d^2 = M2 + n (m - shift)^2 <= (1 + kChunkWindows) M2
//   error of M2 <= 3 a u sum d^2    a: additions one after another, kChunkWindows + w; u: 2^-24
//
// whatever the mean. Where the first window is as good as any other, sum d^2 is about M2, and
// errors average out: an error of a few u. The means' own error is a u of a distance from the
// shift. Sums of integers are exact where a window has 4 outputs.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/simd.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

constexpr int64_t kChunkWindows = 32;

template <typename T>
struct ChunkSums {
  Vector<T> shift = {}, sum = {}, squares = {};
  int64_t windows = 0;

  // Begins at windows of this mean. Of infinities the distances from zero can be added up.
  FUSEDCNN_INLINE void begin(Vector<T> mean) {
    shift = mean - mean == Vector<T>{} ? mean : Vector<T>{};
    sum = squares = Vector<T>{};
  }

  // One window of 2x2 outputs for every lane.
  FUSEDCNN_INLINE void see(Vector<T> e0, Vector<T> e1, Vector<T> e2, Vector<T> e3) {
    if (windows == 0) begin(T(0.25) * ((e0 + e1) + (e2 + e3)));
    const auto d0 = e0 - shift, d1 = e1 - shift, d2 = e2 - shift, d3 = e3 - shift;
    sum += (d0 + d1) + (d2 + d3);
    squares += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
    ++windows;
  }
};

// What a task adds up, of every output channel: [padded] each, in this thread's scratch.
template <typename T>
struct TaskMoments {
  double *shift, *sum, *squares;  // shift: NaN before the first chunk

  explicit TaskMoments(int64_t padded) {
    shift = static_cast<double*>(scratch(Slot::kLists, 3 * padded * int64_t{sizeof(double)}));
    sum = shift + padded;
    squares = sum + padded;
    for (int64_t oc = 0; oc < padded; ++oc) {
      shift[oc] = __builtin_nan("");
      sum[oc] = squares[oc] = 0;
    }
  }

  // A lane is an output channel, from `first` on. window: outputs of one.
  FUSEDCNN_NOINLINE void add(const ChunkSums<T>& chunk, int64_t window, int64_t first) const {
    if (chunk.windows == 0) return;
    const auto count = static_cast<double>(chunk.windows * window);
    for (int l = 0; l < kLanes<T>; ++l) {
      double* const from = shift + first + l;
      *from = *from != *from ? chunk.shift[l] : *from;
      const double distance = chunk.shift[l] - *from, part = chunk.sum[l];
      sum[first + l] += part + count * distance;
      squares[first + l] += chunk.squares[l] + (2 * part + count * distance) * distance;
    }
  }

  // A lane is a window of 2x2 outputs of channel `oc`. Of the last windows that the chunk has seen
  // only the first `real` lanes' are windows.
  FUSEDCNN_NOINLINE void add_lanes(const ChunkSums<T>& chunk, int64_t real, int64_t oc) const {
    constexpr int kN = kLanes<T>;
    if (shift[oc] != shift[oc]) shift[oc] = chunk.shift[0];
    double parts[kN], part_squares[kN];
    for (int l = 0; l < kN; ++l) {
      const auto count = static_cast<double>(4 * (chunk.windows - (l >= real)));
      const double distance = chunk.shift[l] - shift[oc], part = chunk.sum[l];
      parts[l] = part + count * distance;
      part_squares[l] = chunk.squares[l] + (2 * part + count * distance) * distance;
    }
    FUSEDCNN_UNROLL
    for (int half = kN / 2; half > 0; half /= 2) {
      FUSEDCNN_UNROLL
      for (int l = 0; l < half; ++l) {
        parts[l] += parts[l + half];
        part_squares[l] += part_squares[l + half];
      }
    }
    sum[oc] += parts[0];
    squares[oc] += part_squares[0];
  }

  // to: [out channels]; count: outputs of each that the task has seen.
  void write(int64_t out_channels, int64_t count, Moments* to) const {
    const auto all = static_cast<double>(count);
    for (int64_t oc = 0; oc < out_channels; ++oc) {
      const double mean = sum[oc] / all, distances = squares[oc] - sum[oc] * mean;
      to[oc] = {all, shift[oc] + mean, distances < 0 ? 0 : distances};
    }
  }
};

// Null where a kernel that adds up what its windows see has then seen every output once.
inline const char* why_no_moments(const Geometry& g) {
  for (const Axis* axis : {&g.h, &g.w}) {
    const bool together = axis->pool_dilation == 1 || axis->pool_kernel == 1;
    if (axis->pool_stride != axis->pool_kernel || axis->pool_padding != 0 || !together ||
        axis->out * axis->pool_kernel != axis->conv) {
      return "its statistics are of windows that cover the plane exactly";
    }
  }
  return g.window() == 1 ? "its statistics are of windows" : nullptr;
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
