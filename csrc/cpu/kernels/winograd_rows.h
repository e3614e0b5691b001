// F(2, 3) along the rows of the input: what the two kernels with tiles of two columns begin with.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/phase_planes.h"
#include "cpu/kernels/simd.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Transforms one input row along w: out[j][k] is element j of window k's row of d B. from: the
// padded row, 2 * width + 2 elements and a vector more; to: [4] rows, `plane` elements apart. Whole
// vectors are stored: up to one past the row.
FUSEDCNN_INLINE void transform_row(const float* from, int64_t width, float* to, int64_t plane) {
  constexpr int kN = kLanes<float>;
  for (int64_t k = 0; k < width; k += kN) {
    const Vector<float> a = load(from + 2 * k), b = load(from + 2 * k + kN);
    const Vector<float> c = load(from + 2 * k + 2), d = load(from + 2 * k + 2 + kN);
    const Vector<float> x[4] = {shuffle(a, b, kEven), shuffle(a, b, kOdd), shuffle(c, d, kEven),
                                shuffle(c, d, kOdd)};
    store(to + k, x[0] - x[2]);
    store(to + plane + k, x[1] + x[2]);
    store(to + 2 * plane + k, x[2] - x[1]);
    store(to + 3 * plane + k, x[1] - x[3]);
  }
}

// Fills R for one channel. image: [H, W] with strides; rows: scratch of [2 * band + 2][row_size],
// zeros outside the image already.
template <typename S>
FUSEDCNN_NOINLINE void transform_rows(const Geometry& g, const S* image, Strides strides,
                                      int64_t first_out, int64_t band, int64_t plane,
                                      int64_t row_size, float* rows, float* r,
                                      RangeCheck<float>& range) {
  RangeCheck<float> check = range;  // in a register
  const int64_t count = 2 * band + 2, windows = g.w.out;
  const int64_t y0 = 2 * first_out - g.h.padding;
  const int64_t begin = smaller(count, larger(-y0, int64_t{0}));
  // Rows that no window reaches are not read: they must not decide the range check.
  const int64_t reached = smaller(count, 2 * (g.h.out - first_out) + 2);
  const int64_t end = larger(begin, smaller(reached, g.h.in - y0));
  const int64_t width = smaller(g.w.in, 2 * windows + 2 - g.w.padding);
  // First every row in order, then every row transformed: a vector load soon after the narrower
  // stores that it spans would wait for them.
  const S* from = image + (y0 + begin) * strides.h;
  float* row = rows + begin * row_size + g.w.padding;
  for (int64_t y = begin; y < end; ++y, from += strides.h, row += row_size) {
    copy_row<S, float>(from, strides.w, width, row, check);
  }
  for (int64_t y = 0; y < count; y += 2, rows += 2 * row_size, r += windows) {
    transform_row(rows, windows, r, plane);
    transform_row(rows + row_size, windows, r + 4 * plane, plane);
  }
  // Whole vectors are read, too: up to one past the last row.
  for (int64_t i = 0; i < 8; ++i) store(r + i * plane, Vector<float>{});
  range = check;
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
