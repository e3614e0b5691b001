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
// value of one channel: some filter weighs that channel twice as much as most do. Such a patch
// stands out from its own pixels, which bright edges of images do not. So a tile must also keep to
//   P <= 18 kMostPairs G,
// where G is the geometric mean, over the patch's 18 pairs of pixels one below the other, of their
// squares' sums, without those that are zero.
//
// Both depend on the tile's own pixels alone, whatever batch, band or thread it is in, and not on
// the data's scale. Of the tiles of trained networks' activations fewer than 1 % are uneven.
#pragma once

#include "cpu/kernels/simd.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

constexpr float kMostPatch = 9;
constexpr float kMostPairs = 2.5f;
// The bits of a positive float are its logarithm, near enough: the geometric mean is right within
// 6 %. So many bits fewer leave room for a sum of 18.
constexpr int kSpareBits = 6;

// Lane l: the sum of v[l]'s lanes.
FUSEDCNN_INLINE Vector<float> sums_of(Vector<float> (&v)[kLanes<float>]) {
  constexpr int kN = kLanes<float>;
  Vector<int32_t> even, odd;
  FUSEDCNN_UNROLL
  for (int l = 0; l < kN; ++l) {
    even[l] = 2 * l;
    odd[l] = 2 * l + 1;
  }
  FUSEDCNN_UNROLL
  for (int count = kN / 2; count > 0; count /= 2) {
    FUSEDCNN_UNROLL
    for (int i = 0; i < count; ++i) {
      v[i] = __builtin_shuffle(v[2 * i], v[2 * i + 1], even) +
             __builtin_shuffle(v[2 * i], v[2 * i + 1], odd);
    }
  }
  return v[0];
}

// energy[x] = sum of squares over the channels of pixel x of a row. from: [channels][width], the
// channels `stride` apart.
template <typename S>
FUSEDCNN_NOINLINE void row_energies(const S* from, int64_t stride, int64_t channels, int64_t width,
                                    float* energy) {
  constexpr int kN = kLanes<float>;
  if (width < kN) {
    for (int64_t x = 0; x < width; ++x) {
      float sum = 0;
      for (int64_t c = 0; c < channels; ++c) {
        const float value = widen(from[c * stride + x]);
        sum += value * value;
      }
      energy[x] = sum;
    }
    return;
  }
  for (int64_t x = 0; x < width; x += kN) {
    const int64_t at = smaller(x, width - kN);  // the last vector overlaps the one before
    Vector<float> even = {}, odd = {};
    for (int64_t c = 0; c + 1 < channels; c += 2) {
      const Vector<float> a = widen_vector(from + c * stride + at);
      const Vector<float> b = widen_vector(from + (c + 1) * stride + at);
      even += a * a;
      odd += b * b;
    }
    if (channels % 2) {
      const Vector<float> last = widen_vector(from + (channels - 1) * stride + at);
      even += last * last;
    }
    store(energy + at, even + odd);
  }
}

// The same of any pixels, at least as many as lanes, from x: [runs][pixels][Run].
template <int64_t Run>
FUSEDCNN_NOINLINE void pixel_energies(const float* x, int64_t runs, int64_t pixels, float* energy) {
  constexpr int kN = kLanes<float>;
  for (int64_t p = 0; p < pixels; p += kN) {
    const int64_t at = smaller(p, pixels - kN);
    Vector<float> total = {};
    for (int64_t run = 0; run < runs; ++run) {
      const float* from = x + (run * pixels + at) * Run;
      Vector<float> squares[kN];
      FUSEDCNN_UNROLL
      for (int l = 0; l < kN; ++l) {
        squares[l] = Vector<float>{};
        FUSEDCNN_UNROLL
        for (int64_t c = 0; c < Run; c += kN) {
          const Vector<float> value = load(from + l * Run + c);
          squares[l] += value * value;
        }
      }
      total += sums_of(squares);
    }
    store(energy + at, total);
  }
}

// What the tiles of a band are judged by.
struct EnergyMap {
  static constexpr int kSums = 4;

  int64_t tile_rows, tile_cols;
  int64_t cols;    // of pixels
  int64_t pitch;   // of a row of sums: its last vector is read again, five columns further
  float* energy;   // [4 tile_rows + 2][cols], whole vectors behind the last row
  float* columns;  // [tile_rows][kSums][pitch]

  EnergyMap(int64_t tile_rows, int64_t tile_cols)
      : tile_rows(tile_rows), tile_cols(tile_cols), cols(4 * tile_cols + 2) {
    pitch = round_up(cols, kLanes<float>) + kLanes<float>;
  }
  int64_t energies() const { return (4 * tile_rows + 2) * cols + 2 * kLanes<float>; }
  int64_t size() const { return energies() + tile_rows * kSums * pitch; }
  // data: `size` floats. All energies are zero at first.
  void place(float* data) {
    energy = data;
    columns = data + energies();
    memset(data, 0, energies() * sizeof(float));
  }
};

// Of numbers from 0 on; bits of floats are in the order of the floats.
FUSEDCNN_INLINE Vector<float> least_of(Vector<float> a, Vector<float> b) {
  const Vector<int32_t> x = (Vector<int32_t>)a, y = (Vector<int32_t>)b;
  return (Vector<float>)(x < y ? x : y);
}

// Over the six rows of a row of tiles, column by column: their sum, the least field that begins in
// the column, the sum of the pairs' logarithms and minus the number of zeros. out_rows: 4, or 2
// where the lower windows do not exist; out_cols: convolution outputs of a row.
FUSEDCNN_NOINLINE inline void sum_columns(const EnergyMap& map, int64_t row, int64_t out_rows,
                                          int64_t out_cols) {
  constexpr int kN = kLanes<float>;
  const float* energy = map.energy + 4 * row * map.cols;
  float* patch = map.columns + row * EnergyMap::kSums * map.pitch;
  float* least = patch + map.pitch;
  int32_t* logs = reinterpret_cast<int32_t*>(least + map.pitch);
  int32_t* zeros = logs + map.pitch;
  for (int64_t x = 0; x < map.cols; x += kN) {
    Vector<float> pixel[6], three[6];
    FUSEDCNN_UNROLL
    for (int y = 0; y < 6; ++y) {
      const float* at = energy + y * map.cols + x;
      pixel[y] = load(at);
      three[y] = pixel[y] + load(at + 1) + load(at + 2);
    }
    Vector<float> sum = {};
    Vector<int32_t> log = {}, zero = {};
    FUSEDCNN_UNROLL
    for (int y = 0; y < 6; y += 2) {
      const Vector<float> pair = pixel[y] + pixel[y + 1];
      sum += pair;
      log += (Vector<int32_t>)pair >> kSpareBits;
      zero += pair == Vector<float>{};
    }
    Vector<float> fewest = three[0] + three[1] + three[2];
    FUSEDCNN_UNROLL
    for (int y = 1; y < 4; ++y) {
      if (y < out_rows) fewest = least_of(fewest, three[y] + three[y + 1] + three[y + 2]);
    }
    store(patch + x, sum);
    store(least + x, fewest);
    store(logs + x, log);
    store(zeros + x, zero);
  }
  const int64_t behind = map.pitch - kN;
  for (int sum = 0; sum < EnergyMap::kSums; ++sum) {
    store(patch + sum * map.pitch + behind, Vector<float>{});
  }
  for (int64_t x = out_cols; x < behind; ++x) least[x] = __builtin_inff();
}

// Marks the tiles of one row of tiles: uneven, [tile_cols]. largest: of P.
FUSEDCNN_NOINLINE inline void judge_tiles(const EnergyMap& map, int64_t row, float largest,
                                          uint8_t* uneven) {
  constexpr int kN = kLanes<float>;
  const float* patch = map.columns + row * EnergyMap::kSums * map.pitch;
  const float* least = patch + map.pitch;
  const int32_t* logs = reinterpret_cast<const int32_t*>(least + map.pitch);
  const int32_t* zeros = logs + map.pitch;
  // Every fourth column begins a tile.
  for (int64_t x = 0; x < 4 * map.tile_cols; x += kN) {
    Vector<float> sum = {}, fewest = load(least + x);
    Vector<int32_t> log = {}, pairs = broadcast<int32_t>(18);
    FUSEDCNN_UNROLL
    for (int i = 0; i < 6; ++i) {
      sum += load(patch + x + i);
      log += load(logs + x + i);
      pairs += load(zeros + x + i);
    }
    FUSEDCNN_UNROLL
    for (int i = 1; i < 4; ++i) fewest = least_of(fewest, load(least + x + i));
    const Vector<float> count = __builtin_convertvector(pairs > 0 ? pairs : 1, Vector<float>);
    const Vector<float> mean_log = __builtin_convertvector(log, Vector<float>) / count;
    const Vector<float> mean =
        (Vector<float>)(__builtin_convertvector(mean_log, Vector<int32_t>) << kSpareBits);
    // NaN is in no order.
    const Vector<int32_t> even =
        (sum <= largest) & (sum <= 4 * kMostPatch * fewest) & (sum <= 18 * kMostPairs * mean);
    for (int l = 0; l < kN && x + l < 4 * map.tile_cols; l += 4) uneven[(x + l) / 4] = !even[l];
  }
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
