// What the Winograd kernels share: the call, the weights' transform, one window's epilogue.
//
// F(2, 3) keeps to the pixels that an output sees, so that no other pixel's rounding reaches it:
//   y0 = m0 + m1 + m2   of   d0 - d2, d1 + d2, d2 - d1
//   y1 = m1 - m2 - m3   of   d1 + d2, d2 - d1, d1 - d3
// and so does F(2x2, 3x3), which is F(2, 3) either way. F(4x4, 3x3) does not: uneven_tiles.h. All
// mix a filter's taps: an output errs in proportion to its filter's norm, also where a large tap
// meets only zeros.
//
// Sums of patch elements could overflow, and an infinity less another is NaN. Kernels of
// F(2x2, 3x3) therefore leave an image with values beyond kModerate, infinity or NaN to the general
// kernel; winograd_f4x4 leaves such a tile to plain sums. Where the weights or the bias
// hold such a value, the general kernel takes the whole call.
#pragma once

#include "cpu/derived_weights.h"
#include "cpu/kernel.h"
#include "cpu/kernels/ahead.h"
#include "cpu/kernels/block_3x3.h"
#include "cpu/kernels/forward_general.h"
#include "cpu/kernels/forward_general_moments.h"
#include "cpu/kernels/moments.h"
#include "cpu/kernels/output_lanes.h"
#include "cpu/kernels/phase_planes.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/transpose.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Inputs and transformed weights up to this size cannot overflow: the transforms grow a value by
// less than 2^5 each, so sums stay below channels x 2^(48 + 48 + 10), and channels below 2^20 are
// fine.
constexpr float kModerate = 281474976710656.0f;  // 2^48

// Bytes of a band's transformed input: half of a small L2, the rest being weights and output.
constexpr int64_t kWinogradBandBytes = int64_t{256} << 10;
// Pooled rows of a band at least: neighbouring bands transform the rows that both need.
constexpr int64_t kWinogradMinBand = 4;

struct WinogradShared {
  int64_t band;          // rows of outputs of a task
  int64_t bands;         // of one image
  const float* weights;  // U
  const float* bias;     // [padded]
  int64_t padded;        // output channels, whole vectors
  uint8_t* immoderate;   // [batch * bands], set where an image is left to the general kernel
};

// A task's moments, of `count` outputs of each channel, which the bias has yet to be added to.
inline void write_moments(const ForwardArgs& args, const WinogradShared& shared, int64_t task,
                          int64_t count, const TaskMoments<float>& moments) {
  const int64_t out_channels = args.geometry.out_channels;
  Moments* const to = args.moments + task * out_channels;
  moments.write(out_channels, count, to);
  for (int64_t oc = 0; oc < out_channels; ++oc) to[oc].mean += shared.bias[oc];
}

// Max, bias, perhaps ReLU, and code of one window, or of one for every lane, from its four outputs.
// The first maximum wins; there is no NaN. The maximum plus the bias is the maximum of the sums, as
// rounding keeps the order; with kBiased the outputs hold it already. codes: where to, or null.
template <bool kReLU, bool kBiased = false>
FUSEDCNN_INLINE void finish_window(Vector<float> e0, Vector<float> e1, Vector<float> e2,
                                   Vector<float> e3, Vector<float> bias, float* values,
                                   uint8_t* codes) {
  const Vector<float> top = maximum(e1, e0), bottom = maximum(e3, e2);
  const Vector<float> most = maximum(bottom, top), best = kBiased ? most : most + bias;
  store(values, kReLU ? maximum(best, Vector<float>{}) : best);
  if (!codes) return;
  const Vector<int32_t> in_top = e1 > e0 ? broadcast<int32_t>(1) : Vector<int32_t>{};
  const Vector<int32_t> in_bottom = e3 > e2 ? broadcast<int32_t>(3) : broadcast<int32_t>(2);
  Vector<int32_t> winner = bottom > top ? in_bottom : in_top;
  if constexpr (kReLU) {
    winner = best > Vector<float>{} ? winner : broadcast<int32_t>(kOff<uint8_t>);
  }
  store_codes(winner, codes);
}

// Whether no value is beyond kModerate, infinite or NaN. count: a multiple of the lanes.
inline bool moderate(const float* values, int64_t count) {
  RangeCheck<float> range(kModerate);
  for (int64_t k = 0; k < count; k += kLanes<float>) range.see(load(values + k));
  return range.passed();
}

// Fetches the next image during `steps` steps of a band; with several bands, by each its share.
template <typename S>
Ahead next_image(const ForwardArgs& args, int64_t n, int64_t steps) {
  const Geometry& g = args.geometry;
  return Ahead::of(static_cast<const S*>(args.input), args.input_strides, g.in_channels, g.h.in,
                   g.w.in, n, g.batch, steps);
}

// Rows of outputs of a task. They begin at rows of winograd_f4x4's tiles, so that these lie where
// they lie without bands, and an image's result does not depend on how the batch is cut.
inline int64_t winograd_band(const Geometry& g, bool plane) {
  const int64_t pool = plane ? 1 : 2;  // along either axis
  const int64_t row_bytes = g.in_channels * 2 * pool * pool * g.w.out * int64_t{sizeof(float)};
  const int64_t fitting = kWinogradBandBytes / row_bytes - 1, least = 2 * kWinogradMinBand / pool;
  return round_up(band_rows(g, fitting, least), 4 / pool);
}

// Runs `band` over all bands of all images, then the general kernel over the images that it
// refuses. derived: U. band(args, shared, task): see the kernels.
template <typename S>
void run_winograd(const ForwardArgs& args, const ThreadPool& pool, const DerivedWeights& derived,
                  void (*band)(const ForwardArgs&, const WinogradShared&, int64_t)) {
  const Geometry& g = args.geometry;
  const int64_t rows = winograd_band(g, is_plane(g, args.relu));
  const auto leave_to_general = [&] {
    if (args.moments) general_moments<S>(args, pool, 2 * rows, nullptr);
    forward_general(args, pool);
  };
  if (!derived.usable()) return leave_to_general();
  const int64_t bands = (g.h.out + rows - 1) / rows;
  const int64_t padded = round_up(g.out_channels, kLanes<float>);
  float* bias = static_cast<float*>(
      scratch(Slot::kTransformed, padded * int64_t{sizeof(float)} + g.batch * bands));
  uint8_t* immoderate = reinterpret_cast<uint8_t*>(bias + padded);
  memset(bias, 0, padded * sizeof(float) + g.batch * bands);
  for (int64_t oc = 0; oc < g.out_channels && args.bias; ++oc) {
    bias[oc] = widen(static_cast<const S*>(args.bias)[oc * args.bias_stride]);
  }
  if (!moderate(bias, padded)) return leave_to_general();
  const WinogradShared shared{rows, bands, derived.data(), bias, padded, immoderate};
  parallel_tasks(pool, g.batch * bands, [&](int64_t task) { band(args, shared, task); });
  if (!memchr(immoderate, 1, g.batch * bands)) return;
  for (int64_t n = 0; n < g.batch; ++n) {
    immoderate[n] = memchr(immoderate + n * bands, 1, bands) != nullptr;
  }
  if (args.moments) general_moments<S>(args, pool, 2 * rows, immoderate);
  forward_general_bands<S, uint8_t>(args, pool, immoderate);
}

// U = G g G^T for every pair of channels, a vector of output channels at a time, in blocks of
// Transform::kWide vectors as long as they are full, then of one. False: a value is beyond
// kModerate.
template <typename Transform, typename S>
bool transform_weights(const ForwardArgs& args, const ThreadPool& pool, const S* weight,
                       float* weights) {
  constexpr int kN = kLanes<float>;
  constexpr int kElements = Transform::kElements;
  const int64_t channels = args.geometry.in_channels;
  const int64_t padded = round_up(args.geometry.out_channels, kN);
  parallel_tasks(pool, padded / kN, [&](int64_t task) {
    const int64_t first = task * kN, wide = Transform::kWide * kN;
    const bool in_wide = first / wide * wide + wide <= padded;
    const int64_t vectors = in_wide ? Transform::kWide : 1;
    const int64_t block = in_wide ? first / wide * wide : first;
    float* to = weights + block * kElements * channels + (first - block);
    float* taps =
        static_cast<float*>(scratch(Slot::kPlanes, channels * 9 * kN * int64_t{sizeof(float)}));
    weights_by_tap<S>(args, weight, first, taps);
    for (int64_t c = 0; c < channels; ++c, taps += 9 * kN) {
      Vector<float> k[3][3], u[kElements];
      FUSEDCNN_UNROLL
      for (int t = 0; t < 9; ++t) k[t / 3][t % 3] = load(taps + t * kN);
      Transform::weights(k, u);
      FUSEDCNN_UNROLL
      for (int e = 0; e < kElements; ++e) {
        store(to + Transform::place(e, c, channels) * vectors * kN, u[e]);
      }
    }
  });
  return moderate(weights, kElements * channels * padded);
}

template <typename Transform, typename S>
void forward_winograd_typed(const ForwardArgs& args, const ThreadPool& pool) {
  const Geometry& g = args.geometry;
  int64_t bytes;
  const DerivedKey key =
      derived_key(args, reinterpret_cast<const void*>(&Transform::template band<S>), bytes);
  DerivedWeights derived(
      key, bytes, Transform::kElements * g.in_channels * round_up(g.out_channels, kLanes<float>));
  if (!derived.filled()) {
    derived.keep(transform_weights<Transform>(args, pool, static_cast<const S*>(derived.source()),
                                              derived.data()));
  }
  run_winograd<S>(args, pool, derived, Transform::template band<S>);
}

template <typename Transform>
void forward_winograd(const ForwardArgs& args, const ThreadPool& pool) {
  for_block_storage(args.type,
                    [&]<typename S>(S) { forward_winograd_typed<Transform, S>(args, pool); });
}

const char* why_not_winograd(const Problem& problem) {
  const Geometry& g = problem.geometry;
  if (problem.wide_code) return "writes codes of one byte";
  if (g.h.out * 2 > g.h.conv || g.w.out * 2 > g.w.conv) return "a window reaches over the edge";
  if (const char* because = why_not_3x3_block(problem)) return because;
  return problem.moments ? why_no_moments(g) : nullptr;
}

// One of each band of each image.
int64_t winograd_moment_slots(const Problem& problem) {
  const Geometry& g = problem.geometry;
  const int64_t rows = winograd_band(g, /*plane=*/false);
  return g.batch * ((g.h.out + rows - 1) / rows);
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
