// What the kernels of batch normalisation share: sums of a tile by channel, of a channel over all
// tiles, and the numbers of a channel that they are made into.
//
// Sums are taken in three steps, each in an order of its own that depends on the sizes alone: a
// thread adds in the elements' type of sums, a tile's threads by a butterfly within a warp and then
// warp by warp, and one block adds a channel's tiles in double.
#pragma once

#include "core/batch_norm.h"
#include "cuda/kernels/library.h"

namespace fusedcnn::cuda {
namespace {

constexpr int kWarpBits = 5;

// How a block's threads share a tile: 2^bits of them lie along the channels (or vectors of them),
// and the others along the pixels, or the other way round.
struct Sharing {
  bool along_channels;
  int bits;

  int past_warp() const { return bits > kWarpBits ? bits - kWarpBits : 0; }
  // Sums of a channel that warps hand in.
  int rows() const {
    return along_channels ? kLibraryThreads >> kWarpBits >> past_warp() : 1 << past_warp();
  }
};

// A thread's part of every tile.
struct Lanes {
  int channel, channel_step;
  int pixel, pixel_step;
  int first_bit, end_bit;  // lanes of a warp that differ in these bits have the same channels
  int row, rows;           // where their sum goes
  bool first;              // whether this lane hands it in
};
template <int V>
FUSEDCNN_DEVICE Lanes lanes_of(const Sharing& sharing) {
  const int bits = sharing.bits, warp_bits = bits < kWarpBits ? bits : kWarpBits;
  const int inner = thread_index() & ((1 << bits) - 1), outer = thread_index() >> bits;
  const int lane = thread_index() & (kWarp - 1), past_warp = bits - warp_bits;
  const int others = kLibraryThreads >> bits;
  if (sharing.along_channels) {
    return {inner * V,
            V << bits,
            outer,
            others,
            warp_bits,
            kWarpBits,
            thread_index() >> kWarpBits >> past_warp,
            kLibraryThreads >> kWarpBits >> past_warp,
            lane >> warp_bits == 0};
  }
  return {outer * V,
          others * V,
          inner,
          1 << bits,
          0,
          warp_bits,
          inner >> kWarpBits,
          1 << past_warp,
          (lane & ((1 << warp_bits) - 1)) == 0};
}

// Of all lanes that differ in these bits; every lane of the warp calls it.
template <typename T>
FUSEDCNN_DEVICE T sum_over_lanes(T value, int first_bit, int end_bit) {
  for (int bit = first_bit; bit < end_bit; ++bit) value += shuffle_xor(value, 1 << bit);
  return value;
}

// Puts the warp's sums of V channels into sums[channel of the tile][row]; a barrier comes next.
template <int V, typename T>
FUSEDCNN_DEVICE void hand_in(const Lanes& lanes, int channel, bool real, const T (&values)[V],
                             Shared<T> sums) {
  FUSEDCNN_UNROLL
  for (int v = 0; v < V; ++v) {
    const T sum = sum_over_lanes(values[v], lanes.first_bit, lanes.end_bit);
    if (real && lanes.first) sums[(channel + v) * lanes.rows + lanes.row] = sum;
  }
}
template <typename T>
FUSEDCNN_DEVICE double sum_of_rows(Shared<T> sums, int channel, int rows) {
  double sum = 0;
  for (int row = 0; row < rows; ++row) sum += sums[channel * rows + row];
  return sum;
}

// Of all threads of the block, to all of them. `warps`: a number for each warp.
FUSEDCNN_DEVICE double sum_over_block(double value, Shared<double> warps) {
  constexpr int kWarps = kLibraryThreads / kWarp;
  value = sum_over_lanes(value, 0, kWarpBits);
  if (thread_index() % kWarp == 0) warps[thread_index() / kWarp] = value;
  sync_threads();
  double sum = 0;
  FUSEDCNN_UNROLL
  for (int warp = 0; warp < kWarps; ++warp) sum += warps[warp];
  sync_threads();  // the next sum overwrites them
  return sum;
}

// The tile's place among those that have its channels.
FUSEDCNN_DEVICE int64_t part_of(const Tiles& tiles, const Tile& tile) {
  return tile.n * tiles.pixel_tiles + (tile.pixel >> tiles.pixel_bits);
}
inline int64_t parts_of(const Tiles& tiles, int64_t batch) { return batch * tiles.pixel_tiles; }

// Affine parameters, of the block's own type or the sums'.
template <typename S>
FUSEDCNN_DEVICE Accumulator<S> load_affine(bool own, const void* from, int64_t at,
                                           Accumulator<S> otherwise) {
  if (!from) return otherwise;
  return own ? widen(load_constant(static_cast<const S*>(from) + at))
             : load_constant(static_cast<const Accumulator<S>*>(from) + at);
}
inline bool own_affine(const Affine& affine, DataType type) { return affine.type == type; }
template <typename S>
FUSEDCNN_DEVICE void store_affine(bool own, void* to, int64_t at, Accumulator<S> value) {
  if (!to) return;
  if (own) {
    static_cast<S*>(to)[at] = narrow<S>(value);
  } else {
    static_cast<Accumulator<S>*>(to)[at] = value;
  }
}

// Four numbers of each channel, all that a pass over elements needs of it.
constexpr int kNumbers = 4;
template <typename T>
FUSEDCNN_DEVICE void load_numbers(const T* from, int64_t channel, T (&to)[kNumbers]) {
  constexpr int kPack = static_cast<int>(16 / sizeof(T));
  FUSEDCNN_UNROLL
  for (int i = 0; i < kNumbers; i += kPack) {
    const Pack<kPack, T> pack = load_pack<kPack>(from + channel * kNumbers + i);
    FUSEDCNN_UNROLL
    for (int j = 0; j < kPack; ++j) to[i + j] = pack.values[j];
  }
}
// Bytes of those of all channels: what comes behind them in a workspace is aligned, too.
inline int64_t numbers_bytes(const Geometry& g, DataType type) {
  return g.out_channels * kNumbers * element_size(statistics_type(type));
}

// 1 / M.
inline double per_output(const Geometry& g) {
  return 1 / (static_cast<double>(g.batch) * static_cast<double>(g.h.conv * g.w.conv));
}

}  // namespace
}  // namespace fusedcnn::cuda
