// Which tiles winograd_f4x4 leaves to plain sums: those whose outputs its rounding would spoil.
//
// F(4x4, 3x3) mixes a 6x6 patch into 16 outputs, so that a large value leaves its rounding in
// outputs that do not see it. With P the sum of squares over the patch and all channels, F the same
// over an output's own 3x3 field and |w| the norm of its weights,
//   an output of winograd_f4x4 errs by about  k4 eps |w| sqrt(P)
//   the stock layers' errs by about       k  eps |w| sqrt(F)
// On even data P = 4 F. Measured (root mean squares, relative to the stock layers' error at the
// same outputs, which do not see the large values; randn or uniform values around them):
//
//   P / 4F         1           2           4           8           12          50
//   16 channels    1.0 to 2.0  1.0 to 2.1  1.1 to 2.5  1.5 to 3.2  1.5 to 3.2  3.3 to 6
//   64 channels    1.2 to 2.4  1.2 to 2.6  1.5 to 3.2  1.6 to 3.9  1.9 to 4.5  3.6 to 7
//
// So half a tile is even, and stays with winograd_f4x4, where for each of its outputs
//   P <= 4 kMostPatch F.
// A field of zeros next to anything else makes it uneven: its output is the bias, exactly.
//
// The largest of many errors is further out than their root mean square where all comes from one
// value of one channel: some filter weighs that channel twice as much as most do. Such a value
// stands out of its patch, as edges in images do not. So of the sums over the patch's six columns,
// the largest must also be at most kMostColumn P: on even data a single value then has at most the
// weight of 38 pixels, which makes P / 4F 2.
//
// Both tests depend on the tile's own pixels alone, not on its batch, band or thread, nor on the
// data's scale. Measured, 0.1 to 1 % of the halves are uneven in real images' activations.
#pragma once

#include "cpu/kernels/simd.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

constexpr float kMostPatch = 9;
constexpr float kMostColumn = 0.6f;
// What is said of a tile: which of its halves are uneven.
constexpr uint8_t kUpperHalf = 1, kLowerHalf = 2;

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

// energy[x] += sum_at(x), a vector from x on. width: at least a vector's.
template <typename Sums>
FUSEDCNN_INLINE void add_row(int64_t width, float* energy, const Sums& sum_at) {
  constexpr int kN = kLanes<float>;
  // The last vector overlaps the one before, and must not see what that adds.
  const Vector<float> last = load(energy + width - kN) + sum_at(width - kN);
  for (int64_t x = 0; x + kN < width; x += kN) store(energy + x, load(energy + x) + sum_at(x));
  store(energy + width - kN, last);
}

// Adds to the energies of a row of pixels the squares of some channels. from: [channels][width],
// the channels `stride` apart.
template <typename S>
FUSEDCNN_NOINLINE void add_energies(const S* from, int64_t stride, int64_t channels, int64_t width,
                                    float* energy) {
  if (width < kLanes<float>) {
    for (int64_t c = 0; c < channels; ++c, from += stride) {
      for (int64_t x = 0; x < width; ++x) energy[x] += widen(from[x]) * widen(from[x]);
    }
    return;
  }
  add_row(width, energy, [&](int64_t x) {
    Vector<float> sums[4] = {};  // chains: one would take longer than its instructions
    const S* at = from + x;
    int64_t c = 0;
    for (; c + 4 <= channels; c += 4, at += 4 * stride) {
      FUSEDCNN_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Vector<float> value = widen_vector(at + i * stride);
        sums[i] += value * value;
      }
    }
    for (; c < channels; ++c, at += stride) sums[0] += widen_vector(at) * widen_vector(at);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  });
}

// The same from [width][Run].
template <int64_t Run>
FUSEDCNN_NOINLINE void add_pixel_energies(const float* from, int64_t width, float* energy) {
  constexpr int kN = kLanes<float>;
  if (width < kN) {
    for (int64_t x = 0; x < width; ++x) {
      for (int64_t c = 0; c < Run; ++c) energy[x] += from[x * Run + c] * from[x * Run + c];
    }
    return;
  }
  add_row(width, energy, [&](int64_t x) {
    const float* at = from + x * Run;
    Vector<float> squares[kN / 2];
    FUSEDCNN_UNROLL
    for (int i = 0; i < kN / 2; ++i, at += 2 * Run) {
      squares[i] = Vector<float>{};
      FUSEDCNN_UNROLL
      for (int64_t c = 0; c < Run; c += kN / 2) {
        const Vector<float> value = load_halves(at + c, at + Run + c);
        squares[i] += value * value;
      }
    }
    return sums_of_halves(squares);
  });
}

// What the tiles of a band are judged by.
struct EnergyMap {
  int64_t tile_rows, tile_cols;
  int64_t cols;   // of pixels
  int64_t pitch;  // of a row of sums: its last vector is read again, five columns further
  float* energy;  // [4 tile_rows + 2][cols], whole vectors behind the last row
  // [tile_rows][3][pitch]: over a column of six, and of the least field that begins there, of those
  // in the upper and in the lower half.
  float* sums;

  EnergyMap(int64_t tile_rows, int64_t tile_cols)
      : tile_rows(tile_rows), tile_cols(tile_cols), cols(4 * tile_cols + 2) {
    pitch = round_up(cols, kLanes<float>) + kLanes<float>;
  }
  int64_t energies() const { return (4 * tile_rows + 2) * cols + 2 * kLanes<float>; }
  int64_t size() const { return energies() + 3 * tile_rows * pitch; }
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

// Fills the sums. out_cols: convolution outputs of a row that windows look at; the last tile may
// have more.
FUSEDCNN_NOINLINE inline void sum_columns(const EnergyMap& map, int64_t out_cols) {
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
    for (int64_t row = 0; row < map.tile_rows; ++row, to += 3 * map.pitch) {
      read(2);
      read(4);
      Vector<float> field[4];
      FUSEDCNN_UNROLL
      for (int y = 0; y < 4; ++y) field[y] = three[y] + three[y + 1] + three[y + 2];
      store(to, pair[0] + pair[1] + pair[2]);
      store(to + map.pitch, least_of(field[0], field[1]));
      store(to + 2 * map.pitch, least_of(field[2], field[3]));
      pair[0] = pair[2];  // the next row of tiles begins with this one's last two rows
      three[0] = three[4];
      three[1] = three[5];
    }
  }
  for (int64_t row = 0; row < map.tile_rows; ++row) {
    float* columns = map.sums + 3 * row * map.pitch;
    for (int half = 0; half < 3; ++half) {
      store(columns + (half + 1) * map.pitch - kN, Vector<float>{});
      for (int64_t x = out_cols; half && x < 4 * map.tile_cols; ++x) {
        columns[half * map.pitch + x] = __builtin_inff();
      }
    }
  }
}

// uneven: [tile_rows][tile_cols]; largest: of P. What it says of halves that do not exist is
// arbitrary.
FUSEDCNN_NOINLINE inline void judge_tiles(const EnergyMap& map, float largest, uint8_t* uneven) {
  constexpr int kN = kLanes<float>;
  for (int64_t row = 0; row < map.tile_rows; ++row, uneven += map.tile_cols) {
    const float* columns = map.sums + 3 * row * map.pitch;
    // Every fourth column begins a tile.
    for (int64_t x = 0; x < 4 * map.tile_cols; x += kN) {
      Vector<float> patch = load(columns + x), column = patch, least[2];
      FUSEDCNN_UNROLL
      for (int i = 1; i < 6; ++i) {
        const Vector<float> next = load(columns + x + i);
        patch += next;
        column = maximum(column, next);
      }
      FUSEDCNN_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float* fields = columns + (half + 1) * map.pitch + x;
        least[half] = load(fields);
        FUSEDCNN_UNROLL
        for (int i = 1; i < 4; ++i) least[half] = least_of(least[half], load(fields + i));
      }
      // NaN is in no order.
      const Vector<int32_t> even = (patch <= largest) & (column <= kMostColumn * patch);
      const Vector<int32_t> upper = even & (patch <= 4 * kMostPatch * least[0]);
      const Vector<int32_t> lower = even & (patch <= 4 * kMostPatch * least[1]);
      const Vector<int32_t> verdict = (~upper & kUpperHalf) | (~lower & kLowerHalf);
      for (int l = 0; l < kN && x + l < 4 * map.tile_cols; l += 4) {
        uneven[(x + l) / 4] = static_cast<uint8_t>(verdict[l]);
      }
    }
  }
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
