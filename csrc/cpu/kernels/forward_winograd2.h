// The forward by Winograd's minimal filtering F(2x2, 3x3), for 3x3 stride 1 under a 2x2 pool.
//
// One tile is one pooling window: its 4x4 input patch d gives the four convolution outputs
//   Y = A^T [ sum over c of (G g G^T) * (B^T d B) ] A        (Lavin and Gray, 2016)
// in 16 multiplications per input channel instead of 36. All constants are 0, +-1 and 1/2, so the
// error is no more than the direct kernel's, integers stay exact and a constant patch gives four
// equal outputs: ties fall as in the direct kernel. Bias, ReLU, max and code follow on registers.
//
// A task owns a band of pooled rows of one image and walks its windows, numbered row by row, in
// strips of kStripTiles:
//   R  [channels][2][4 j][band + 1][OW]         d B: even and odd input rows, transformed along w
//   V  [4 i][channels][4 j][kTileStride]        B^T d B of one strip
//   U  [blocks][4 i][channels][4 j][Z * lanes]  weights of Z vectors of output channels
//   Y  [tiles][Z][2][2] vectors                 the windows' outputs, summed over i
// then transposes [tiles][out channels] into the output.
//
// Sums of patch elements could overflow, and an infinity would reach outputs that it does not
// touch; a band with values beyond kModerate, infinity or NaN is left to the general kernel.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/forward_general.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/transpose.h"
#include "cpu/plan.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Inputs and weights up to this size cannot overflow: 4 x 2.25 x 16 x channels x 2^96 < 2^127 for
// all channel counts below 2^23.
constexpr float kModerate = 281474976710656.0f;  // 2^48

// Register tile: 4 j x T tiles x Z vectors of accumulators; a channel costs 4 T broadcasts and 4 Z
// loads for 4 T Z FMAs. 32 registers: 4 x 3 x 2 (20 loads for 24 FMAs) or, for a single vector of
// output channels, 4 x 6 x 1 (28 loads). 16 registers: 4 x 3 x 1.
constexpr int kWinogradWide = kRegisters >= 32 ? 2 : 1;
template <int Z>
constexpr int kWinogradTiles = kRegisters >= 32 && Z == 1 ? 6 : 3;

// Tiles of a strip: V for one i, U for one i and Y stay in L1 together. Whole vectors are stored,
// so a strip's rows of V are a vector longer.
constexpr int64_t kStripTiles = 48;
constexpr int64_t kTileStride = kStripTiles + 16;

// One call owns T tiles x Z vectors of output channels x the four j of row I of the transform:
//   m[j][t][z] = sum over c of v[c][j][t] * u[c][j][z]
// and adds their share of the outputs to y. v: [channels][4][kTileStride], at the first tile.
// u: [channels][4][Z * lanes]. y: [T][Z][4] vectors.
template <int I, int T, int Z>
FUSEDCNN_NOINLINE void winograd_row(const float* v, int64_t channels, const float* u, float* y) {
  constexpr int kN = kLanes<float>;
  Vector<float> m[4][T][Z];
  FUSEDCNN_UNROLL
  for (int j = 0; j < 4; ++j) {
    FUSEDCNN_UNROLL
    for (int t = 0; t < T; ++t) {
      FUSEDCNN_UNROLL
      for (int z = 0; z < Z; ++z) m[j][t][z] = Vector<float>{};
    }
  }
  for (int64_t c = 0; c < channels; ++c, v += 4 * kTileStride, u += 4 * Z * kN) {
    FUSEDCNN_UNROLL
    for (int j = 0; j < 4; ++j) {
      Vector<float> weight[Z];
      FUSEDCNN_UNROLL
      for (int z = 0; z < Z; ++z) keep(weight[z] = load(u + (j * Z + z) * kN));
      FUSEDCNN_UNROLL
      for (int t = 0; t < T; ++t) {
        const Vector<float> value = broadcast(v[j * kTileStride + t]);
        FUSEDCNN_UNROLL
        for (int z = 0; z < Z; ++z) m[j][t][z] += value * weight[z];
      }
    }
  }
  FUSEDCNN_UNROLL
  for (int t = 0; t < T; ++t) {
    FUSEDCNN_UNROLL
    for (int z = 0; z < Z; ++z) {
      const Vector<float> left = m[0][t][z] + m[1][t][z] + m[2][t][z];
      const Vector<float> right = m[1][t][z] - m[2][t][z] - m[3][t][z];
      float* out = y + (t * Z + z) * 4 * kN;
      // Rows of A^T: outputs of row 0 sum i = 0, 1, 2; those of row 1 are i1 - i2 - i3.
      if (I == 0) {
        store(out, left);
        store(out + kN, right);
      } else if (I == 1) {
        store(out, load(out) + left);
        store(out + kN, load(out + kN) + right);
        store(out + 2 * kN, left);
        store(out + 3 * kN, right);
      } else {
        if (I == 2) {
          store(out, load(out) + left);
          store(out + kN, load(out + kN) + right);
        }
        store(out + 2 * kN, load(out + 2 * kN) - left);
        store(out + 3 * kN, load(out + 3 * kN) - right);
      }
    }
  }
}

template <int I, int Z>
void winograd_rows(int64_t count, const float* v, int64_t channels, const float* u, float* y) {
  constexpr int kT = kWinogradTiles<Z>;
  constexpr int64_t kTileSize = Z * 4 * kLanes<float>;
  int64_t t = 0;
  for (; t + kT <= count; t += kT) {
    winograd_row<I, kT, Z>(v + t, channels, u, y + t * kTileSize);
  }
  for (; t + 2 <= count; t += 2) {
    winograd_row<I, 2, Z>(v + t, channels, u, y + t * kTileSize);
  }
  if (t < count) winograd_row<I, 1, Z>(v + t, channels, u, y + t * kTileSize);
}

// Transforms one input row along w: out[j][k] is element j of window k's row of d B. from: the
// padded row, 2 * width + 2 elements and a vector more; to: [4] rows, `plane` elements apart. Whole
// vectors are stored: up to one past the row.
FUSEDCNN_INLINE void transform_row(const float* from, int64_t width, float* to, int64_t plane) {
  constexpr int kN = kLanes<float>;
  Vector<int32_t> even, odd;
  FUSEDCNN_UNROLL
  for (int l = 0; l < kN; ++l) {
    even[l] = 2 * l;
    odd[l] = 2 * l + 1;
  }
  for (int64_t k = 0; k < width; k += kN) {
    const Vector<float> a = load(from + 2 * k), b = load(from + 2 * k + kN);
    const Vector<float> c = load(from + 2 * k + 2), d = load(from + 2 * k + 2 + kN);
    const Vector<float> x[4] = {__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, odd),
                                __builtin_shuffle(c, d, even), __builtin_shuffle(c, d, odd)};
    store(to + k, x[0] - x[2]);
    store(to + plane + k, x[1] + x[2]);
    store(to + 2 * plane + k, x[2] - x[1]);
    store(to + 3 * plane + k, x[1] - x[3]);
  }
}

// Fills R for one channel. image: [H, W] with strides; rows: scratch of [2 * band + 2][row_size],
// zeros outside the image's columns already.
template <typename S>
FUSEDCNN_NOINLINE void transform_rows(const Geometry& g, const S* image, Strides strides,
                                      int64_t first_out, int64_t band, int64_t plane,
                                      int64_t row_size, float* rows, float* r,
                                      RangeCheck<float>& range) {
  RangeCheck<float> check = range;  // in a register
  const int64_t y0 = 2 * first_out - g.h.padding;
  const int64_t begin = smaller(2 * band + 2, larger(-y0, int64_t{0}));
  const int64_t end = larger(begin, smaller(2 * band + 2, g.h.in - y0));
  const int64_t width = smaller(g.w.in, 2 * g.w.out + 2 - g.w.padding);
  // First every row in order, then every row transformed: a vector load soon after the narrower
  // stores that it spans would wait for them.
  for (int64_t y = begin; y < end; ++y) {
    copy_row<S, float>(image + (y0 + y) * strides.h, strides.w, width,
                       rows + y * row_size + g.w.padding, check);
  }
  for (int64_t y = 0; y < 2 * band + 2; ++y) {
    float* to = r + y % 2 * 4 * plane + y / 2 * g.w.out;
    if (y >= begin && y < end) {
      transform_row(rows + y * row_size, g.w.out, to, plane);
      continue;
    }
    for (int j = 0; j < 4; ++j) memset(to + j * plane, 0, g.w.out * sizeof(float));
  }
  range = check;
}

// V of one channel of one strip. r: the channel's R at the strip's first window; v: at the channel.
FUSEDCNN_INLINE void transform_strip(const float* r, int64_t plane, int64_t width, int64_t count,
                                     float* v, int64_t i_stride) {
  constexpr int kN = kLanes<float>;
  for (int64_t k = 0; k < count; k += kN) {
    FUSEDCNN_UNROLL
    for (int j = 0; j < 4; ++j) {
      const float* even = r + j * plane + k;
      const float* odd = even + 4 * plane;
      const Vector<float> d[4] = {load(even), load(odd), load(even + width), load(odd + width)};
      float* to = v + j * kTileStride + k;
      store(to, d[0] - d[2]);
      store(to + i_stride, d[1] + d[2]);
      store(to + 2 * i_stride, d[2] - d[1]);
      store(to + 3 * i_stride, d[1] - d[3]);
    }
  }
}

// A byte for every lane.
typedef uint8_t LaneBytes __attribute__((vector_size(kLanes<float>)));

// Bias, max, ReLU and code of one tile's Z vectors. y: [Z][4] vectors; values, codes: [Z * lanes].
template <int Z>
FUSEDCNN_INLINE void finish_tile(const float* y, const float* bias, float* values, uint8_t* codes) {
  constexpr int kN = kLanes<float>;
  for (int z = 0; z < Z; ++z) {
    const Vector<float> shift = load(bias + z * kN);
    Vector<float> best = load(y + z * 4 * kN) + shift;
    Vector<int32_t> winner = {};
    for (int e = 1; e < 4; ++e) {
      const Vector<float> value = load(y + (z * 4 + e) * kN) + shift;
      const auto wins = value > best;  // the first maximum wins
      best = wins ? value : best;
      winner = wins ? broadcast<int32_t>(e) : winner;
    }
    const auto off = best <= Vector<float>{};
    store(values + z * kN, off ? Vector<float>{} : best);
    winner = off ? broadcast<int32_t>(kOff<uint8_t>) : winner;
    const LaneBytes bytes = __builtin_convertvector(winner, LaneBytes);
    memcpy(codes + z * kN, &bytes, kN);
  }
}

struct Winograd2Shared {
  const ForwardPlan& plan;
  const float* weights;  // U
  const float* bias;     // [padded out channels]
  int64_t padded;        // out channels, whole vectors
  uint8_t* immoderate;   // [batch * bands], set where the band was left to the general kernel
};

template <int Z>
void strip_block(const Winograd2Shared& shared, int64_t channels, int64_t first, int64_t count,
                 const float* v, float* y, float* values, uint8_t* codes) {
  constexpr int kN = kLanes<float>;
  const int64_t v_row = channels * 4 * kTileStride, u_row = channels * 4 * Z * kN;
  const float* u = shared.weights + first * channels * 16;
  winograd_rows<0, Z>(count, v, channels, u, y);
  winograd_rows<1, Z>(count, v + v_row, channels, u + u_row, y);
  winograd_rows<2, Z>(count, v + 2 * v_row, channels, u + 2 * u_row, y);
  winograd_rows<3, Z>(count, v + 3 * v_row, channels, u + 3 * u_row, y);
  for (int64_t t = 0; t < count; ++t) {
    finish_tile<Z>(y + t * Z * 4 * kN, shared.bias + first, values + t * shared.padded + first,
                   codes + t * shared.padded + first);
  }
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

template <typename S>
void winograd2_band(const ForwardArgs& args, const Winograd2Shared& shared, int64_t task) {
  constexpr int kN = kLanes<float>;
  const Geometry& g = args.geometry;
  const ForwardPlan& plan = shared.plan;
  const int64_t bands = plan.bands(g);
  const int64_t n = task / bands, first_out = task % bands * plan.band;
  const int64_t rows = smaller(plan.band, g.h.out - first_out);
  const int64_t channels = g.in_channels;

  const int64_t row_size = 2 * g.w.out + 2 + 2 * kN;
  const int64_t rows_size = (2 * plan.band + 2) * row_size;
  const int64_t plane = round_up((plan.band + 1) * g.w.out, kN) + kN;
  float* in_order = static_cast<float*>(
      scratch(Slot::kPlanes, (rows_size + channels * 8 * plane + kN) * sizeof(float)));
  float* r = in_order + rows_size;
  memset(in_order, 0, rows_size * sizeof(float));
  const S* image = static_cast<const S*>(args.input) + n * args.input_strides.n;
  RangeCheck<float> range(kModerate);
  for (int64_t c = 0; c < channels; ++c) {
    transform_rows<S>(g, image + c * args.input_strides.c, args.input_strides, first_out, plan.band,
                      plane, row_size, in_order, r + c * 8 * plane, range);
  }
  if (!range.passed()) {
    shared.immoderate[task] = 1;
    return;
  }

  const int64_t v_size = 16 * channels * kTileStride;
  constexpr int64_t kYSize = kTileStride * kWinogradWide * 4 * kN;
  float* v = static_cast<float*>(
      scratch(Slot::kConv, (v_size + kYSize + 2 * kTileStride * shared.padded) * sizeof(float)));
  float* y = v + v_size;
  float* values = y + kYSize;
  uint8_t* codes = reinterpret_cast<uint8_t*>(values + kTileStride * shared.padded);

  for (int64_t first = 0; first < rows * g.w.out; first += kStripTiles) {
    const int64_t count = smaller(kStripTiles, rows * g.w.out - first);
    for (int64_t c = 0; c < channels; ++c) {
      transform_strip(r + c * 8 * plane + first, plane, g.w.out, count, v + c * 4 * kTileStride,
                      channels * 4 * kTileStride);
    }
    int64_t oc = 0;
    for (; oc + kWinogradWide * kN <= shared.padded; oc += kWinogradWide * kN) {
      strip_block<kWinogradWide>(shared, channels, oc, count, v, y, values, codes);
    }
    if (oc < shared.padded) strip_block<1>(shared, channels, oc, count, v, y, values, codes);
    const int64_t at = n * args.output_strides.n + first_out * args.output_strides.h +
                       first * args.output_strides.w;
    write_strip(values, shared.padded, count, g.out_channels, static_cast<S*>(args.output) + at,
                args.output_strides);
    if (args.code) {
      write_strip(codes, shared.padded, count, g.out_channels,
                  static_cast<uint8_t*>(args.code) + at, args.output_strides);
    }
  }
}

// U = G g G^T for every pair of channels, a vector of output channels at a time, into the blocks
// that winograd_row reads.
template <typename S>
void transform_weights(const ForwardArgs& args, int64_t padded, float* weights) {
  constexpr int kN = kLanes<float>;
  const Geometry& g = args.geometry;
  const Strides s = args.weight_strides;
  for (int64_t first = 0; first < padded; first += kN) {
    // Blocks of kWinogradWide vectors as long as they are full, then single ones.
    const int64_t wide = kWinogradWide * kN;
    const bool in_wide = first / wide * wide + wide <= padded;
    const int64_t z_count = in_wide ? kWinogradWide : 1;
    const int64_t block = in_wide ? first / wide * wide : first;
    float* base = weights + block * 16 * g.in_channels + (first - block);
    for (int64_t c = 0; c < g.in_channels; ++c) {
      Vector<float> k[3][3] = {};
      for (int l = 0; l < kN && first + l < g.out_channels; ++l) {
        const S* from = static_cast<const S*>(args.weight) + (first + l) * s.n + c * s.c;
        for (int y = 0; y < 3; ++y) {
          for (int x = 0; x < 3; ++x) k[y][x][l] = widen(from[y * s.h + x * s.w]);
        }
      }
      Vector<float> half[4][3];
      for (int x = 0; x < 3; ++x) {
        half[0][x] = k[0][x];
        half[1][x] = (k[0][x] + k[1][x] + k[2][x]) * 0.5f;
        half[2][x] = (k[0][x] - k[1][x] + k[2][x]) * 0.5f;
        half[3][x] = k[2][x];
      }
      for (int i = 0; i < 4; ++i) {
        const Vector<float> u[4] = {half[i][0], (half[i][0] + half[i][1] + half[i][2]) * 0.5f,
                                    (half[i][0] - half[i][1] + half[i][2]) * 0.5f, half[i][2]};
        for (int j = 0; j < 4; ++j) {
          store(base + ((i * g.in_channels + c) * 4 + j) * z_count * kN, u[j]);
        }
      }
    }
  }
}

template <typename S>
void winograd2_typed(const ForwardArgs& args, const ThreadPool& pool) {
  const Geometry& g = args.geometry;
  const ForwardPlan plan(g, sizeof(float), kLanes<float>);
  const int64_t padded = round_up(g.out_channels, kLanes<float>);
  const int64_t u_size = 16 * g.in_channels * padded;
  const int64_t bands = g.batch * plan.bands(g);
  float* weights =
      static_cast<float*>(scratch(Slot::kTransformed, (u_size + padded) * sizeof(float) + bands));
  float* bias = weights + u_size;
  uint8_t* immoderate = reinterpret_cast<uint8_t*>(bias + padded);
  transform_weights<S>(args, padded, weights);
  for (int64_t oc = 0; oc < padded; ++oc) {
    const bool real = args.bias && oc < g.out_channels;
    bias[oc] = real ? widen(static_cast<const S*>(args.bias)[oc * args.bias_stride]) : 0.0f;
  }
  RangeCheck<float> range(kModerate);  // so that no NaN arises here and none is passed on
  for (int64_t k = 0; k < u_size + padded; k += kLanes<float>) range.see(load(weights + k));
  if (!range.passed()) return forward_general(args, pool);
  memset(immoderate, 0, bands);
  const Winograd2Shared shared{plan, weights, bias, padded, immoderate};
  parallel_tasks(pool, bands, [&](int64_t task) { winograd2_band<S>(args, shared, task); });
  if (memchr(immoderate, 1, bands)) forward_general_bands<S, uint8_t>(args, pool, immoderate);
}

const char* why_not_winograd2(const Problem& problem) {
  const Geometry& g = problem.geometry;
  if (problem.type == DataType::kFloat64) return "computes in float32";
  if (problem.wide_code) return "writes codes of one byte";
  if (g.groups != 1) return "groups";
  for (const Axis* axis : {&g.h, &g.w}) {
    if (axis->kernel != 3 || axis->stride != 1 || axis->dilation != 1) {
      return "not a 3x3 kernel of stride and dilation 1";
    }
    if (axis->pool_kernel != 2 || axis->pool_stride != 2 || axis->pool_dilation != 1 ||
        axis->pool_padding != 0 || axis->out * 2 > axis->conv) {
      return "not a 2x2 pool of stride 2 over whole windows";
    }
  }
  if (g.out_channels < kLanes<float> / 2) return "too few output channels to fill a vector";
  return nullptr;
}

void forward_winograd2(const ForwardArgs& args, const ThreadPool& pool) {
  switch (args.type) {
    case DataType::kFloat32: return winograd2_typed<float>(args, pool);
    case DataType::kBFloat16: return winograd2_typed<BFloat16>(args, pool);
    case DataType::kFloat16: return winograd2_typed<Float16>(args, pool);
    case DataType::kFloat64: return;  // refused by why_not
  }
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
