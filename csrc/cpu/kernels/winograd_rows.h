// F(2, 3) along the rows of the input: what the two kernels with tiles of two columns begin with.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/phase_planes.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/winograd.h"

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

// The rows and columns of one channel that a band's windows reach.
struct ReachedRows {
  int64_t count;       // rows of the band, those outside the image too
  int64_t begin, end;  // those of them that the image has
  int64_t first;       // the image's row that row `begin` is
  int64_t width;       // columns of the image

  ReachedRows(const Geometry& g, int64_t first_out, int64_t band) : count(2 * band + 2) {
    const int64_t y0 = 2 * first_out - g.h.padding;
    begin = smaller(count, larger(-y0, int64_t{0}));
    // Rows that no window reaches are not read: they must not decide the range check.
    const int64_t reached = smaller(count, 2 * (g.h.out - first_out) + 2);
    end = larger(begin, smaller(reached, g.h.in - y0));
    first = y0 + begin;
    width = smaller(g.w.in, 2 * g.w.out + 2 - g.w.padding);
  }
};

template <typename S>
FUSEDCNN_NOINLINE void copy_rows(const ReachedRows& rows, const S* from, Strides strides, float* to,
                                 int64_t row_size, RangeCheck<float>& range) {
  RangeCheck<float> check = range;  // in a register
  to += rows.begin * row_size;
  for (int64_t y = rows.begin; y < rows.end; ++y, from += strides.h, to += row_size) {
    copy_row<S, float>(from, strides.w, rows.width, to, check);
  }
  range = check;
}

#if defined(__AVX512F__)
// The lanes of a vector from element `first` on that lie in [0, size).
FUSEDCNN_INLINE __mmask16 lanes_inside(int64_t first, int64_t size) {
  const int64_t low = smaller<int64_t>(larger<int64_t>(-first, 0), 16);
  const int64_t high = smaller<int64_t>(larger<int64_t>(size - first, low), 16);
  return static_cast<__mmask16>((1u << high) - (1u << low));
}

// transform_row for all rows of all channels, from where they are. from: row `begin` of the first.
// True: what was read is within kModerate. Sums of squares say so in one instruction a vector,
// where RangeCheck has two; but they may say no where it says yes.
FUSEDCNN_NOINLINE inline bool transform_dense_rows(const ReachedRows rows, const float* from,
                                                   Strides strides, int64_t channels,
                                                   int64_t padding, int64_t windows, int64_t plane,
                                                   float* r) {
  constexpr int kN = kLanes<float>;
  constexpr auto next = [](int l) { return l + 1; };
  constexpr auto next_but_one = [](int l) { return l < kN - 1 ? l + 1 : kN + 1; };
  Vector<float> squares[3] = {};  // chains: one would take longer than the rest
  for (int64_t k = 0; k < windows; k += kN) {
    const int64_t x = 2 * k - padding;
    const __mmask16 in_a = lanes_inside(x, rows.width), in_b = lanes_inside(x + kN, rows.width);
    const __mmask16 in_c = lanes_inside(x + 2 * kN, rows.width) & 3;
    const __mmask16 kept = lanes_inside(k, windows);
    for (int64_t half = 0; half < 2 * channels; ++half) {  // the even and the odd rows
      const float* channel = from + half / 2 * strides.c + x;
      float* to = r + half * 4 * plane + k;
      const auto put = [&](int j, Vector<float> value) __attribute__((always_inline)) {
        _mm512_mask_storeu_ps(to + j * plane, kept, (__m512)value);
      };
      for (int64_t y = half % 2; y < rows.count; y += 2, to += windows) {
        if (y < rows.begin || y >= rows.end) {
          for (int j = 0; j < 4; ++j) put(j, Vector<float>{});
          continue;
        }
        const float* row = channel + (y - rows.begin) * strides.h;
        const auto a = (Vector<float>)_mm512_maskz_loadu_ps(in_a, row);
        const auto b = (Vector<float>)_mm512_maskz_loadu_ps(in_b, row + kN);
        const auto c = (Vector<float>)_mm512_maskz_loadu_ps(in_c, row + 2 * kN);
        squares[0] += a * a;
        squares[1] += b * b;
        squares[2] += c * c;
        const Vector<float> d0 = shuffle(a, b, kEven), d1 = shuffle(a, b, kOdd);
        const Vector<float> d2 = shuffle(d0, c, next), d3 = shuffle(d1, c, next_but_one);
        put(0, d0 - d2);
        put(1, d1 + d2);
        put(2, d2 - d1);
        put(3, d1 - d3);
      }
    }
  }
  RangeCheck<float> check(kModerate * kModerate);
  check.see(squares[0] + squares[1] + squares[2]);
  return check.passed();
}
#endif

// Elements of a row of transform_channels' scratch.
inline int64_t row_in_order(int64_t windows) {
  constexpr int64_t kN = kLanes<float>;
  return round_up(2 * windows + 2 + 2 * kN, kN);
}

// Fills R for all channels of image n. in_order: scratch of [2 * band + 2][row_in_order].
template <typename S>
void transform_channels(const ForwardArgs& args, int64_t n, int64_t first_out, int64_t band,
                        int64_t plane, float* in_order, float* r, RangeCheck<float>& range) {
  const Geometry& g = args.geometry;
  const Strides strides = args.input_strides;
  const int64_t windows = g.w.out;
  const ReachedRows rows(g, first_out, band);
  const S* from = static_cast<const S*>(args.input) + n * strides.n + rows.first * strides.h;
  // Whole vectors are read, too: up to one past the last row.
  float* behind = r + (band + 1) * windows;
  const auto clear_behind = [&] {
    for (int64_t i = 0; i < g.in_channels * 8; ++i) store(behind + i * plane, Vector<float>{});
  };
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<S, float>) {
    if (strides.w == 1 &&
        transform_dense_rows(rows, from, strides, g.in_channels, g.w.padding, windows, plane, r)) {
      return clear_behind();
    }
  }
#endif
  const int64_t row_size = row_in_order(windows);
  memset(in_order, 0, rows.count * row_size * sizeof(float));
  for (int64_t c = 0; c < g.in_channels; ++c) {
    // First every row in order, then every row transformed: a vector load soon after the narrower
    // stores that it spans would wait for them.
    copy_rows<S>(rows, from + c * strides.c, strides, in_order + g.w.padding, row_size, range);
    float* to = r + c * 8 * plane;
    for (int64_t y = 0; y < rows.count; y += 2, to += windows) {
      transform_row(in_order + y * row_size, windows, to, plane);
      transform_row(in_order + (y + 1) * row_size, windows, to + 4 * plane, plane);
    }
  }
  clear_behind();
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
