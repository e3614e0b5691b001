// The forward by Winograd's minimal filtering F(2, 3) along the rows, for 3x3 stride 1 under a 2x2
// pool. A lane is a pooling window, so results leave in the order of the output.
//
// The two outputs of a row of a window take 12 multiplications per input channel instead of 18:
//   y = A^T [ sum over c, kh of (G g) * (B^T d) ]            (Winograd, 1980)
// All constants are 0, +-1 and 1/2, so integers stay exact and a constant patch gives four equal
// outputs. One more dimension would halve the multiplications again (forward_winograd_f2x2.h), but
// for few channels its transforms cost what it saves; here the inverse transform, bias, ReLU, max
// and code never leave the registers.
//
// A task owns a band of pooled rows of one image and walks its windows, numbered row by row:
//   R  [channels][2][4 j][band + 1][OW]         d B: even and odd input rows, transformed along w
//   U  [groups][channels][4 j][3 kh][R]         G g, R output channels side by side
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/winograd.h"
#include "cpu/kernels/winograd_rows.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Output channels of a register tile, 8 accumulators each. An input channel costs 16 loads and 12 R
// broadcasts for 24 R FMAs.
constexpr int kWinogradGroup = kRegisters >= 32 ? 3 : 1;

// Output channels of the group that starts at `first`: never a single one behind groups of three.
FUSEDCNN_INLINE int64_t group_size(int64_t first, int64_t out_channels) {
  const int64_t left = out_channels - first;
  return left == 4 && kWinogradGroup == 3 ? 2 : smaller<int64_t>(kWinogradGroup, left);
}

// One call owns one vector of windows x R output channels: all four outputs of each window.
// r: R at the first window, channels `channel_size` and the four j `plane` apart. u: [channels][4]
// [3][R]. bias: [R]. values, codes: R rows of lanes, `stride` apart; codes may be null.
template <int R, bool kReLU>
FUSEDCNN_NOINLINE void window_vector(const float* r, int64_t channel_size, int64_t plane,
                                     int64_t width, int64_t channels, const float* u,
                                     const float* bias, float* values, uint8_t* codes,
                                     int64_t stride) {
  Vector<float> m[R][2][4];
  FUSEDCNN_UNROLL
  for (int i = 0; i < R * 8; ++i) m[i / 8][i / 4 % 2][i % 4] = Vector<float>{};
  for (int64_t c = 0; c < channels; ++c, r += channel_size) {
    FUSEDCNN_UNROLL
    for (int j = 0; j < 4; ++j, u += 3 * R) {
      const float* even = r + j * plane;
      const float* odd = even + 4 * plane;
      Vector<float> row[4] = {load(even), load(odd), load(even + width), load(odd + width)};
      FUSEDCNN_UNROLL
      for (int i = 0; i < 4; ++i) keep(row[i]);
      FUSEDCNN_UNROLL
      for (int kh = 0; kh < 3; ++kh) {
        FUSEDCNN_UNROLL
        for (int o = 0; o < R; ++o) {
          Vector<float> weight = broadcast(u[kh * R + o]);
          keep(weight);
          m[o][0][j] += weight * row[kh];
          m[o][1][j] += weight * row[kh + 1];
        }
      }
    }
  }
  FUSEDCNN_UNROLL
  for (int o = 0; o < R; ++o) {
    Vector<float> y[4];
    FUSEDCNN_UNROLL
    for (int i = 0; i < 2; ++i) {
      y[2 * i] = m[o][i][0] + m[o][i][1] + m[o][i][2];
      y[2 * i + 1] = m[o][i][1] - m[o][i][2] - m[o][i][3];
    }
    finish_window<kReLU>(y[0], y[1], y[2], y[3], broadcast(bias[o]), values + o * stride,
                         codes ? codes + o * stride : codes);
  }
}

// Writes [channels][lanes] into `count` pooled pixels, numbered row by row, from `to` on.
template <typename From, typename To>
void write_lanes(const From* from, int64_t count, int64_t channels, To* to, Strides strides) {
  if (strides.w != 1) {  // channels_last: a row's pixels follow the last row's
    return transpose_matrix(from, kLanes<float>, to, strides.w, channels, count);
  }
  for (int64_t oc = 0; oc < channels; ++oc) {
    convert_run(from + oc * kLanes<float>, to + oc * strides.c, count);
  }
}

template <typename S>
void winograd_f2_band(const ForwardArgs& args, const WinogradShared& shared, int64_t task) {
  constexpr int kN = kLanes<float>;
  const Geometry& g = args.geometry;
  const int64_t bands = shared.bands;
  const int64_t n = task / bands, first_out = task % bands * shared.band;
  const int64_t windows = smaller(shared.band, g.h.out - first_out) * g.w.out;

  const int64_t row_size = round_up(2 * g.w.out + 2 + 2 * kN, kN);
  const int64_t rows_size = round_up((2 * shared.band + 2) * row_size, kN);
  const int64_t plane = round_up((shared.band + 1) * g.w.out, kN) + kN;
  float* in_order = static_cast<float*>(
      scratch(Slot::kPlanes, (rows_size + g.in_channels * 8 * plane + kN) * sizeof(float)));
  float* r = in_order + rows_size;
  memset(in_order, 0, rows_size * sizeof(float));
  const S* image = static_cast<const S*>(args.input) + n * args.input_strides.n;
  RangeCheck<float> range(kModerate);
  for (int64_t c = 0; c < g.in_channels; ++c) {
    transform_rows<S>(g, image + c * args.input_strides.c, args.input_strides, first_out,
                      shared.band, plane, row_size, in_order, r + c * 8 * plane, range);
  }
  if (!range.passed()) {
    shared.immoderate[task] = 1;
    return;
  }

  float* values =
      static_cast<float*>(scratch(Slot::kConv, g.out_channels * kN * int64_t{sizeof(float) + 1}));
  uint8_t* codes = reinterpret_cast<uint8_t*>(values + g.out_channels * kN);
  Ahead ahead = next_image<S>(args, n, (windows + kN - 1) / kN);
  for (int64_t first = 0; first < windows; first += kN) {
    ahead.step();
    const int64_t at = n * args.output_strides.n + first_out * args.output_strides.h +
                       first * args.output_strides.w;
    S* output = static_cast<S*>(args.output) + at;
    uint8_t* code = args.code ? static_cast<uint8_t*>(args.code) + at : nullptr;
    const bool direct =
        std::is_same_v<S, float> && args.output_strides.w == 1 && first + kN <= windows;
    const int64_t stride = direct ? args.output_strides.c : int64_t{kN};
    float* to = direct ? reinterpret_cast<float*>(output) : values;
    uint8_t* code_to = direct || !code ? code : codes;
    for (int64_t oc = 0; oc < g.out_channels;) {
      const int64_t group = group_size(oc, g.out_channels);
      const auto call = [&]<int R>() {
        const auto windows_of = args.relu ? window_vector<R, true> : window_vector<R, false>;
        windows_of(r + first, 8 * plane, plane, g.w.out, g.in_channels,
                   shared.weights + oc * g.in_channels * 12, shared.bias + oc, to + oc * stride,
                   code_to ? code_to + oc * stride : code_to, stride);
      };
      if (group == 1) call.template operator()<1>();
      if constexpr (kWinogradGroup == 3) {
        if (group == 2) call.template operator()<2>();
        if (group == 3) call.template operator()<3>();
      }
      oc += group;
    }
    if (direct) continue;
    const int64_t count = smaller<int64_t>(kN, windows - first);
    write_lanes(values, count, g.out_channels, output, args.output_strides);
    if (code) write_lanes(codes, count, g.out_channels, code, args.output_strides);
  }
}

// U = G g, in the groups' layout.
template <typename S>
void transform_weights_1d(const ForwardArgs& args, const S* source, float* u) {
  const Geometry& g = args.geometry;
  const Strides s = args.weight_strides;
  for (int64_t first = 0; first < g.out_channels;) {
    const int64_t group = group_size(first, g.out_channels);
    for (int64_t o = 0; o < group; ++o) {
      const S* weight = source + (first + o) * s.n;
      for (int64_t c = 0; c < g.in_channels; ++c) {
        float* to = u + (first * g.in_channels + c * group) * 12 + o;
        for (int64_t kh = 0; kh < 3; ++kh) {
          const S* row = weight + c * s.c + kh * s.h;
          const float g0 = widen(row[0]), g1 = widen(row[s.w]), g2 = widen(row[2 * s.w]);
          const float spread[4] = {g0, (g0 + g1 + g2) * 0.5f, (g0 - g1 + g2) * 0.5f, g2};
          for (int64_t j = 0; j < 4; ++j) to[(j * 3 + kh) * group] = spread[j];
        }
      }
    }
    first += group;
  }
}

template <typename S>
void forward_winograd_f2_typed(const ForwardArgs& args, const ThreadPool& pool) {
  const Geometry& g = args.geometry;
  int64_t bytes;
  const DerivedKey key =
      derived_key(args, reinterpret_cast<const void*>(&winograd_f2_band<S>), bytes);
  const int64_t size = round_up(12 * g.in_channels * g.out_channels, kLanes<float>);
  DerivedWeights derived(key, bytes, size);
  if (!derived.filled()) {
    memset(derived.data(), 0, size * sizeof(float));  // for the whole vectors of the check
    transform_weights_1d(args, static_cast<const S*>(derived.source()), derived.data());
    derived.keep(moderate(derived.data(), size));
  }
  run_winograd<S>(args, pool, derived, winograd_f2_band<S>);
}

const char* why_not_winograd_f2(const Problem& problem) {
  const Geometry& g = problem.geometry;
  // Where winograd_f2x2 has vectors of output channels to fill, it is faster from here on.
  const int64_t most = g.out_channels >= kLanes<float> / 2 ? 7 : 64;
  if (g.in_channels > most) return "too many input channels";
  return why_not_winograd(problem);
}

void forward_winograd_f2(const ForwardArgs& args, const ThreadPool& pool) {
  for_block_storage(args.type, [&]<typename S>(S) { forward_winograd_f2_typed<S>(args, pool); });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
