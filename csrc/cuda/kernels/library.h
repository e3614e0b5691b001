// What the kernels around the stock convolution share: how a plane, the convolution's output or its
// gradient, is cut into tasks, and index arithmetic without divisions.
//
// A task is a tile: some pixels, in their order, of some channels of one image. Threads lie along
// what is fastest in memory. In a channels_last plane that is the channels: a thread owns V of
// them, 16 bytes where all pixels are aligned to that, and every 256 / lanes-th pixel of the tile.
// In a plane of channels it is the pixels: a thread owns one of them, and every 256 / pixels-th
// channel. Where one side of a pass lies in one order and the other side in the other, values cross
// over in shared memory.
#pragma once

#include "cuda/device.h"
#include "cuda/kernel.h"
#include "cuda/kernels/sizes.h"
#include "cuda/launch.h"

namespace fusedcnn::cuda {
namespace {

constexpr int kThreadBits = 8, kLibraryThreads = 1 << kThreadBits;
// A warp's, and those of a tile that crosses over: 64 bytes of a half type, two sectors of memory.
constexpr int kChannelBits = 5;

// Elements of S in 16 bytes.
template <typename S>
constexpr int kVector = static_cast<int>(16 / sizeof(S));

// Divides n in 0 <= n < 2^31 by d in 1 <= d <= 2^31: with k = 31 + ceil(log2(d)) and a factor
// floor(2^k / d) + 1 = (2^k + e) / d, where 0 < e <= d <= 2^(k - 31), the product n * factor / 2^k
// exceeds n / d by n * e / (2^k * d) < 1 / d. The factor is at most 2^32 - 1.
struct Divisor {
  uint32_t factor, divisor;
  int shift;
};
inline Divisor divisor_of(int64_t d) {
  int shift = 31;
  while (int64_t{1} << (shift - 31) < d) ++shift;
  return {static_cast<uint32_t>((uint64_t{1} << shift) / static_cast<uint64_t>(d) + 1),
          static_cast<uint32_t>(d), shift};
}
struct Division {
  int quotient, remainder;
};
FUSEDCNN_DEVICE Division divide(int n, const Divisor& by) {
  const uint64_t product = uint64_t{static_cast<uint32_t>(n)} * by.factor;
  const auto quotient = static_cast<int>(product >> by.shift);
  return {quotient, n - quotient * static_cast<int>(by.divisor)};
}

// One axis of the pool.
struct PoolAxis {
  int kernel, padding, window, stride;  // window: from its first to its last element
  int conv, out;
  Divisor by_stride, by_dilation;
};
inline PoolAxis pool_axis(const Axis& axis) {
  const AxisSizes s = sizes_of(axis);
  return {
      s.pool_kernel, s.pool_padding, static_cast<int>(axis.window()), s.pool_stride,
      s.conv,        s.out,          divisor_of(s.pool_stride),       divisor_of(s.pool_dilation)};
}
FUSEDCNN_DEVICE int dilation(const PoolAxis& axis) {
  return static_cast<int>(axis.by_dilation.divisor);
}

// The tiles of [N, channels, rows, columns]. Both sizes of a tile are powers of two, but for V.
struct Tiles {
  int64_t channels, pixels;  // of an image
  Divisor columns;
  int channel_bits, pixel_bits;  // channels (or vectors of them) and pixels of a tile
  int64_t channel_tiles, pixel_tiles, tasks;
};
// The least number of bits whose power is `count` or more, and at most `most`.
inline int bits_for(int64_t count, int most) {
  int bits = 0;
  while (bits < most && int64_t{1} << bits < count) ++bits;
  return bits;
}
// Tiles of 2^bits vectors of `vector` channels: of 2^channel_bits such vectors, where there are as
// many, of more where there are not that many pixels, and of no more of either than threads.
inline Tiles tiles_of(int64_t batch, int64_t channels, int64_t rows, int64_t columns, int vector,
                      int channel_bits, int bits) {
  Tiles tiles{channels, rows * columns, divisor_of(columns), 0, 0, 0, 0, 0};
  const int64_t vectors = (channels + vector - 1) / vector;
  const int left = bits - bits_for(vectors, channel_bits);
  tiles.pixel_bits = bits_for(tiles.pixels, left < kThreadBits ? left : kThreadBits);
  const int room = bits - tiles.pixel_bits;
  tiles.channel_bits = bits_for(vectors, room < kThreadBits ? room : kThreadBits);
  const int64_t tile_channels = int64_t{vector} << tiles.channel_bits;
  const int64_t tile_pixels = int64_t{1} << tiles.pixel_bits;
  tiles.channel_tiles = (channels + tile_channels - 1) / tile_channels;
  tiles.pixel_tiles = (tiles.pixels + tile_pixels - 1) / tile_pixels;
  tiles.tasks = batch * tiles.channel_tiles * tiles.pixel_tiles;
  return tiles;
}

// One task's tile.
struct Tile {
  int64_t n, channel, pixel;  // the first of each
  int channels, pixels;       // that there are
  int row, column;            // of the first pixel
};
template <int V>
FUSEDCNN_DEVICE Tile tile_of(const Tiles& tiles, int64_t task) {
  Tile tile;
  tile.channel = task % tiles.channel_tiles * (int64_t{V} << tiles.channel_bits);
  const int64_t rest = task / tiles.channel_tiles;
  tile.pixel = rest % tiles.pixel_tiles << tiles.pixel_bits;
  tile.n = rest / tiles.pixel_tiles;
  const int64_t channels = tiles.channels - tile.channel, pixels = tiles.pixels - tile.pixel;
  tile.channels =
      channels < V << tiles.channel_bits ? static_cast<int>(channels) : V << tiles.channel_bits;
  tile.pixels = pixels < 1 << tiles.pixel_bits ? static_cast<int>(pixels) : 1 << tiles.pixel_bits;
  const int64_t columns = tiles.columns.divisor;
  tile.row = static_cast<int>(tile.pixel / columns);
  tile.column = static_cast<int>(tile.pixel % columns);
  return tile;
}

// Where pixel `p` of a tile lies.
struct Pixel {
  int row, column;
};
FUSEDCNN_DEVICE Pixel pixel_of(const Tiles& tiles, const Tile& tile, int p) {
  const Division place = divide(tile.column + p, tiles.columns);
  return {tile.row + place.quotient, place.remainder};
}

// Elements between neighbours in the plane.
struct PlaneSteps {
  int64_t image, channel, row, column;
};
inline PlaneSteps plane_steps(const Geometry& g, bool channels_last) {
  const int64_t c = g.out_channels, pixels = g.h.conv * g.w.conv;
  return channels_last ? PlaneSteps{pixels * c, 1, g.w.conv * c, c}
                       : PlaneSteps{pixels * c, pixels, g.w.conv, 1};
}

// What a kernel needs that goes through windows.
struct PoolSizes {
  PoolAxis h, w;
  PlaneSteps plane;
  Tiles tiles;  // of the pooled outputs
};

// The elements of a window that lie in the plane.
struct Window {
  int rows, columns;
  int first;       // the number of the first of them
  int64_t offset;  // of that one, from the image's first
};

// The part of a window along one axis.
struct Span {
  int first, count;  // its elements
  int at;            // where the first lies
};
FUSEDCNN_DEVICE Span span_of(const PoolAxis& axis, int o) {
  const int begin = o * axis.stride - axis.padding, spread = dilation(axis);
  const int first = begin < 0 ? divide(spread - 1 - begin, axis.by_dilation).quotient : 0;
  const int room = axis.conv - begin;
  const int there = room > 0 ? divide(room + spread - 1, axis.by_dilation).quotient : 0;
  const int end = there < axis.kernel ? there : axis.kernel;
  return {first, first < end ? end - first : 0, begin + first * spread};
}
FUSEDCNN_DEVICE Window window_of(const PoolSizes& sizes, Pixel pixel) {
  const Span rows = span_of(sizes.h, pixel.row), columns = span_of(sizes.w, pixel.column);
  return {rows.count, columns.count, rows.first * sizes.w.kernel + columns.first,
          rows.at * sizes.plane.row + columns.at * sizes.plane.column};
}

// Of an output's pixel, in its first channel.
FUSEDCNN_DEVICE int64_t offset_of(const Strides& strides, int64_t n, Pixel pixel) {
  return n * strides.n + pixel.row * strides.h + pixel.column * strides.w;
}

}  // namespace
}  // namespace fusedcnn::cuda
