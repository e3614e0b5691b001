// The forward's input layout: one band of one channel, split into phase planes (plan.h).
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/transpose.h"
#include "cpu/plan.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Watches values on their way for any beyond a limit, infinite or NaN. As integers, the bits of
// magnitudes are in the order of the magnitudes, infinity and then NaN the largest.
template <typename T>
struct RangeCheck {
  T most;
  Vector<Int<T>> largest = {};

  explicit RangeCheck(T most) : most(most) {}

  FUSEDCNN_INLINE void see(Vector<T> x) {
    constexpr auto kMagnitude = static_cast<Int<T>>(~(uint64_t{1} << (8 * sizeof(T) - 1)));
    const Vector<Int<T>> bits = (Vector<Int<T>>)x & kMagnitude;
    largest = bits > largest ? bits : largest;
  }

  bool passed() const {
    Int<T> limit;
    memcpy(&limit, &most, sizeof limit);
    bool all = true;
    for (int l = 0; l < kLanes<T>; ++l) all &= largest[l] <= limit;
    return all;
  }
};

// Every third of 3 * lanes - 2 elements: one channel of the pixels of an RGB image.
template <typename S>
FUSEDCNN_INLINE Vector<float> load_third(const S* from) {
  constexpr int kN = kLanes<float>;
  Vector<int32_t> low, high;
  FUSEDCNN_UNROLL
  for (int l = 0; l < kN; ++l) {
    low[l] = 3 * l < 2 * kN ? 3 * l : 0;
    high[l] = 3 * l < 2 * kN ? l : kN + 3 * l - (2 * kN - 2);
  }
  const auto first = __builtin_shuffle(widen_vector(from), widen_vector(from + kN), low);
  return __builtin_shuffle(first, widen_vector(from + 2 * kN - 2), high);
}

// to[x] = from[x * stride], x < width, in the accumulation type.
template <typename S, typename T>
FUSEDCNN_INLINE void copy_row(const S* from, int64_t stride, int64_t width, T* to,
                              RangeCheck<T>& check) {
  constexpr int kN = kLanes<T>;
  if (sizeof(S) == sizeof(T) && stride == 1 && width >= kN) {
    const T* source = reinterpret_cast<const T*>(from);
    // The last vector ends with the row and overlaps the one before.
    for (int64_t x = 0; x < width; x += kN) {
      const int64_t at = smaller(x, width - kN);
      const Vector<T> value = load(source + at);
      check.see(value);
      store(to + at, value);
    }
    return;
  }
  if (stride == 1) {
    convert_run(from, to, width);
  } else if (std::is_same_v<T, float> && stride == 3 && width >= kN) {
    for (int64_t x = 0; x < width; x += kN) {
      const int64_t at = smaller(x, width - kN);
      if constexpr (std::is_same_v<T, float>) store(to + at, load_third(from + 3 * at));
    }
  } else {
    for (int64_t x = 0; x < width; ++x) to[x] = widen(from[x * stride]);
  }
  // Rows have room for whole vectors, of zeros where nothing was written.
  for (int64_t x = 0; x < width; x += kN) check.see(load(to + x));
}

// to[p][k] = from[k * step + phase of p], k < count, for every phase in use. Writes whole vectors:
// up to a vector past `count` in each plane.
template <typename T>
FUSEDCNN_INLINE void split_row(const T* from, const AxisPhases& axis, T* to, int64_t plane_size,
                               int64_t count) {
  constexpr int kN = kLanes<T>;
  if (axis.step == 1) {
    for (int64_t k = 0; k < count; k += kN) store(to + k, load(from + k));
  } else if (axis.step == 2 && axis.input_phases == 2 && axis.input_phase[0] == 0) {
    Vector<Int<T>> even, odd;
    FUSEDCNN_UNROLL
    for (int l = 0; l < kN; ++l) {
      even[l] = 2 * l;
      odd[l] = 2 * l + 1;
    }
    for (int64_t k = 0; k < count; k += kN) {
      const Vector<T> a = load(from + 2 * k), b = load(from + 2 * k + kN);
      store(to + k, __builtin_shuffle(a, b, even));
      store(to + plane_size + k, __builtin_shuffle(a, b, odd));
    }
  } else {
    for (int64_t p = 0; p < axis.input_phases; ++p) {
      const T* source = from + axis.input_phase[p];
      for (int64_t k = 0; k < count; ++k) to[p * plane_size + k] = source[k * axis.step];
    }
  }
}

// Elements of one row of pack_band's scratch.
FUSEDCNN_INLINE int64_t packed_row(const ForwardPlan& plan, int64_t lanes) {
  return plan.pitch * plan.w.step + 2 * lanes;
}

// Lays out the input rows of one band of one channel in phase planes, zeros outside the image.
// image: the channel's [H, W] with strides; planes: [phases_h * phases_w][plane_rows][pitch];
// rows: scratch for [plane_rows][packed_row], zeros outside the image's columns already.
template <typename S, typename T>
FUSEDCNN_NOINLINE void pack_band(const ForwardPlan& plan, const Geometry& g, const S* image,
                                 Strides strides, int64_t first_out, T* planes, T* rows,
                                 RangeCheck<T>& range) {
  RangeCheck<T> check = range;          // in a register
  const int64_t left = -plan.w.origin;  // padding in front of a row
  const int64_t width = smaller(g.w.in, larger<int64_t>(plan.pitch * plan.w.step - left, 0));
  const int64_t row_size = packed_row(plan, kLanes<T>);
  for (int64_t p = 0; p < plan.h.input_phases; ++p) {
    // Input row of plane row i: y0 + i * step. Those of the image are i in [begin, end).
    const int64_t y0 = first_out * plan.h.step + plan.h.input_phase[p] + plan.h.origin;
    const int64_t begin =
        smaller(plan.plane_rows, y0 < 0 ? (plan.h.step - 1 - y0) / plan.h.step : int64_t{0});
    const int64_t below = g.h.in - y0;
    const int64_t end = larger(
        begin,
        smaller(plan.plane_rows, below > 0 ? (below + plan.h.step - 1) / plan.h.step : int64_t{0}));
    // First every row in order, then every row apart: a vector load soon after the narrower stores
    // that it spans would wait for them.
    for (int64_t i = begin; i < end; ++i) {
      copy_row<S, T>(image + (y0 + i * plan.h.step) * strides.h, strides.w, width,
                     rows + i * row_size + left, check);
    }
    T* plane = planes + p * plan.w.input_phases * plan.plane_size;
    for (int64_t q = 0; q < plan.w.input_phases; ++q) {
      memset(plane + q * plan.plane_size, 0, begin * plan.pitch * sizeof(T));
    }
    for (int64_t i = begin; i < end; ++i) {
      split_row(rows + i * row_size, plan.w, plane + i * plan.pitch, plan.plane_size, plan.pitch);
    }
    // With the gap behind the plane, where whole vectors end that begin in its last row.
    for (int64_t q = 0; q < plan.w.input_phases; ++q) {
      memset(plane + q * plan.plane_size + end * plan.pitch, 0,
             ((plan.plane_rows - end) * plan.pitch + kLanes<T>)*sizeof(T));
    }
  }
  range = check;
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
