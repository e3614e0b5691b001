// The forward by Winograd's minimal filtering F(4x4, 3x3), for 3x3 stride 1 under a 2x2 pool, or
// under none.
//
// One tile is four pooling windows: its 6x6 input patch d gives 4x4 convolution outputs
//   Y = A^T [ sum over c of (G g G^T) * (B^T d B) ] A        (Lavin and Gray, 2016)
// in 36 multiplications per input channel instead of 144. The interpolation points are 0, +-a, +-b
// and infinity with a = 1/sqrt(2), b = sqrt(2): their powers stay near 1, which keeps the error
// several times below that of the customary 0, +-1, +-2. It is still two to three times the stock
// layers'. Outputs that are equal in exact arithmetic may differ in the last place, so rounding may
// decide such a tie: this alone is why the kernel is not `exact`.
//
// A task owns a band of pooled rows of one image; tiles are numbered row by row:
//   X  [runs][4 tile rows + 2][4 tile cols + 2][kRun]  the padded image, runs of kRun channels
//   V  [runs][36][kTiles + 1][kRun]             B^T d B of one strip of tiles
//   U  [blocks][36 + 9][C][Z * lanes]           weights of Z vectors of output channels, then g
//   M  [36][kTiles * Z + 1] vectors             products, summed over channels
// Strides are constants and no powers of two: a tile's 36 addresses then cost no arithmetic, and
// its elements do not share a few sets of the L1 cache.
//   P  [windows][out channels]                  pooled values and codes of the band
// Where nothing pools, a tile's 16 outputs are what is wanted, and bands are of their rows.
// A tile that is uneven (uneven_tiles.h), or holds what a transform could make overflow, is summed
// tap by tap instead.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/direct_rows.h"
#include "cpu/kernels/patches.h"
#include "cpu/kernels/uneven_tiles.h"
#include "cpu/kernels/winograd.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

constexpr float kA = 0.70710678118654752f;  // a; a * a = 1/2
constexpr float kB = 1.41421356237309505f;  // b; b * b = 2

// Register tile: T tiles x Z vectors of output channels of one of the 36 elements; a channel costs
// T broadcasts and Z loads for T Z FMAs. 32 registers: 8 x 2 (10 loads for 16 FMAs, and 16 chains
// where 8 hide the latency). 16 registers: 4 x 2, and a strip's V and M stay in L1 together. With
// 32 registers M passes through L2, and so does U: a tenth of the products' time (measured).
constexpr int64_t kTiles = kRegisters >= 32 ? 8 : 4;
constexpr int64_t kRun = 16;           // input channels
constexpr int kTileElements = 36 + 9;  // of U
constexpr int64_t kVStride = (kTiles + 1) * kRun;
template <int Z>
constexpr int64_t kMStride = (kTiles * Z + 1) * kLanes<float>;
// More input channels than this would bring the error near four times the stock layers' (measured:
// 2.7 times at 64, 3.9 times at 128).
constexpr int64_t kMostChannels = 64;

// One call owns T tiles x Z vectors of output channels of one element:
//   m[t][z] = sum over c of v[t][c] * u[c][z]
// over one run of channels; longer chains of additions would round more than the stock layers do.
// v: [T][kRun]; u: [channels][Z * lanes]; m: [T][Z] vectors, added to where `add`. kWhole: of a run
// of kRun channels.
template <int T, int Z, bool kWhole>
FUSEDCNN_NOINLINE void multiply_element(const float* v, int64_t channels, const float* u, float* m,
                                        bool add) {
  constexpr int kN = kLanes<float>;
  Vector<float> sum[T][Z];
  FUSEDCNN_UNROLL
  for (int i = 0; i < T * Z; ++i) sum[i / Z][i % Z] = Vector<float>{};
  const auto channel = [&](int64_t c) __attribute__((always_inline)) {
    Vector<float> weight[Z];
    FUSEDCNN_UNROLL
    for (int z = 0; z < Z; ++z) keep(weight[z] = load(u + (c * Z + z) * kN));
    FUSEDCNN_UNROLL
    for (int t = 0; t < T; ++t) {
      const Vector<float> value = broadcast(v[t * kRun + c]);
      FUSEDCNN_UNROLL
      for (int z = 0; z < Z; ++z) sum[t][z] += value * weight[z];
    }
  };
  if constexpr (kWhole) {
    FUSEDCNN_UNROLL
    for (int c = 0; c < kRun; ++c) channel(c);
  } else {
    for (int64_t c = 0; c < channels; ++c) channel(c);
  }
  if (add) {
    FUSEDCNN_UNROLL
    for (int i = 0; i < T * Z; ++i) sum[i / Z][i % Z] += load(m + i * kN);
  }
  FUSEDCNN_UNROLL
  for (int i = 0; i < T * Z; ++i) store(m + i * kN, sum[i / Z][i % Z]);
}

// One element of one strip. v, u, m: at the element.
template <int Z>
FUSEDCNN_INLINE void multiply_tiles(int64_t count, const float* v, int64_t channels, const float* u,
                                    float* m) {
  constexpr int64_t kTile = Z * kLanes<float>;
  if (count == kTiles && channels == kRun) {
    return multiply_element<kTiles, Z, true>(v, kRun, u, m, false);
  }
  for (int64_t c = 0; c < channels; c += kRun, v += 36 * kVStride, u += kRun * kTile) {
    const int64_t run = smaller(kRun, channels - c);
    const bool add = c > 0;
    int64_t t = 0;
    if (count == kTiles && run == kRun) {
      multiply_element<kTiles, Z, true>(v, run, u, m, add);
      continue;
    }
    if (count == kTiles) {
      multiply_element<kTiles, Z, false>(v, run, u, m, add);
      continue;
    }
    if constexpr (kTiles > 4) {
      if (t + 4 <= count) {
        multiply_element<4, Z, false>(v, run, u, m, add);
        t += 4;
      }
    }
    for (; t + 2 <= count; t += 2) {
      multiply_element<2, Z, false>(v + t * kRun, run, u, m + t * kTile, add);
    }
    if (t < count) multiply_element<1, Z, false>(v + t * kRun, run, u, m + t * kTile, add);
  }
}

// B^T along one dimension, in pairs of elements that need the same sums: 0 and 5, 1 and 2, 3 and 4.
constexpr int kPairs[3][2] = {{0, 5}, {1, 2}, {3, 4}};

template <int kPair>
FUSEDCNN_INLINE void transform_pair(const Vector<float> (&d)[6], Vector<float> (&out)[2]) {
  if constexpr (kPair == 0) {
    out[0] = (d[0] + d[4]) - 2.5f * d[2];
    out[1] = (d[1] + d[5]) - 2.5f * d[3];
  } else {
    constexpr float kPoint = kPair == 1 ? kA : kB, kOther = kPair == 1 ? 2.0f : 0.5f;
    const Vector<float> even = d[4] - kOther * d[2], odd = d[3] - kOther * d[1];
    out[0] = even + kPoint * odd;
    out[1] = even - kPoint * odd;
  }
}

// A^T along one dimension. Elements 1 and 2 come halved (spread_three): a sum less to scale.
FUSEDCNN_INLINE void gather_four(const Vector<float> (&m)[6], Vector<float> (&out)[4]) {
  const Vector<float> sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  const Vector<float> sum_b = m[3] + m[4], difference_b = m[3] - m[4];
  out[0] = (m[0] + sum_b) + 2.0f * sum_a;
  out[1] = kB * (difference_a + difference_b);
  out[2] = sum_a + 2.0f * sum_b;
  out[3] = (m[5] + kA * difference_a) + 2.0f * kB * difference_b;
}

// Two rows of V of one tile and one vector of channels. x: the patch's rows.
template <int kPair>
FUSEDCNN_INLINE void transform_rows_of_tile(const float* const (&x)[6], float* v) {
  Vector<float> rows[2][6];
  FUSEDCNN_UNROLL
  for (int i = 0; i < 6; ++i) {
    Vector<float> d[6], out[2];
    FUSEDCNN_UNROLL
    for (int y = 0; y < 6; ++y) d[y] = load(x[y] + i * kRun);
    transform_pair<kPair>(d, out);
    rows[0][i] = out[0];
    rows[1][i] = out[1];
  }
  FUSEDCNN_UNROLL
  for (int r = 0; r < 2; ++r) {
    float* const to = v + kPairs[kPair][r] * 6 * kVStride;
    const auto put = [&]<int kOther>() __attribute__((always_inline)) {
      Vector<float> out[2];
      transform_pair<kOther>(rows[r], out);
      store(to + kPairs[kOther][0] * kVStride, out[0]);
      store(to + kPairs[kOther][1] * kVStride, out[1]);
    };
    put.template operator()<0>();
    put.template operator()<1>();
    put.template operator()<2>();
  }
}

// V of one tile and run of channels. x: the tile's first pixel, rows `row` apart; v: the tile's.
// Pairs of rows read pixels again, which costs less than to keep 36 vectors in registers.
FUSEDCNN_NOINLINE void transform_tile(const float* x, int64_t row, float* v) {
  constexpr int kN = kLanes<float>;
  for (int64_t c = 0; c < kRun; c += kN, x += kN, v += kN) {
    const float* rows[6];
    FUSEDCNN_UNROLL
    for (int y = 0; y < 6; ++y) keep_address(rows[y] = x + y * row);
    transform_rows_of_tile<0>(rows, v);
    transform_rows_of_tile<1>(rows, v);
    transform_rows_of_tile<2>(rows, v);
  }
}

// What becomes of a tile: four windows, with or without ReLU, or its 16 outputs as they are.
enum class Epilogue { kReLU, kMaximum, kPlane };

// Outputs of a tile along either axis.
template <Epilogue kEpilogue>
constexpr int64_t kSide = kEpilogue == Epilogue::kPlane ? 4 : 2;

// Where the outputs of a band, or of a tile, go. codes: null where they are not wanted.
struct TileOutput {
  float* values;
  uint8_t* codes;
  int64_t right;       // elements to the next output of the row
  int64_t below;       // and to the row below
  int64_t rows, cols;  // how many there are

  // The same from this output on.
  TileOutput from(int64_t row, int64_t col) const {
    const int64_t at = row * below + col * right;
    return {values + at, codes ? codes + at : codes, right, below, rows - row, cols - col};
  }
  TileOutput of_channel(int64_t channel) const {
    return {values + channel, codes ? codes + channel : codes, right, below, rows, cols};
  }
};

// The inverse transform, bias and the rest for one tile and one vector of output channels. m: the
// tile's element 0. kMaximum adds the windows of the halves that are not uneven to the chunk.
template <int Z, Epilogue kEpilogue>
FUSEDCNN_NOINLINE void finish_tile(const float* m, Vector<float> bias, const TileOutput& to,
                                   uint8_t uneven, ChunkSums<float>& chunk) {
  Vector<float> rows[4][6];
  FUSEDCNN_UNROLL
  for (int i = 0; i < 6; ++i) {
    Vector<float> in[6], out[4];
    FUSEDCNN_UNROLL
    for (int y = 0; y < 6; ++y) in[y] = load(m + (y * 6 + i) * kMStride<Z>);
    gather_four(in, out);
    FUSEDCNN_UNROLL
    for (int y = 0; y < 4; ++y) rows[y][i] = out[y];
  }
  if constexpr (kEpilogue == Epilogue::kPlane) {
    FUSEDCNN_UNROLL
    for (int y = 0; y < 4; ++y) {
      if (y >= to.rows) break;
      Vector<float> out[4];
      gather_four(rows[y], out);
      FUSEDCNN_UNROLL
      for (int x = 0; x < 4; ++x) {
        if (x < to.cols) store(to.values + y * to.below + x * to.right, out[x] + bias);
      }
    }
    return;
  }
  uint8_t* const codes = to.codes;
  FUSEDCNN_UNROLL
  for (int half = 0; half < 2; ++half) {
    if (half >= to.rows) break;
    Vector<float> top[4], bottom[4];
    gather_four(rows[2 * half], top);
    gather_four(rows[2 * half + 1], bottom);
    FUSEDCNN_UNROLL
    for (int side = 0; side < 2; ++side) {
      if (side >= to.cols) break;
      const int64_t at = half * to.below + side * to.right;
      if constexpr (kEpilogue == Epilogue::kMaximum) {
        if (!(uneven & (half ? kLowerHalf : kUpperHalf))) {
          chunk.see(top[2 * side], top[2 * side + 1], bottom[2 * side], bottom[2 * side + 1]);
        }
      }
      finish_window<kEpilogue == Epilogue::kReLU>(top[2 * side], top[2 * side + 1],
                                                  bottom[2 * side], bottom[2 * side + 1], bias,
                                                  to.values + at, codes ? codes + at : codes);
    }
  }
}

template <int Z, Epilogue kEpilogue>
void strip_tiles(const WinogradShared& shared, int64_t channels, int64_t first, int64_t count,
                 const float* v, float* m, const TileOutput* outputs, const uint8_t* uneven,
                 const TaskMoments<float>& moments, Ahead& ahead) {
  constexpr int kN = kLanes<float>;
  const float* u = shared.weights + first * channels * kTileElements;
  for (int64_t e = 0; e < 36; ++e) {
    ahead.step();
    multiply_tiles<Z>(count, v + e * kVStride, channels, u + e * channels * Z * kN,
                      m + e * kMStride<Z>);
  }
  for (int z = 0; z < Z; ++z) {
    const int64_t oc = first + z * kN;
    ChunkSums<float> chunk;
    for (int64_t t = 0; t < count; ++t) {
      finish_tile<Z, kEpilogue>(m + (t * Z + z) * kN, load(shared.bias + oc),
                                outputs[t].of_channel(oc), uneven[t], chunk);
    }
    if (kEpilogue == Epilogue::kMaximum) moments.add(chunk, 4, oc);
  }
}

// Copies the band's part of one run of channels into X, and adds its squares to the pixels'
// energies. image: the run's first channel; first: the band's first convolution row.
template <typename S>
void pack_pixels(const Geometry& g, const S* image, Strides s, int64_t channels, int64_t first,
                 int64_t rows, int64_t cols, float* x, float* energy) {
  const int64_t left = smaller(g.w.padding, cols);
  const int64_t width = larger<int64_t>(0, smaller(g.w.in, cols - left));
  for (int64_t y = 0; y < rows; ++y, x += cols * kRun, energy += cols) {
    const int64_t h = first - g.h.padding + y;
    // Channels past the last are multiplied by no weight, but must not be NaN by chance.
    if (h < 0 || h >= g.h.in || channels < kRun) memset(x, 0, cols * kRun * sizeof(float));
    if (h < 0 || h >= g.h.in) continue;
    float* inside = x + left * kRun;
    memset(x, 0, left * kRun * sizeof(float));
    read_pixels(image + h * s.h, s, inside, kRun, width, channels);
    memset(inside + width * kRun, 0, (cols - left - width) * kRun * sizeof(float));
    if (s.w == 1) {
      add_energies(image + h * s.h, s.c, channels, width, energy + left);
    } else {
      add_pixel_energies<kRun>(inside, width, energy + left);
    }
  }
}

// A tile's `halves` tap by tap, for Z vectors of output channels. x: the tile's first pixel, runs
// of channels `x_size` apart, rows `row`.
template <int Z, Epilogue kEpilogue>
void sum_block(const WinogradShared& shared, int64_t channels, uint8_t halves, int64_t first,
               const float* x, int64_t x_size, int64_t row, const TileOutput& to,
               const TaskMoments<float>& moments) {
  constexpr int kN = kLanes<float>;
  constexpr int64_t kTaps[3] = {0, kRun, 2 * kRun};
  const int64_t tap = channels * Z * kN;
  const float* g = shared.weights + first * channels * kTileElements + 36 * tap;
  constexpr int64_t kHalf = kSide<kEpilogue> / 2;  // outputs of a half, down
  if (to.rows <= kHalf) halves &= kUpperHalf;
  for (int64_t half = 0; half < 2; ++half, x += 2 * row) {
    if (!(halves & (half ? kLowerHalf : kUpperHalf))) continue;
    Vector<float> conv[2][4][Z];
    for (int64_t y = 0; y < 2; ++y) {
      for (int64_t c = 0; c < channels; c += kRun) {
        for (int64_t kh = 0; kh < 3; ++kh) {
          const bool last = c + kRun >= channels && kh == 2;
          direct_tile<float, 4, Z>(x + c / kRun * x_size + (y + kh) * row, kRun, kTaps, 3,
                                   smaller(kRun, channels - c), g + 3 * kh * tap + c * Z * kN, tap,
                                   last ? shared.bias + first : nullptr, c + kh > 0,
                                   reinterpret_cast<float*>(conv[y]), Z * kN);
        }
      }
    }
    for (int z = 0; z < Z; ++z) {
      const TileOutput out = to.from(half * kHalf, 0).of_channel(first + z * kN);
      ChunkSums<float> chunk;
      for (int64_t i = 0; i < kHalf * kSide<kEpilogue>; ++i) {
        const int64_t y = i / kSide<kEpilogue>, x = i % kSide<kEpilogue>;
        const int64_t at = y * out.below + x * out.right;
        if (y >= out.rows || x >= out.cols) continue;
        if constexpr (kEpilogue == Epilogue::kPlane) {
          store(out.values + at, conv[y][x][z]);
        } else {
          FirstMaximum<float> pool;
          for (int e = 0; e < 4; ++e) pool.see(conv[e / 2][2 * x + e % 2][z], e);
          uint8_t unwanted[kN];
          pool.template finish<kEpilogue == Epilogue::kReLU>(out.values + at,
                                                             out.codes ? out.codes + at : unwanted);
          if constexpr (kEpilogue == Epilogue::kMaximum) {
            const Vector<float> bias = load(shared.bias + first + z * kN);
            chunk.see(conv[0][2 * x][z] - bias, conv[0][2 * x + 1][z] - bias,
                      conv[1][2 * x][z] - bias, conv[1][2 * x + 1][z] - bias);
          }
        }
      }
      if (kEpilogue == Epilogue::kMaximum) moments.add(chunk, 4, first + z * kN);
    }
  }
}

template <Epilogue kEpilogue>
FUSEDCNN_NOINLINE void sum_tile(const WinogradShared& shared, int64_t channels, uint8_t halves,
                                const float* x, int64_t x_size, int64_t row, const TileOutput& to,
                                const TaskMoments<float>& moments) {
  constexpr int kN = kLanes<float>;
  int64_t oc = 0;
  for (; oc + 2 * kN <= shared.padded; oc += 2 * kN) {
    sum_block<2, kEpilogue>(shared, channels, halves, oc, x, x_size, row, to, moments);
  }
  if (oc < shared.padded)
    sum_block<1, kEpilogue>(shared, channels, halves, oc, x, x_size, row, to, moments);
}

template <typename S, Epilogue kEpilogue>
void winograd_f4x4_band(const ForwardArgs& args, const WinogradShared& shared, int64_t task) {
  constexpr int kN = kLanes<float>;
  const Geometry& g = args.geometry;
  const int64_t bands = shared.bands;
  const int64_t n = task / bands, first_out = task % bands * shared.band;
  const int64_t rows = smaller(shared.band, g.h.out - first_out);
  constexpr int64_t kOutputs = kSide<kEpilogue>, kPool = 4 / kOutputs;
  const int64_t tile_rows = (rows + kOutputs - 1) / kOutputs;
  const int64_t tile_cols = (g.w.out + kOutputs - 1) / kOutputs;
  const int64_t tiles = tile_rows * tile_cols;
  const int64_t channels = g.in_channels, runs = (channels + kRun - 1) / kRun;
  const int64_t x_rows = 4 * tile_rows + 2, x_cols = 4 * tile_cols + 2;

  const int64_t x_size = x_rows * x_cols * kRun;
  EnergyMap map(tile_rows, tile_cols);
  float* x = static_cast<float*>(
      scratch(Slot::kPlanes, (runs * x_size + map.size()) * sizeof(float) + tiles));
  map.place(x + runs * x_size);
  uint8_t* uneven = reinterpret_cast<uint8_t*>(x + runs * x_size + map.size());
  const Strides s = args.input_strides;
  const S* image = static_cast<const S*>(args.input) + n * s.n;
  for (int64_t run = 0; run < runs; ++run) {
    pack_pixels(g, image + run * kRun * s.c, s, smaller(kRun, channels - run * kRun),
                first_out * kPool, x_rows, x_cols, x + run * x_size, map.energy);
  }
  sum_columns(map, kPool * g.w.out);
  judge_tiles(map, kModerate * kModerate, uneven);

  const int64_t v_size = runs * 36 * kVStride;
  constexpr int64_t kMSize = 36 * kMStride<2>;
  // Whole vectors of a plane go to the tensor at once.
  const bool direct = kEpilogue == Epilogue::kPlane && std::is_same_v<S, float> &&
                      args.output_strides.c == 1 && shared.padded == g.out_channels;
  const int64_t outputs = rows * g.w.out, buffered = direct ? 0 : outputs * shared.padded;
  float* v = static_cast<float*>(
      scratch(Slot::kConv, (v_size + kMSize) * sizeof(float) + buffered * (sizeof(float) + 1)));
  float* m = v + v_size;
  const int64_t at = n * args.output_strides.n + first_out * args.output_strides.h;
  S* output = static_cast<S*>(args.output) + at;
  float* values = direct ? reinterpret_cast<float*>(output) : m + kMSize;
  uint8_t* codes = reinterpret_cast<uint8_t*>(m + kMSize + buffered);
  const bool no_codes = kEpilogue == Epilogue::kPlane || !args.code;
  const TileOutput whole{
      values, no_codes ? nullptr : codes, shared.padded, g.w.out * shared.padded, rows, g.w.out};

  const TaskMoments<float> moments(kEpilogue == Epilogue::kMaximum ? shared.padded : 0);
  const int64_t strips = (tiles + kTiles - 1) / kTiles;
  Ahead ahead = next_image<S>(args, n, strips * 36);
  for (int64_t first = 0; first < tiles; first += kTiles) {
    const int64_t count = smaller(kTiles, tiles - first);
    uint8_t all = kUpperHalf | kLowerHalf;
    for (int64_t t = 0; t < count; ++t) all &= uneven[first + t];
    if (all == (kUpperHalf | kLowerHalf)) continue;
    TileOutput tile_outputs[kTiles];
    for (int64_t t = 0; t < count; ++t) {
      const int64_t row = (first + t) / tile_cols, col = (first + t) % tile_cols;
      for (int64_t run = 0; run < runs; ++run) {
        transform_tile(x + run * x_size + (4 * row * x_cols + 4 * col) * kRun, x_cols * kRun,
                       v + run * 36 * kVStride + t * kRun);
      }
      tile_outputs[t] = whole.from(row * kOutputs, col * kOutputs);
    }
    int64_t oc = 0;
    for (; oc + 2 * kN <= shared.padded; oc += 2 * kN) {
      strip_tiles<2, kEpilogue>(shared, channels, oc, count, v, m, tile_outputs, uneven + first,
                                moments, ahead);
    }
    if (oc < shared.padded) {
      strip_tiles<1, kEpilogue>(shared, channels, oc, count, v, m, tile_outputs, uneven + first,
                                moments, ahead);
    }
  }
  for (int64_t tile = 0; tile < tiles; ++tile) {
    if (!uneven[tile]) continue;
    const int64_t row = tile / tile_cols, col = tile % tile_cols;
    sum_tile<kEpilogue>(shared, channels, uneven[tile], x + (4 * row * x_cols + 4 * col) * kRun,
                        x_size, x_cols * kRun, whole.from(row * kOutputs, col * kOutputs), moments);
  }
  if (!direct) {
    write_strip(values, shared.padded, outputs, g.out_channels, output, args.output_strides);
  }
  if constexpr (kEpilogue == Epilogue::kPlane) {
    clear_codes(args, n, first_out, rows);
  } else if (args.code) {
    write_strip(codes, shared.padded, outputs, g.out_channels,
                static_cast<uint8_t*>(args.code) + at, args.output_strides);
  }
  if (kEpilogue == Epilogue::kMaximum && args.moments) {
    write_moments(args, shared, task, 4 * outputs, moments);
  }
}

// G along one dimension, elements 1 and 2 halved.
FUSEDCNN_INLINE void spread_three(Vector<float> g0, Vector<float> g1, Vector<float> g2,
                                  Vector<float> (&out)[6]) {
  const Vector<float> even_a = (g0 + 0.5f * g2) * (-1.0f / 3), odd_a = g1 * (kA * (-1.0f / 3));
  const Vector<float> even_b = (g0 + 2.0f * g2) * (1.0f / 6), odd_b = g1 * (kB * (1.0f / 6));
  out[0] = g0;
  out[1] = even_a + odd_a;
  out[2] = even_a - odd_a;
  out[3] = even_b + odd_b;
  out[4] = even_b - odd_b;
  out[5] = g2;
}

struct WinogradF4x4 {
  static constexpr int kElements = kTileElements;
  static constexpr int kWide = 2;

  static FUSEDCNN_INLINE void weights(const Vector<float> (&k)[3][3],
                                      Vector<float> (&u)[kElements]) {
    Vector<float> half[3][6];
    FUSEDCNN_UNROLL
    for (int x = 0; x < 3; ++x) spread_three(k[0][x], k[1][x], k[2][x], half[x]);
    FUSEDCNN_UNROLL
    for (int i = 0; i < 6; ++i) {
      Vector<float> out[6];
      spread_three(half[0][i], half[1][i], half[2][i], out);
      FUSEDCNN_UNROLL
      for (int j = 0; j < 6; ++j) u[i * 6 + j] = out[j];
    }
    FUSEDCNN_UNROLL
    for (int t = 0; t < 9; ++t) u[36 + t] = k[t / 3][t % 3];
  }

  // Of element e and input channel c, in vectors of one output-channel block.
  static int64_t place(int e, int64_t c, int64_t channels) { return e * channels + c; }

  template <typename S>
  static void band(const ForwardArgs& args, const WinogradShared& shared, int64_t task) {
    if (args.relu) return winograd_f4x4_band<S, Epilogue::kReLU>(args, shared, task);
    is_plane(args.geometry, args.relu)
        ? winograd_f4x4_band<S, Epilogue::kPlane>(args, shared, task)
        : winograd_f4x4_band<S, Epilogue::kMaximum>(args, shared, task);
  }
};

const char* why_not_winograd_f4x4(const Problem& problem) {
  const Geometry& g = problem.geometry;
  // Fewer channels do not pay for the larger transforms.
  if (g.in_channels < 16) return "fewer than 16 input channels";
  if (g.in_channels > kMostChannels) return "too many input channels for its accuracy";
  if (g.out_channels < kLanes<float>) return "too few output channels to fill a vector";
  if (is_plane(g, problem.relu)) {
    if (g.h.out < 3 || g.w.out < 3) return "no tile of 4x4 outputs";
    return problem.moments ? why_no_moments(g) : why_not_3x3_convolution(problem);
  }
  if (g.h.out < 2 || g.w.out < 2) return "no tile of four windows";
  return why_not_winograd(problem);
}

void forward_winograd_f4x4(const ForwardArgs& args, const ThreadPool& pool) {
  forward_winograd<WinogradF4x4>(args, pool);
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
