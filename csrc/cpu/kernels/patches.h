// The backward's padded image of one group, [rows][cols][channels], and its way in and out.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/simd.h"
#include "cpu/plan.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Scratch for one padded image, with room behind it for the last vectors of the last patch.
template <typename T>
T* patch_image(const BackwardPlan& plan) {
  const int64_t slack = plan.run(kLanes<T>) + kLanes<T>;
  T* image = static_cast<T*>(scratch(Slot::kPatch, (plan.size + slack) * sizeof(T)));
  memset(image + plan.size, 0, slack * sizeof(T));
  return image;
}

// Transposes an N x N block held in vectors, N lanes each: log2(N) rounds of swapping the two
// off-diagonal quarters.
template <typename T, int Distance = 1>
FUSEDCNN_INLINE void transpose(Vector<T> (&rows)[kLanes<T>]) {
  constexpr int kN = kLanes<T>;
  if constexpr (Distance < kN) {
    Vector<Int<T>> low, high;
    for (int i = 0; i < kN; ++i) {
      low[i] = i & Distance ? kN + (i ^ Distance) : i;
      high[i] = i & Distance ? kN + i : i ^ Distance;
    }
    for (int i = 0; i < kN; ++i) {
      if (i & Distance) continue;
      const Vector<T> a = rows[i], b = rows[i + Distance];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + Distance] = __builtin_shuffle(a, b, high);
    }
    transpose<T, Distance * 2>(rows);
  }
}

// Copies one group of one image into [rows][cols][channels], zeros around it.
template <typename S, typename T>
void pack_patches(const BackwardPlan& plan, const BackwardArgs& args, int64_t n, int64_t group,
                  T* image) {
  const Geometry& g = args.geometry;
  const Strides strides = args.input_strides;
  const int64_t channels = g.in_channels_per_group();
  const S* input = static_cast<const S*>(args.input) + n * strides.n + group * channels * strides.c;
  const int64_t left = smaller(g.w.padding, plan.cols);
  const int64_t width = smaller(g.w.in, plan.cols - left);
  for (int64_t y = 0; y < plan.rows; ++y) {
    T* to = image + y * plan.cols * plan.channels;
    const int64_t source = y - g.h.padding;
    if (source < 0 || source >= g.h.in || width < 1) {
      memset(to, 0, plan.cols * plan.channels * sizeof(T));
      continue;
    }
    memset(to, 0, left * plan.channels * sizeof(T));
    to += left * plan.channels;
    const S* from = input + source * strides.h;
    for (int64_t x = 0; x < width; ++x) {
      for (int64_t c = 0; c < channels; ++c) {
        to[x * plan.channels + c] = widen(from[c * strides.c + x * strides.w]);
      }
    }
    memset(to + width * plan.channels, 0, (plan.cols - left - width) * plan.channels * sizeof(T));
  }
}

// Copies [rows][cols][channels] into one group of one image of grad_input; what no tap reaches
// gets zeros.
template <typename S, typename T>
void unpack_patches(const BackwardPlan& plan, const BackwardArgs& args, int64_t n, int64_t group,
                    const T* image) {
  const Geometry& g = args.geometry;
  const Strides strides = args.grad_input_strides;
  const int64_t channels = g.in_channels_per_group();
  S* output = static_cast<S*>(args.grad_input) + n * strides.n + group * channels * strides.c;
  for (int64_t y = 0; y < g.h.in; ++y) {
    const bool reached = y + g.h.padding < plan.rows;
    const int64_t width = reached ? smaller(g.w.in, plan.cols - g.w.padding) : 0;
    const T* from = image + ((y + g.h.padding) * plan.cols + g.w.padding) * plan.channels;
    for (int64_t c = 0; c < channels; ++c) {
      S* to = output + c * strides.c + y * strides.h;
      for (int64_t x = 0; x < width; ++x)
        to[x * strides.w] = narrow<S>(from[x * plan.channels + c]);
      for (int64_t x = larger<int64_t>(width, 0); x < g.w.in; ++x) to[x * strides.w] = S{};
    }
  }
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
