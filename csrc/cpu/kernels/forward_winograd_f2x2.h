// The forward by Winograd's minimal filtering F(2x2, 3x3), for 3x3 stride 1 under a 2x2 pool.
//
// One tile is one pooling window: its 4x4 input patch d gives the four convolution outputs
//   Y = A^T [ sum over c of (G g G^T) * (B^T d B) ] A        (Lavin and Gray, 2016)
// in 16 multiplications per input channel instead of 36. All constants are 0, +-1 and 1/2, so
// integers stay exact and a constant patch gives four equal outputs: ties fall as in the general
// kernel. The error is near the stock layers' (measured: 0.4 times at 16 input channels, 1.0 to 1.3
// from 64 to 512). Bias, ReLU, max and code follow on registers.
//
// A task owns a band of pooled rows of one image and walks its windows, numbered row by row, in
// strips of up to kStripTiles, and input channels in runs of up to kRunChannels:
//   R  [channels][2][4 j][band + 1][OW]         d B: even and odd input rows, transformed along w
//   V  [4 i][run][4 j][kTileStride]             B^T d B of one strip and run
//   U  [blocks][4 i][channels][4 j][Z * lanes]  weights of Z vectors of output channels
//   Y  [blocks][tiles][Z][2][2] vectors         the windows' outputs, summed over runs and i
// then transposes [tiles][out channels] into the output.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/winograd.h"
#include "cpu/kernels/winograd_rows.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Register tile: 4 j x T tiles x Z vectors of accumulators; a channel costs 4 T broadcasts and 4 Z
// loads for 4 T Z FMAs. 32 registers: 4 x 3 x 2 (20 loads for 24 FMAs) or, for a single vector of
// output channels, 4 x 6 x 1 (28 loads). 16 registers: 4 x 3 x 1.
constexpr int kWinogradWide = kRegisters >= 32 ? 2 : 1;
template <int Z>
constexpr int kWinogradTiles = kRegisters >= 32 && Z == 1 ? 6 : 3;

// Tiles of a strip: V for one i, U for one i and Y stay in L1 together. Whole vectors are stored,
// so a strip's rows of V are a vector longer; and one more, since strides of a power of two would
// crowd a few sets of the L1 cache.
constexpr int64_t kStripTiles = 48;
constexpr int64_t kTileStride = kStripTiles + 32;
// One chain of additions over more channels than this would round more than the stock layers do,
// and V would outgrow L2.
constexpr int64_t kRunChannels = 64;

// One call owns T tiles x Z vectors of output channels x the four j of row I of the transform:
//   m[j][t][z] = sum over c of v[c][j][t] * u[c][j][z]
// and adds their share of the outputs to y, which without `add` holds nothing yet at I = 0.
// v: [channels][4][kTileStride], at the first tile. u: [channels][4][Z * lanes]. y: [T][Z][4]
// vectors.
template <int I, int T, int Z>
FUSEDCNN_NOINLINE void winograd_row(const float* v, int64_t channels, const float* u, float* y,
                                    bool add) {
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
      if (I < 3) {
        store(out, I > 0 || add ? load(out) + left : left);
        store(out + kN, I > 0 || add ? load(out + kN) + right : right);
      }
      if (I == 1) {
        store(out + 2 * kN, add ? load(out + 2 * kN) + left : left);
        store(out + 3 * kN, add ? load(out + 3 * kN) + right : right);
      } else if (I > 1) {
        store(out + 2 * kN, load(out + 2 * kN) - left);
        store(out + 3 * kN, load(out + 3 * kN) - right);
      }
    }
  }
}

template <int I, int Z>
void winograd_rows(int64_t count, const float* v, int64_t channels, const float* u, float* y,
                   bool add) {
  constexpr int kT = kWinogradTiles<Z>;
  constexpr int64_t kTileSize = Z * 4 * kLanes<float>;
  int64_t t = 0;
  for (; t + kT <= count; t += kT) {
    winograd_row<I, kT, Z>(v + t, channels, u, y + t * kTileSize, add);
  }
  for (; t + 2 <= count; t += 2) {
    winograd_row<I, 2, Z>(v + t, channels, u, y + t * kTileSize, add);
  }
  if (t < count) winograd_row<I, 1, Z>(v + t, channels, u, y + t * kTileSize, add);
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

// Adds one run of channels to one block's Y: y, at the strip's first tile. u: the block's U at the
// run's first channel, the four i `u_row` apart.
template <int Z>
void add_run(int64_t channels, int64_t count, const float* v, const float* u, int64_t u_row,
             float* y, bool add) {
  const int64_t v_row = channels * 4 * kTileStride;
  winograd_rows<0, Z>(count, v, channels, u, y, add);
  winograd_rows<1, Z>(count, v + v_row, channels, u + u_row, y, add);
  winograd_rows<2, Z>(count, v + 2 * v_row, channels, u + 2 * u_row, y, add);
  winograd_rows<3, Z>(count, v + 3 * v_row, channels, u + 3 * u_row, y, add);
}

template <int Z, bool kReLU>
void finish_block(const WinogradShared& shared, int64_t first, int64_t count, const float* y,
                  float* values, uint8_t* codes, const TaskMoments<float>& moments) {
  constexpr int kN = kLanes<float>;
  ChunkSums<float> chunks[Z];
  for (int64_t t = 0; t < count; ++t) {
    for (int z = 0; z < Z; ++z, y += 4 * kN) {
      const Vector<float> bias = load(shared.bias + first + z * kN);
      const int64_t at = t * shared.padded + first + z * kN;
      if constexpr (!kReLU) {
        const Vector<float> e[4] = {load(y), load(y + kN), load(y + 2 * kN), load(y + 3 * kN)};
        ChunkSums<float>& chunk = chunks[z];
        chunk.see(e[0], e[1], e[2], e[3]);
        if (chunk.windows == kChunkWindows || t + 1 == count) {
          moments.add(chunk, 4, first + z * kN);
          chunk.windows = 0;
        }
      }
      finish_window<kReLU>(load(y), load(y + kN), load(y + 2 * kN), load(y + 3 * kN), bias,
                           values + at, codes + at);
    }
  }
}

template <typename S>
void winograd_f2x2_band(const ForwardArgs& args, const WinogradShared& shared, int64_t task) {
  constexpr int kN = kLanes<float>;
  const Geometry& g = args.geometry;
  const int64_t bands = shared.bands;
  const int64_t n = task / bands, first_out = task % bands * shared.band;
  const int64_t rows = smaller(shared.band, g.h.out - first_out);
  const int64_t channels = g.in_channels;

  const int64_t rows_size = round_up((2 * shared.band + 2) * row_in_order(g.w.out), kN);
  const int64_t plane = round_up((shared.band + 1) * g.w.out, kN) + kN;
  float* in_order = static_cast<float*>(
      scratch(Slot::kPlanes, (rows_size + channels * 8 * plane + kN) * sizeof(float)));
  float* r = in_order + rows_size;
  RangeCheck<float> range(kModerate);
  transform_channels<S>(args, n, first_out, shared.band, plane, in_order, r, range);
  if (!range.passed()) {
    shared.immoderate[task] = 1;
    return;
  }

  const int64_t run = smaller(kRunChannels, channels);
  const int64_t v_size = 16 * run * kTileStride;
  // With a single run a block's Y is finished at once, and all blocks use the same place.
  const int64_t y_block = channels > run ? kTileStride * 4 : 0;  // for each output channel
  const int64_t y_size = kTileStride * 4 * (y_block ? shared.padded : int64_t{kWinogradWide * kN});
  float* v = static_cast<float*>(
      scratch(Slot::kConv, (v_size + y_size + 2 * kTileStride * shared.padded) * sizeof(float)));
  float* y = v + v_size;
  float* values = y + y_size;
  uint8_t* codes = reinterpret_cast<uint8_t*>(values + kTileStride * shared.padded);

  const TaskMoments<float> moments(args.relu ? 0 : shared.padded);
  // Strips of equal length, rather than a short last one.
  const int64_t windows = rows * g.w.out;
  const int64_t strips = (windows + kStripTiles - 1) / kStripTiles;
  const int64_t strip = (windows + strips - 1) / strips;
  Ahead ahead = next_image<S>(args, n, strips * (shared.padded / kN));
  for (int64_t first = 0; first < windows; first += strip) {
    const int64_t count = smaller(strip, windows - first);
    for (int64_t c0 = 0; c0 < channels; c0 += run) {
      const int64_t in_run = smaller(run, channels - c0);
      for (int64_t c = 0; c < in_run; ++c) {
        transform_strip(r + (c0 + c) * 8 * plane + first, plane, g.w.out, count,
                        v + c * 4 * kTileStride, in_run * 4 * kTileStride);
      }
      const bool last = c0 + in_run == channels;
      const auto block = [&]<int Z>(int64_t oc) {
        ahead.step();
        const float* u = shared.weights + oc * channels * 16 + c0 * 4 * Z * kN;
        add_run<Z>(in_run, count, v, u, channels * 4 * Z * kN, y + oc * y_block, c0 > 0);
        const auto finish = args.relu ? finish_block<Z, true> : finish_block<Z, false>;
        if (last) finish(shared, oc, count, y + oc * y_block, values, codes, moments);
      };
      int64_t oc = 0;
      for (; oc + kWinogradWide * kN <= shared.padded; oc += kWinogradWide * kN) {
        block.template operator()<kWinogradWide>(oc);
      }
      if (oc < shared.padded) block.template operator()<1>(oc);
    }
    const int64_t at = n * args.output_strides.n + first_out * args.output_strides.h +
                       first * args.output_strides.w;
    write_strip(values, shared.padded, count, g.out_channels, static_cast<S*>(args.output) + at,
                args.output_strides);
    if (args.code) {
      write_strip(codes, shared.padded, count, g.out_channels,
                  static_cast<uint8_t*>(args.code) + at, args.output_strides);
    }
  }
  if (args.moments) write_moments(args, shared, task, 4 * windows, moments);
}

struct WinogradF2x2 {
  static constexpr int kElements = 16;
  static constexpr int kWide = kWinogradWide;

  static FUSEDCNN_INLINE void weights(const Vector<float> (&k)[3][3], Vector<float> (&u)[16]) {
    Vector<float> half[4][3];
    for (int x = 0; x < 3; ++x) {
      half[0][x] = k[0][x];
      half[1][x] = (k[0][x] + k[1][x] + k[2][x]) * 0.5f;
      half[2][x] = (k[0][x] - k[1][x] + k[2][x]) * 0.5f;
      half[3][x] = k[2][x];
    }
    for (int i = 0; i < 4; ++i) {
      u[i * 4] = half[i][0];
      u[i * 4 + 1] = (half[i][0] + half[i][1] + half[i][2]) * 0.5f;
      u[i * 4 + 2] = (half[i][0] - half[i][1] + half[i][2]) * 0.5f;
      u[i * 4 + 3] = half[i][2];
    }
  }

  // Of element e and input channel c, in vectors of one output-channel block.
  static int64_t place(int e, int64_t c, int64_t channels) {
    return (e / 4 * channels + c) * 4 + e % 4;
  }

  template <typename S>
  static void band(const ForwardArgs& args, const WinogradShared& shared, int64_t task) {
    winograd_f2x2_band<S>(args, shared, task);
  }
};

const char* why_not_winograd_f2x2(const Problem& problem) {
  if (problem.geometry.out_channels < kLanes<float> / 2) {
    return "too few output channels to fill a vector";
  }
  return why_not_winograd(problem);
}

void forward_winograd_f2x2(const ForwardArgs& args, const ThreadPool& pool) {
  forward_winograd<WinogradF2x2>(args, pool);
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
