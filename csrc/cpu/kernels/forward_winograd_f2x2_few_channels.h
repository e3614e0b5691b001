// The forward by Winograd's minimal filtering F(2x2, 3x3) for few input channels, for 3x3 stride 1
// under a 2x2 pool. A lane is a pooling window, so results leave in the order of the output, and
// nothing is transposed.
//
// The transform is that of forward_winograd_f2x2.h, whose properties it shares: a window's four
// outputs take 16 multiplications per input channel instead of 36, integers stay exact, and a
// constant patch gives four equal outputs. Its additions are ordered so that most products are
// added to where they belong by the multiply-add that makes them. With column j of the 4x4 elements
// m[i][j], of which row 3 and column 3 count negative in U already,
//   upper = (m[1][j] + m[2][j]) + m[0][j]     lower = (m[1][j] - m[2][j]) + m[3][j]
//   left  = (upper 1 + upper 2) + upper 0     right = (upper 1 - upper 2) + upper 3
// only the 16 additions in which an m[1], m[2], upper or lower takes part are instructions, where
// the transform back has 24. For a vector of windows and an output channel of 3 input channels:
//                  multiply-adds   additions   max, ReLU   codes
//   here                48             16           4        10
//   F(2, 3)             72              8           4        10     along the rows alone
// on two ports. Making V from R adds 48 / output channels, making R about 80 / output channels.
//
// A task owns a band of pooled rows of one image and walks its windows, numbered row by row, in
// strips of a few rows, a vector of windows at a time, and input channels in runs of up to three:
//   R  [channels][2][4 j][strip + 1][OW]        d B: even and odd input rows, transformed along w
//   V  [columns][run][4 i]                      B^T d B of two columns (one), in registers
//   U  [runs][steps][out channels][columns][run][4 i]    in the order of its use
//   Y  [kPassing][2][2] vectors                 the outputs, summed over the columns so far
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/winograd.h"
#include "cpu/kernels/winograd_rows.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// The columns of the transform are taken one or two at a time, in this order; their V over a run of
// channels stays in registers while output channels pass by: 32 registers hold 24 vectors, 16 hold
// 12, beside a column's sums. A multiply-add then reads one weight for all lanes, and nothing else.
constexpr int kRunOfFew = 3;
constexpr int kColumns = kRegisters >= 32 ? 2 : 1;
constexpr int kColumnOrder[4] = {1, 2, 0, 3};
// Output channels that pass by before the next columns: their outputs stay in L1 meanwhile.
constexpr int64_t kPassing = 32;

// Adds one window of 2x2 outputs to the chunk of each of the first `count` lanes.
FUSEDCNN_INLINE void see_windows(const Vector<float> (&y)[4], int64_t count,
                                 ChunkSums<float>& chunk) {
  if (count == kLanes<float>) return chunk.see(y[0], y[1], y[2], y[3]);
  // What the other lanes hold is no output: they see the shift, or zeros where there is none yet.
  const Vector<float> nothing = chunk.windows == 0 ? Vector<float>{} : chunk.shift;
  Vector<int32_t> lane;
  for (int l = 0; l < kLanes<float>; ++l) lane[l] = l;
  const auto real = lane < broadcast(static_cast<int32_t>(count));
  Vector<float> seen[4];
  FUSEDCNN_UNROLL
  for (int i = 0; i < 4; ++i) seen[i] = real ? y[i] : nothing;
  chunk.see(seen[0], seen[1], seen[2], seen[3]);
}

// Where a vector of windows goes: channels `stride` apart. codes: null where they are not wanted.
struct WindowLanes {
  float* values;
  uint8_t* codes;
  int64_t stride;
  int64_t count;             // lanes that are windows
  ChunkSums<float>* chunks;  // without ReLU: of each channel
};

// One call owns one vector of windows x `channels` output channels: what columns kStep * kColumns
// and on of a run of C input channels add to the four outputs.
// r: R at the first window, channels `channel_size` and the four j `plane` apart. u: [channels]
// [kColumns][C][4 i]. y: [channels][4][lanes].
template <int C, int kStep, bool kFirst, bool kLast, bool kReLU>
FUSEDCNN_NOINLINE void add_columns(const float* r, int64_t channel_size, int64_t plane,
                                   int64_t width, int64_t channels, const float* u,
                                   const float* bias, float* y, const WindowLanes& to) {
  constexpr int kN = kLanes<float>;
  constexpr int kSteps = 4 / kColumns;
  constexpr bool kBegins = kFirst && kStep == 0, kEnds = kLast && kStep == kSteps - 1;
  Vector<float> v[kColumns][C][4];
  FUSEDCNN_UNROLL
  for (int k = 0; k < kColumns; ++k) {
    FUSEDCNN_UNROLL
    for (int c = 0; c < C; ++c) {
      const float* even = r + c * channel_size + kColumnOrder[kStep * kColumns + k] * plane;
      const float* odd = even + 4 * plane;
      const Vector<float> d[4] = {load(even), load(odd), load(even + width), load(odd + width)};
      v[k][c][0] = d[0] - d[2];
      v[k][c][1] = d[1] + d[2];
      v[k][c][2] = d[2] - d[1];
      v[k][c][3] = d[1] - d[3];
      FUSEDCNN_UNROLL
      for (int i = 0; i < 4; ++i) keep(v[k][c][i]);
    }
  }
  for (int64_t oc = 0; oc < channels; ++oc, u += kColumns * C * 4, y += 4 * kN) {
    Vector<float> out[4];
    // Of each column, the sums for the upper and for the lower output.
    Vector<float> upper[kColumns], lower[kColumns];
    FUSEDCNN_UNROLL
    for (int k = 0; k < kColumns; ++k) {
      constexpr bool kOuter = kStep * kColumns >= 2;  // columns 0 and 3, of one output each
      const int column = kColumnOrder[kStep * kColumns + k];
      const float* weight = u + k * C * 4;
      const auto product = [&](int c, int i) __attribute__((always_inline)) {
        return broadcast(weight[c * 4 + i]) * v[k][c][i];
      };
      const auto add = [&](Vector<float>& sum, int i, int from) __attribute__((always_inline)) {
        FUSEDCNN_UNROLL
        for (int c = from; c < C; ++c) sum += product(c, i);
      };
      Vector<float> m1 = product(0, 1), m2 = product(0, 2);
      if (kBegins && kReLU && k == 0) m1 += broadcast(bias[oc]);
      add(m1, 1, 1);
      add(m2, 2, 1);
      if constexpr (kOuter) {
        // On top of what is there, beside the others: no sum waits for another.
        const int side = column / 3;
        upper[k] = load(y + side * kN);
        lower[k] = load(y + (2 + side) * kN);
        add(upper[k], 0, 0);
        add(lower[k], 3, 0);
        upper[k] += m1 + m2;
        lower[k] += m1 - m2;
      } else {
        upper[k] = m1 + m2;
        lower[k] = m1 - m2;
        add(upper[k], 0, 0);
        add(lower[k], 3, 0);
      }
    }
    if constexpr (kColumns == 2) {
      if constexpr (kStep == 0) {
        out[0] = upper[0] + upper[1];
        out[1] = upper[0] - upper[1];
        out[2] = lower[0] + lower[1];
        out[3] = lower[0] - lower[1];
        FUSEDCNN_UNROLL
        for (int e = 0; e < 4; ++e) {
          if (!kBegins) out[e] += load(y + e * kN);
        }
      } else {
        out[0] = upper[0];
        out[1] = upper[1];
        out[2] = lower[0];
        out[3] = lower[1];
      }
    } else if constexpr (kBegins) {
      // Column 1 begins: its two sums are all four outputs, so far.
      out[0] = upper[0];
      out[2] = lower[0];
    } else if constexpr (kStep < 2) {
      constexpr int kBefore = kFirst ? 0 : 1;
      const Vector<float> right = load(y + kBefore * kN), below = load(y + (2 + kBefore) * kN);
      out[0] = load(y) + upper[0];
      out[2] = load(y + 2 * kN) + lower[0];
      out[1] = kStep == 0 ? right + upper[0] : right - upper[0];
      out[3] = kStep == 0 ? below + lower[0] : below - lower[0];
    } else {
      constexpr int kSide = kStep - 2;  // column 0 is part of the left outputs, 3 of the right ones
      out[kSide] = upper[0];
      out[2 + kSide] = lower[0];
      if constexpr (kEnds) {
        out[0] = load(y);
        out[2] = load(y + 2 * kN);
      }
    }
    if constexpr (!kEnds) {
      constexpr bool kLeft = kColumns == 2 || kStep < 3;
      constexpr bool kRight = kColumns == 2 || !(kBegins || kStep == 2);
      FUSEDCNN_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (e % 2 ? kRight : kLeft) store(y + e * kN, out[e]);
      }
    } else {
      if constexpr (!kReLU) see_windows(out, to.count, to.chunks[oc]);
      const int64_t at = oc * to.stride;
      finish_window<kReLU, kReLU>(out[0], out[1], out[2], out[3],
                                  kReLU ? Vector<float>{} : broadcast(bias[oc]), to.values + at,
                                  to.codes ? to.codes + at : to.codes);
    }
  }
}

// Input channels of the run that begins when `left` are left: never three and then one.
FUSEDCNN_INLINE int64_t run_of_few(int64_t left) {
  const int64_t runs = (left + kRunOfFew - 1) / kRunOfFew;
  return (left + runs - 1) / runs;
}

// One call owns one vector of windows x `passing` output channels from `oc` on. y: [kPassing][4]
// [lanes].
template <bool kReLU>
void pass_channels(const Geometry& g, const WinogradShared& shared, const float* r, int64_t plane,
                   int64_t oc, int64_t passing, float* y, const WindowLanes& to) {
  const float* u = shared.weights;
  const float* bias = shared.bias + oc;
  for (int64_t c0 = 0; c0 < g.in_channels;) {
    const int64_t run = run_of_few(g.in_channels - c0);
    const bool begins = c0 == 0, ends = c0 + run == g.in_channels;
    const auto add = [&]<int C, bool kFirst, bool kLast>() {
      const auto step = [&]<int kStep>() {
        constexpr int64_t kOfChannel = kColumns * C * 4;
        add_columns<C, kStep, kFirst, kLast, kReLU>(r, 8 * plane, plane, g.w.out, passing,
                                                    u + (kStep * g.out_channels + oc) * kOfChannel,
                                                    bias, y, to);
      };
      step.template operator()<0>();
      step.template operator()<1>();
      if constexpr (kColumns == 1) {
        step.template operator()<2>();
        step.template operator()<3>();
      }
    };
    const auto add_run = [&]<int C>() {
      if (begins && ends) return add.template operator()<C, true, true>();
      if (begins) return add.template operator()<C, true, false>();
      ends ? add.template operator()<C, false, true>() : add.template operator()<C, false, false>();
    };
    if (run == 1) add_run.template operator()<1>();
    if (run == 2) add_run.template operator()<2>();
    if (run == 3) add_run.template operator()<3>();
    c0 += run;
    r += run * 8 * plane;
    u += run * 16 * g.out_channels;
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

// Rows of windows whose R is made at a time, so that it stays in L1: whole vectors of windows, or
// all. Strips make two rows of each again, which few output channels would not repay.
inline int64_t rows_of_strip(const Geometry& g, int64_t band) {
  constexpr int64_t kLeast = 4, kFewOutputs = 8;
  for (int64_t rows = kLeast; rows < band && g.out_channels >= kFewOutputs; ++rows) {
    if (rows * g.w.out % kLanes<float> == 0) return rows;
  }
  return band;
}

template <typename S>
void few_channels_band(const ForwardArgs& args, const WinogradShared& shared, int64_t task) {
  constexpr int kN = kLanes<float>;
  const Geometry& g = args.geometry;
  const int64_t bands = shared.bands, width = g.w.out;
  const int64_t n = task / bands, first_out = task % bands * shared.band;
  const int64_t windows = smaller(shared.band, g.h.out - first_out) * width;

  const int64_t strip = rows_of_strip(g, shared.band);
  const int64_t rows_size = round_up((2 * strip + 2) * row_in_order(width), kN);
  const int64_t plane = round_up((strip + 1) * width, kN) + kN;
  float* in_order = static_cast<float*>(
      scratch(Slot::kPlanes, (rows_size + g.in_channels * 8 * plane + kN) * sizeof(float)));
  float* r = in_order + rows_size;
  RangeCheck<float> range(kModerate);

  constexpr int64_t kFloat = sizeof(float);
  const int64_t y_size = 4 * smaller(kPassing, g.out_channels) * kN;
  float* y = static_cast<float*>(
      scratch(Slot::kConv, y_size * kFloat + g.out_channels * kN * (kFloat + 1)));
  float* values = y + y_size;
  uint8_t* codes = reinterpret_cast<uint8_t*>(values + g.out_channels * kN);
  ChunkSums<float>* chunks = nullptr;
  if (!args.relu) {
    chunks = static_cast<ChunkSums<float>*>(
        scratch(Slot::kPatch, g.out_channels * int64_t{sizeof(ChunkSums<float>)}));
    for (int64_t oc = 0; oc < g.out_channels; ++oc) chunks[oc] = {};
  }
  const TaskMoments<float> moments(args.relu ? 0 : g.out_channels);
  Ahead ahead = next_image<S>(args, n, (windows + kN - 1) / kN);
  for (int64_t first = 0; first < windows; first += kN) {
    const int64_t in_strip = first % (strip * width);
    if (in_strip == 0) {
      transform_channels<S>(args, n, first_out + first / width, strip, plane, in_order, r, range);
    }
    ahead.step();
    const int64_t at = n * args.output_strides.n + first_out * args.output_strides.h +
                       first * args.output_strides.w;
    S* output = static_cast<S*>(args.output) + at;
    uint8_t* code = args.code ? static_cast<uint8_t*>(args.code) + at : nullptr;
    const int64_t count = smaller<int64_t>(kN, windows - first);
    const bool direct = std::is_same_v<S, float> && args.output_strides.w == 1 && count == kN;
    const int64_t stride = direct ? args.output_strides.c : int64_t{kN};
    float* to = direct ? reinterpret_cast<float*>(output) : values;
    uint8_t* code_to = direct || !code ? code : codes;
    for (int64_t oc = 0; oc < g.out_channels; oc += kPassing) {
      const WindowLanes lanes{to + oc * stride, code_to ? code_to + oc * stride : code_to, stride,
                              count, chunks + oc};
      const int64_t passing = smaller(kPassing, g.out_channels - oc);
      const auto pass = args.relu ? pass_channels<true> : pass_channels<false>;
      pass(g, shared, r + in_strip, plane, oc, passing, y, lanes);
    }
    const bool chunk_ends = first / kN % kChunkWindows == kChunkWindows - 1;
    if (args.moments && (chunk_ends || first + kN >= windows)) {
      for (int64_t oc = 0; oc < g.out_channels; ++oc) {
        moments.add_lanes(chunks[oc], count, oc);
        chunks[oc].windows = 0;
      }
    }
    if (direct) continue;
    write_lanes(values, count, g.out_channels, output, args.output_strides);
    if (code) write_lanes(codes, count, g.out_channels, code, args.output_strides);
  }
  if (!range.passed()) {
    shared.immoderate[task] = 1;
    return;
  }
  if (args.moments) write_moments(args, shared, task, 4 * windows, moments);
}

// G along one dimension, the last element negated: so is B^T d's, where it counts as a loss.
FUSEDCNN_INLINE void spread_taps(const float (&g)[3], float (&to)[4]) {
  to[0] = g[0];
  to[1] = (g[0] + g[1] + g[2]) * 0.5f;
  to[2] = (g[0] - g[1] + g[2]) * 0.5f;
  to[3] = -g[2];
}

// U = G g G^T, in the order of its use.
template <typename S>
void transform_weights_of_few(const ForwardArgs& args, const S* source, float* u) {
  const Geometry& g = args.geometry;
  const Strides s = args.weight_strides;
  for (int64_t c0 = 0, run; c0 < g.in_channels; c0 += run, u += 16 * run * g.out_channels) {
    run = run_of_few(g.in_channels - c0);
    for (int64_t oc = 0; oc < g.out_channels; ++oc) {
      for (int64_t c = 0; c < run; ++c) {
        const S* weight = source + oc * s.n + (c0 + c) * s.c;
        float columns[4][3], by_column[4][4];  // [j][kh], [j][i]
        for (int64_t kh = 0; kh < 3; ++kh) {
          const S* row = weight + kh * s.h;
          const float taps[3] = {widen(row[0]), widen(row[s.w]), widen(row[2 * s.w])};
          float spread[4];
          spread_taps(taps, spread);
          for (int j = 0; j < 4; ++j) columns[j][kh] = spread[j];
        }
        for (int j = 0; j < 4; ++j) spread_taps(columns[j], by_column[j]);
        for (int at = 0; at < 4; ++at) {
          const int64_t step = at / kColumns, column = at % kColumns;
          float* to = u + (((step * g.out_channels + oc) * kColumns + column) * run + c) * 4;
          memcpy(to, by_column[kColumnOrder[at]], sizeof by_column[0]);
        }
      }
    }
  }
}

template <typename S>
void forward_few_channels_typed(const ForwardArgs& args, const ThreadPool& pool) {
  const Geometry& g = args.geometry;
  int64_t bytes;
  const DerivedKey key =
      derived_key(args, reinterpret_cast<const void*>(&few_channels_band<S>), bytes);
  const int64_t size = round_up(16 * g.in_channels * g.out_channels, kLanes<float>);
  DerivedWeights derived(key, bytes, size);
  if (!derived.filled()) {
    memset(derived.data(), 0, size * sizeof(float));  // for the whole vectors of the check
    transform_weights_of_few(args, static_cast<const S*>(derived.source()), derived.data());
    derived.keep(moderate(derived.data(), size));
  }
  run_winograd<S>(args, pool, derived, few_channels_band<S>);
}

const char* why_not_winograd_f2x2_few_channels(const Problem& problem) {
  const Geometry& g = problem.geometry;
  // Where winograd_f2x2 has vectors of output channels to fill, it is faster from here on.
  const int64_t most = g.out_channels >= kLanes<float> / 2 ? 7 : 64;
  if (g.in_channels > most) return "too many input channels";
  return why_not_winograd(problem);
}

void forward_winograd_f2x2_few_channels(const ForwardArgs& args, const ThreadPool& pool) {
  for_block_storage(args.type, [&]<typename S>(S) { forward_few_channels_typed<S>(args, pool); });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
