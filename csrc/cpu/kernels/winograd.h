// What the Winograd kernels share: the call, the weights' transform, one window's epilogue.
//
// Sums of patch elements could overflow, and an infinity would reach outputs that it does not
// touch; a band with values beyond kModerate, infinity or NaN is left to the general kernel, and so
// is the whole call where the weights or the bias hold such a value.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/forward_general.h"
#include "cpu/kernels/phase_planes.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/transpose.h"
#include "cpu/kernels/windows.h"
#include "cpu/plan.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Inputs and transformed weights up to this size cannot overflow: the transforms grow a value by
// less than 2^5 each, so sums stay below channels x 2^(48 + 48 + 10), and channels below 2^20 are
// fine.
constexpr float kModerate = 281474976710656.0f;  // 2^48

struct WinogradShared {
  const ForwardPlan& plan;  // its bands are the tasks
  const float* weights;     // U
  const float* bias;        // [padded]
  int64_t padded;           // output channels, whole vectors
  uint8_t* immoderate;      // [batch * bands], set where a band is left to the general kernel
};

// A byte for every lane.
typedef uint8_t LaneBytes __attribute__((vector_size(kLanes<float>)));

// Max, ReLU and code of one window, or of one for every lane, from its four outputs. The first
// maximum wins; there is no NaN. codes: where to, or null.
FUSEDCNN_INLINE void finish_window(Vector<float> e0, Vector<float> e1, Vector<float> e2,
                                   Vector<float> e3, float* values, uint8_t* codes) {
  const Vector<float> top = maximum(e1, e0), bottom = maximum(e3, e2);
  const Vector<float> best = maximum(bottom, top);
  store(values, maximum(best, Vector<float>{}));
  if (!codes) return;
  const Vector<int32_t> in_top = e1 > e0 ? broadcast<int32_t>(1) : Vector<int32_t>{};
  const Vector<int32_t> in_bottom = e3 > e2 ? broadcast<int32_t>(3) : broadcast<int32_t>(2);
  Vector<int32_t> winner = bottom > top ? in_bottom : in_top;
  winner = best > Vector<float>{} ? winner : broadcast<int32_t>(kOff<uint8_t>);
  const LaneBytes bytes = __builtin_convertvector(winner, LaneBytes);
  memcpy(codes, &bytes, sizeof bytes);
}

// Writes [count][padded channels] into `count` pooled pixels, numbered row by row, from `to` on.
template <typename From, typename To>
void write_strip(const From* from, int64_t padded, int64_t count, int64_t channels, To* to,
                 Strides strides) {
  if (strides.w == 1) {
    transpose_matrix(from, padded, to, strides.c, count, channels);
  } else {  // channels_last: a row's pixels follow the last row's
    for (int64_t p = 0; p < count; ++p) {
      convert_run(from + p * padded, to + p * strides.w, channels);
    }
  }
}

// The weights as [C][9][padded], output channels side by side, zeros past the last.
template <typename S>
void weights_by_tap(const ForwardArgs& args, int64_t padded, float* to) {
  const Geometry& g = args.geometry;
  const Strides s = args.weight_strides;
  const S* weight = static_cast<const S*>(args.weight);
  if (padded != g.out_channels) memset(to, 0, g.in_channels * 9 * padded * sizeof(float));
  if (s.w == 1 && s.h == 3 && s.c == 9) {
    return transpose_matrix(weight, s.n, to, padded, g.out_channels, g.in_channels * 9);
  }
  for (int64_t c = 0; c < g.in_channels; ++c) {
    for (int t = 0; t < 9; ++t, to += padded) {
      const S* from = weight + c * s.c + t / 3 * s.h + t % 3 * s.w;
      for (int64_t oc = 0; oc < g.out_channels; ++oc) to[oc] = widen(from[oc * s.n]);
    }
  }
}

// U = G g G^T for every pair of channels, a vector of output channels at a time, in blocks of
// Transform::kWide vectors as long as they are full, then of one. taps: [C][9][padded].
template <typename Transform>
void transform_weights(const float* taps, int64_t channels, int64_t padded, float* weights) {
  constexpr int kN = kLanes<float>;
  constexpr int kElements = Transform::kElements;
  for (int64_t first = 0; first < padded; first += kN) {
    const int64_t wide = Transform::kWide * kN;
    const bool in_wide = first / wide * wide + wide <= padded;
    const int64_t vectors = in_wide ? Transform::kWide : 1;
    const int64_t block = in_wide ? first / wide * wide : first;
    float* to = weights + block * kElements * channels + (first - block);
    for (int64_t c = 0; c < channels; ++c) {
      const float* from = taps + c * 9 * padded + first;
      Vector<float> k[3][3], u[kElements];
      FUSEDCNN_UNROLL
      for (int t = 0; t < 9; ++t) k[t / 3][t % 3] = load(from + t * padded);
      Transform::weights(k, u);
      FUSEDCNN_UNROLL
      for (int e = 0; e < kElements; ++e) {
        store(to + Transform::place(e, c, channels) * vectors * kN, u[e]);
      }
    }
  }
}

// Runs `band` over all bands, and the general kernel over those that it refuses. checked: elements
// from `shared.weights` on, the bias among them, in whole vectors.
template <typename S>
void run_winograd(const ForwardArgs& args, const ThreadPool& pool, const WinogradShared& shared,
                  int64_t checked,
                  void (*band)(const ForwardArgs&, const WinogradShared&, int64_t)) {
  const int64_t bands = args.geometry.batch * shared.plan.bands(args.geometry);
  RangeCheck<float> range(kModerate);  // so that no NaN arises here and none is passed on
  for (int64_t k = 0; k < checked; k += kLanes<float>) range.see(load(shared.weights + k));
  if (!range.passed()) return forward_general(args, pool);
  memset(shared.immoderate, 0, bands);
  parallel_tasks(pool, bands, [&](int64_t task) { band(args, shared, task); });
  if (memchr(shared.immoderate, 1, bands)) {
    forward_general_bands<S, uint8_t>(args, pool, shared.immoderate);
  }
}

template <typename Transform, typename S>
void forward_winograd_typed(const ForwardArgs& args, const ThreadPool& pool) {
  const Geometry& g = args.geometry;
  const ForwardPlan plan(g, sizeof(float), kLanes<float>);
  const int64_t padded = round_up(g.out_channels, kLanes<float>);
  const int64_t u_size = Transform::kElements * g.in_channels * padded;
  const int64_t bands = g.batch * plan.bands(g);
  const int64_t taps_size = g.in_channels * 9 * padded;
  float* weights = static_cast<float*>(
      scratch(Slot::kTransformed, (u_size + padded + taps_size) * sizeof(float) + bands));
  float* bias = weights + u_size;
  float* taps = bias + padded;
  uint8_t* immoderate = reinterpret_cast<uint8_t*>(taps + taps_size);
  weights_by_tap<S>(args, padded, taps);
  transform_weights<Transform>(taps, g.in_channels, padded, weights);
  for (int64_t oc = 0; oc < padded; ++oc) {
    const bool real = args.bias && oc < g.out_channels;
    bias[oc] = real ? widen(static_cast<const S*>(args.bias)[oc * args.bias_stride]) : 0.0f;
  }
  run_winograd<S>(args, pool, {plan, weights, bias, padded, immoderate}, u_size + padded,
                  Transform::template band<S>);
}

template <typename Transform>
void forward_winograd(const ForwardArgs& args, const ThreadPool& pool) {
  switch (args.type) {
    case DataType::kFloat32: return forward_winograd_typed<Transform, float>(args, pool);
    case DataType::kBFloat16: return forward_winograd_typed<Transform, BFloat16>(args, pool);
    case DataType::kFloat16: return forward_winograd_typed<Transform, Float16>(args, pool);
    case DataType::kFloat64: return;  // refused by why_not
  }
}

const char* why_not_winograd(const Problem& problem) {
  const Geometry& g = problem.geometry;
  if (problem.wide_code) return "writes codes of one byte";
  if (g.h.out * 2 > g.h.conv || g.w.out * 2 > g.w.conv) return "a window reaches over the edge";
  return why_not_windows(problem);
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
