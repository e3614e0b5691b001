// Which tiles winograd4 leaves to plain sums: those whose outputs its rounding would spoil.
//
// F(4x4, 3x3) mixes a 6x6 patch into 16 outputs, so that a large value leaves its rounding in
// outputs that do not see it. With P the sum of squares over the patch and all channels, F the same
// over an output's own 3x3 field and |w| the norm of its weights,
//   an output of winograd4 errs by about  k4 eps |w| sqrt(P)
//   the stock layers' errs by about       k  eps |w| sqrt(F)
// On even data P = 4 F. Measured (root mean squares, relative to the stock layers' error at the
// same outputs, which do not see the large values; randn or uniform values around them):
//
//   P / 4F         1           2           4           8           12          50
//   16 channels    1.0 to 2.0  1.3 to 2.1  1.7 to 2.4  2.2 to 2.9  2.7 to 3.4  5.6 to 6.9
//   64 channels    1.3 to 2.4  1.6 to 2.6  2.2 to 3.1  2.7 to 3.8  3.1 to 4.5  7.1 to 8.4
//
// So a tile is even, and stays with winograd4, where for each of its outputs
//   P <= 4 kMostPatch F.
// A field of zeros next to anything else makes a tile uneven: its outputs are the bias, exactly.
//
// The largest of many errors is further out than their root mean square where all comes from one
// value of one channel: some filter weighs that channel twice as much as most do. Such a value
// stands out of its patch, as edges in images do not. So of the sums over the patch's six columns,
// the largest must also be at most kMostColumn P: on even data a single value then has at most the
// weight of 38 pixels, which makes P / 4F 2.
//
// Both depend on the tile's own pixels alone, whatever batch, band or thread it is in, and not on
// the data's scale. Measured, 0.2 to 2 % of the tiles of real images' activations are uneven.
#pragma once

#include "cpu/kernels/simd.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

constexpr float kMostPatch = 9;
constexpr float kMostColumn = 0.6f;

// Half a vector from either place: a load each, where a shuffle would be one of many.
FUSEDCNN_INLINE Vector<float> load_halves(const float* low, const float* high) {
#if defined(__AVX512F__)
  const __m512 first = _mm512_castps256_ps512(_mm256_loadu_ps(low));
  return (Vector<float>)_mm512_insertf32x8(first, _mm256_loadu_ps(high), 1);
#elif defined(__AVX2__)
  const __m256 first = _mm256_castps128_ps256(_mm_loadu_ps(low));
  return (Vector<float>)_mm256_insertf128_ps(first, _mm_loadu_ps(high), 1);
#else
  constexpr int kHalf = kLanes<float> / 2;
  Vector<float> joined;
  for (int l = 0; l < kHalf; ++l) {
    joined[l] = low[l];
    joined[l + kHalf] = high[l];
  }
  return joined;
#endif
}

// The sums over the lower and the upper half of every vector, in order.
FUSEDCNN_INLINE Vector<float> sums_of_halves(Vector<float> (&v)[kLanes<float> / 2]) {
  constexpr int kN = kLanes<float>;
  FUSEDCNN_UNROLL
  for (int count = kN / 4; count > 0; count /= 2) {
    FUSEDCNN_UNROLL
    for (int i = 0; i < count; ++i) {
      v[i] = shuffle(v[2 * i], v[2 * i + 1], kEven) + shuffle(v[2 * i], v[2 * i + 1], kOdd);
    }
  }
  return v[0];
}

// energy[x] += sum of squares over some channels of pixel x of a row. from: [channels][width], the
// channels `stride` apart.
template <typename S>
FUSEDCNN_NOINLINE void add_energies(const S* from, int64_t stride, int64_t channels, int64_t width,
                                    float* energy) {
  constexpr int kN = kLanes<float>;
  if (width < kN) {
    for (int64_t c = 0; c < channels; ++c, from += stride) {
      for (int64_t x = 0; x < width; ++x) energy[x] += widen(from[x]) * widen(from[x]);
    }
    return;
  }
  const auto sum_at = [&](int64_t x) {
    Vector<float> even = load(energy + x), odd = {};
    const S* at = from + x;
    for (int64_t c = 1; c < channels; c += 2, at += 2 * stride) {
      const Vector<float> a = widen_vector(at), b = widen_vector(at + stride);
      even += a * a;
      odd += b * b;
    }
    if (channels % 2) even += widen_vector(at) * widen_vector(at);
    return even + odd;
  };
  // The last vector overlaps the one before, and must not see its sums.
  const Vector<float> last = sum_at(width - kN);
  for (int64_t x = 0; x + kN < width; x += kN) store(energy + x, sum_at(x));
  store(energy + width - kN, last);
}

// energy[p] = sum of squares over all channels of pixel p. x: [runs][pixels][Run], at least as many
// pixels as lanes.
template <int64_t Run>
FUSEDCNN_NOINLINE void pixel_energies(const float* x, int64_t runs, int64_t pixels, float* energy) {
  constexpr int kN = kLanes<float>;
  for (int64_t p = 0; p < pixels; p += kN) {
    const int64_t at = smaller(p, pixels - kN);
    Vector<float> total = {};
    for (int64_t run = 0; run < runs; ++run) {
      const float* from = x + (run * pixels + at) * Run;
      Vector<float> squares[kN / 2];
      FUSEDCNN_UNROLL
      for (int i = 0; i < kN / 2; ++i, from += 2 * Run) {
        squares[i] = Vector<float>{};
        FUSEDCNN_UNROLL
        for (int64_t c = 0; c < Run; c += kN / 2) {
          const Vector<float> value = load_halves(from + c, from + Run + c);
          squares[i] += value * value;
        }
      }
      total += sums_of_halves(squares);
    }
    store(energy + at, total);
  }
}

// What the tiles of a band are judged by.
struct EnergyMap {
  int64_t tile_rows, tile_cols;
  int64_t cols;   // of pixels
  int64_t pitch;  // of a row of sums: its last vector is read again, five columns further
  float* energy;  // [4 tile_rows + 2][cols], whole vectors behind the last row
  float* sums;    // [tile_rows][2][pitch]: over a column of six, and of the least field from there

  EnergyMap(int64_t tile_rows, int64_t tile_cols)
      : tile_rows(tile_rows), tile_cols(tile_cols), cols(4 * tile_cols + 2) {
    pitch = round_up(cols, kLanes<float>) + kLanes<float>;
  }
  int64_t energies() const { return (4 * tile_rows + 2) * cols + 2 * kLanes<float>; }
  int64_t size() const { return energies() + 2 * tile_rows * pitch; }
  // data: `size` floats. All energies are zero at first.
  void place(float* data) {
    energy = data;
    sums = data + energies();
    memset(data, 0, energies() * sizeof(float));
  }
};

// Of numbers from 0 on: the bits of such floats are in the order of the floats.
FUSEDCNN_INLINE Vector<float> least_of(Vector<float> a, Vector<float> b) {
  const Vector<int32_t> x = (Vector<int32_t>)a, y = (Vector<int32_t>)b;
  return (Vector<float>)(x < y ? x : y);
}

// Fills the sums. out_rows, out_cols: convolution outputs that windows look at; the last tiles may
// have more.
FUSEDCNN_NOINLINE inline void sum_columns(const EnergyMap& map, int64_t out_rows,
                                          int64_t out_cols) {
  constexpr int kN = kLanes<float>;
  for (int64_t x = 0; x < map.cols; x += kN) {
    const float* at = map.energy + x;
    float* to = map.sums + x;
    Vector<float> pair[3], three[6];  // one below the other; side by side
    const auto read = [&](int y) {    // two rows
      const Vector<float> upper = load(at), lower = load(at + map.cols);
      pair[y / 2] = upper + lower;
      three[y] = upper + load(at + 1) + load(at + 2);
      three[y + 1] = lower + load(at + map.cols + 1) + load(at + map.cols + 2);
      at += 2 * map.cols;
    };
    read(0);
    for (int64_t row = 0; row < map.tile_rows; ++row, to += 2 * map.pitch) {
      read(2);
      read(4);
      Vector<float> least = three[0] + three[1] + three[2];
      FUSEDCNN_UNROLL
      for (int y = 1; y < 4; ++y) {
        if (4 * row + y >= out_rows) break;
        least = least_of(least, three[y] + three[y + 1] + three[y + 2]);
      }
      store(to, pair[0] + pair[1] + pair[2]);
      store(to + map.pitch, least);
      pair[0] = pair[2];  // the next row of tiles begins with this one's last two rows
      three[0] = three[4];
      three[1] = three[5];
    }
  }
  for (int64_t row = 0; row < map.tile_rows; ++row) {
    float* column = map.sums + 2 * row * map.pitch;
    float* least = column + map.pitch;
    store(column + map.pitch - kN, Vector<float>{});
    store(least + map.pitch - kN, Vector<float>{});
    for (int64_t x = out_cols; x < 4 * map.tile_cols; ++x) least[x] = __builtin_inff();
  }
}

// uneven: [tile_rows][tile_cols]; largest: of P.
FUSEDCNN_NOINLINE inline void judge_tiles(const EnergyMap& map, float largest, uint8_t* uneven) {
  constexpr int kN = kLanes<float>;
  for (int64_t row = 0; row < map.tile_rows; ++row, uneven += map.tile_cols) {
    const float* columns = map.sums + 2 * row * map.pitch;
    // Every fourth column begins a tile.
    for (int64_t x = 0; x < 4 * map.tile_cols; x += kN) {
      Vector<float> patch = load(columns + x), column = patch;
      Vector<float> least = load(columns + map.pitch + x);
      FUSEDCNN_UNROLL
      for (int i = 1; i < 6; ++i) {
        const Vector<float> next = load(columns + x + i);
        patch += next;
        column = maximum(column, next);
      }
      FUSEDCNN_UNROLL
      for (int i = 1; i < 4; ++i) least = least_of(least, load(columns + map.pitch + x + i));
      // NaN is in no order.
      const Vector<int32_t> even =
          (patch <= largest) & (patch <= 4 * kMostPatch * least) & (column <= kMostColumn * patch);
      for (int l = 0; l < kN && x + l < 4 * map.tile_cols; l += 4) uneven[(x + l) / 4] = !even[l];
    }
  }
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
