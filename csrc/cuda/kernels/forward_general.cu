// The general forward kernel: any kernel size, stride, padding, dilation, groups and pool.
//
// A block computes a tile of pooled outputs of one image for a tile of output channels. Convolution
// outputs are computed once per tile, as the matrix product [output channels] x [places], K =
// channels x taps, kPlaces places at a time: operands go through shared memory in slices of kSlice,
// and every thread holds a register tile. The products, with the bias, go to shared memory, and the
// threads, each of which owns a few pooled outputs, update their maxima and winners. Places come in
// the order in which a window's elements are counted, so the first maximum is met first.

#include <initializer_list>

#include "cuda/device.h"
#include "cuda/kernel.h"
#include "cuda/kernels/sizes.h"
#include "cuda/launch.h"

namespace fusedcnn::cuda {
namespace {

// One axis of a block's tile of convolution outputs. Pooled output o of the tile finds element p of
// its window at row o * step + p * spread of the tile. Where windows do not overlap, these rows are
// the windows' own elements and nothing else; otherwise all rows that the tile spans.
struct TileAxis {
  int outputs;  // pooled outputs of a tile
  int tiles;    // tiles of the whole axis
  int step, spread;
  int rows;      // of a tile
  bool compact;  // only the windows' own elements
};

struct ForwardSizes {
  AxisSizes h, w;
  TileAxis tile_h, tile_w;
  int channels, out_channels;  // of a group
  int groups, channel_blocks;
  int64_t tasks;
};

constexpr int kForwardThreads = 256;
// Depth of the operands in shared memory.
constexpr int kSlice = 8;
// Products summed in one chain; longer sums are taken in runs of this length and added up, since
// one long chain would round more than the stock layers do. A multiple of kSlice.
constexpr int kChain = 64;
// Pooled outputs of a thread.
constexpr int kStates = 4;

// Channels x Places convolution outputs per block, R x V of them per thread. Each slice costs a
// thread R + V elements from shared memory for R * V multiply-adds.
template <int Channels, int Places, int R, int V>
struct ForwardTile {
  static constexpr int kChannels = Channels, kPlaces = Places, kR = R, kV = V;
  // Pooled outputs per output channel.
  static constexpr int kOutputs = kForwardThreads * kStates / Channels;
  // One more element per row of products spreads a column over the banks.
  static constexpr int kPitch = Places + 1;
  static_assert(Channels / R * (Places / V) == kForwardThreads);

  template <typename T>
  static constexpr int64_t shared() {
    return shared_bytes<T>(kSlice * Channels) + shared_bytes<T>(kSlice * Places) +
           shared_bytes<T>(Channels * kPitch) + 2 * shared_bytes<int64_t>(2 * kSlice) +
           2 * shared_bytes<int>(2 * kSlice);
  }
};

// The convolution coordinate of row `row` of a tile whose first pooled output is `first`.
FUSEDCNN_DEVICE int conv_coordinate(const AxisSizes& axis, const TileAxis& tile, int first,
                                    int row) {
  const int origin = first * axis.pool_stride - axis.pool_padding;
  if (!tile.compact) return origin + row;
  return origin + row / axis.pool_kernel * axis.pool_stride +
         row % axis.pool_kernel * axis.pool_dilation;
}

// args: input [N, C, H, W], weight [OC, C / groups, KH, KW], bias [OC] or null, output and code
// [N, OC, OH, OW] (code may be null).
template <typename S, typename Tile>
FUSEDCNN_KERNEL(kForwardThreads)
forward_general_kernel(ForwardArgs args, ForwardSizes sizes) {
  using T = Accumulator<S>;
  constexpr int kChannels = Tile::kChannels, kPlaces = Tile::kPlaces;
  constexpr int kR = Tile::kR, kV = Tile::kV;
  SharedMemory memory;
  const Shared<T> weights = memory.array<T>(kSlice * kChannels);  // [kSlice][kChannels]
  const Shared<T> pixels = memory.array<T>(kSlice * kPlaces);     // [kSlice][kPlaces]
  const Shared<T> products = memory.array<T>(kChannels * Tile::kPitch);
  // Of each k of a slice, in two generations: where its weight and its pixel are found.
  const Shared<int64_t> weight_offset = memory.array<int64_t>(2 * kSlice);
  const Shared<int64_t> pixel_offset = memory.array<int64_t>(2 * kSlice);
  const Shared<int> tap_h = memory.array<int>(2 * kSlice);
  const Shared<int> tap_w = memory.array<int>(2 * kSlice);

  const int thread = thread_index();
  const AxisSizes &h = sizes.h, &w = sizes.w;
  const int taps = h.kernel * w.kernel, depth = sizes.channels * taps;
  const int64_t all_places = static_cast<int64_t>(sizes.tile_h.rows) * sizes.tile_w.rows;

  const auto locate = [&](int k, int slot) {
    const int c = k / taps, kh = k % taps / w.kernel, kw = k % taps % w.kernel;
    const bool real = k < depth;
    const int dh = kh * h.dilation, dw = kw * w.dilation;
    weight_offset[slot] =
        real ? c * args.weight_strides.c + kh * args.weight_strides.h + kw * args.weight_strides.w
             : -1;
    pixel_offset[slot] =
        c * args.input_strides.c + dh * args.input_strides.h + dw * args.input_strides.w;
    tap_h[slot] = real ? dh : kOutside;
    tap_w[slot] = dw;
  };

  for (int64_t task = block_index(); task < sizes.tasks; task += grid_blocks()) {
    int64_t rest = task;
    const int first_w = static_cast<int>(rest % sizes.tile_w.tiles) * sizes.tile_w.outputs;
    rest /= sizes.tile_w.tiles;
    const int first_h = static_cast<int>(rest % sizes.tile_h.tiles) * sizes.tile_h.outputs;
    rest /= sizes.tile_h.tiles;
    const int first_channel = static_cast<int>(rest % sizes.channel_blocks) * kChannels;
    rest /= sizes.channel_blocks;
    const int64_t group = rest % sizes.groups, n = rest / sizes.groups;
    const S* const image = static_cast<const S*>(args.input) + n * args.input_strides.n +
                           group * sizes.channels * args.input_strides.c;
    const int64_t channel_base = group * sizes.out_channels + first_channel;
    const S* const weight =
        static_cast<const S*>(args.weight) + channel_base * args.weight_strides.n;

    T best[kStates];
    int winner[kStates];  // -1: no element seen yet
    FUSEDCNN_UNROLL
    for (int j = 0; j < kStates; ++j) best[j] = -infinity<T>(), winner[j] = -1;

    for (int64_t first_place = 0; first_place < all_places; first_place += kPlaces) {
      // The place whose pixels this thread fetches: its first input element, or kOutside.
      const int column = thread % kPlaces;
      const int64_t place = first_place + column;
      int pixel_h = kOutside, pixel_w = kOutside;
      int64_t place_offset = 0;
      if (place < all_places) {
        const int ch =
            conv_coordinate(h, sizes.tile_h, first_h, static_cast<int>(place / sizes.tile_w.rows));
        const int cw =
            conv_coordinate(w, sizes.tile_w, first_w, static_cast<int>(place % sizes.tile_w.rows));
        if (inside(ch, h.conv) && inside(cw, w.conv)) {
          pixel_h = ch * h.stride - h.padding;
          pixel_w = cw * w.stride - w.padding;
          place_offset = pixel_h * args.input_strides.h + pixel_w * args.input_strides.w;
        }
      }

      T acc[kR][kV], total[kR][kV];
      FUSEDCNN_UNROLL
      for (int i = 0; i < kR * kV; ++i) acc[i / kV][i % kV] = total[i / kV][i % kV] = 0;
      const int row0 = thread / (kPlaces / kV) * kR, column0 = thread % (kPlaces / kV) * kV;

      if (thread < kSlice) locate(thread, thread);
      sync_threads();
      int generation = 0;
      for (int k0 = 0; k0 < depth; k0 += kSlice, generation ^= 1) {
        const int slot0 = generation * kSlice;
        for (int i = thread; i < kSlice * kChannels; i += kForwardThreads) {
          const int k = i % kSlice, r = i / kSlice;
          const int64_t offset = weight_offset[slot0 + k];
          T value = 0;
          if (offset >= 0 && first_channel + r < sizes.out_channels) {
            value = widen(load_constant(weight + r * args.weight_strides.n + offset));
          }
          weights[k * kChannels + r] = value;
        }
        FUSEDCNN_UNROLL
        for (int k = thread / kPlaces; k < kSlice; k += kForwardThreads / kPlaces) {
          const int ih = pixel_h + tap_h[slot0 + k], iw = pixel_w + tap_w[slot0 + k];
          T value = 0;
          if (inside(ih, h.in) && inside(iw, w.in)) {
            value = widen(load_constant(image + pixel_offset[slot0 + k] + place_offset));
          }
          pixels[k * kPlaces + column] = value;
        }
        if (thread < kSlice) locate(k0 + kSlice + thread, kSlice - slot0 + thread);
        sync_threads();
        FUSEDCNN_UNROLL
        for (int k = 0; k < kSlice; ++k) {
          T a[kR], b[kV];
          load_row(weights + (k * kChannels + row0), a);
          load_row(pixels + (k * kPlaces + column0), b);
          FUSEDCNN_UNROLL
          for (int i = 0; i < kR * kV; ++i) {
            acc[i / kV][i % kV] = multiply_add(a[i / kV], b[i % kV], acc[i / kV][i % kV]);
          }
        }
        sync_threads();
        if ((k0 + kSlice) % kChain == 0 || k0 + kSlice >= depth) {
          FUSEDCNN_UNROLL
          for (int i = 0; i < kR * kV; ++i) {
            total[i / kV][i % kV] += acc[i / kV][i % kV];
            acc[i / kV][i % kV] = 0;
          }
        }
      }
      // The bias comes last: partial sums that carry it round more.
      FUSEDCNN_UNROLL
      for (int r = 0; r < kR; ++r) {
        T bias = 0;
        if (args.bias && first_channel + row0 + r < sizes.out_channels) {
          bias = widen(load_constant(static_cast<const S*>(args.bias) +
                                     (channel_base + row0 + r) * args.bias_stride));
        }
        FUSEDCNN_UNROLL
        for (int v = 0; v < kV; ++v) {
          products[(row0 + r) * Tile::kPitch + column0 + v] = total[r][v] + bias;
        }
      }
      sync_threads();

      FUSEDCNN_UNROLL
      for (int j = 0; j < kStates; ++j) {
        const int state = j * kForwardThreads + thread;
        const int slot = state % Tile::kOutputs, r = state / Tile::kOutputs;
        const int sh = slot / sizes.tile_w.outputs, sw = slot % sizes.tile_w.outputs;
        const int oh = first_h + sh, ow = first_w + sw;
        if (sh >= sizes.tile_h.outputs || oh >= h.out || ow >= w.out) continue;
        for (int ph = 0; ph < h.pool_kernel; ++ph) {
          const int ch = oh * h.pool_stride - h.pool_padding + ph * h.pool_dilation;
          // The window's row of places, counted from the first in shared memory.
          const int64_t row_place =
              static_cast<int64_t>(sh * sizes.tile_h.step + ph * sizes.tile_h.spread) *
                  sizes.tile_w.rows -
              first_place;
          if (!inside(ch, h.conv) || row_place >= kPlaces || row_place + sizes.tile_w.rows <= 0) {
            continue;
          }
          for (int pw = 0; pw < w.pool_kernel; ++pw) {
            const int cw = ow * w.pool_stride - w.pool_padding + pw * w.pool_dilation;
            const int64_t at = row_place + sw * sizes.tile_w.step + pw * sizes.tile_w.spread;
            if (!inside(cw, w.conv) || at < 0 || at >= kPlaces) continue;
            const T value = products[r * Tile::kPitch + static_cast<int>(at)];
            // The first maximum wins; NaN beats everything, a later NaN too, as in torch.
            if (value > best[j] || value != value || winner[j] < 0) {
              best[j] = value;
              winner[j] = ph * w.pool_kernel + pw;
            }
          }
        }
      }
    }

    FUSEDCNN_UNROLL
    for (int j = 0; j < kStates; ++j) {
      const int state = j * kForwardThreads + thread;
      const int slot = state % Tile::kOutputs, r = state / Tile::kOutputs;
      const int sh = slot / sizes.tile_w.outputs;
      const int oh = first_h + sh, ow = first_w + slot % sizes.tile_w.outputs;
      if (sh >= sizes.tile_h.outputs || oh >= h.out || ow >= w.out ||
          first_channel + r >= sizes.out_channels) {
        continue;
      }
      const int64_t at = n * args.output_strides.n + (channel_base + r) * args.output_strides.c +
                         oh * args.output_strides.h + ow * args.output_strides.w;
      const bool off = best[j] <= 0;  // false for NaN, which ReLU lets through
      // ReLU comes before the pool, so only a window without elements keeps its -infinity.
      const T value = off && winner[j] >= 0 ? T(0) : best[j];
      static_cast<S*>(args.output)[at] = narrow<S>(value);
      if (!args.code) continue;
      const int code = off ? -1 : winner[j];
      if (args.wide_code) {
        static_cast<int32_t*>(args.code)[at] = code;
      } else {
        static_cast<uint8_t*>(args.code)[at] = static_cast<uint8_t>(code);
      }
    }
  }
}

// ---- host ---------------------------------------------------------------------------------------

// The tile axis for `outputs` pooled outputs a tile.
inline TileAxis tile_axis(const AxisSizes& axis, int outputs) {
  TileAxis tile{};
  tile.outputs = outputs;
  tile.tiles = (axis.out + outputs - 1) / outputs;
  const int window = (axis.pool_kernel - 1) * axis.pool_dilation + 1;
  tile.compact = axis.pool_stride >= window;
  tile.step = tile.compact ? axis.pool_kernel : axis.pool_stride;
  tile.spread = tile.compact ? 1 : axis.pool_dilation;
  tile.rows = (outputs - 1) * tile.step + (axis.pool_kernel - 1) * tile.spread + 1;
  return tile;
}

// The tile shape that computes the fewest convolution outputs in all.
template <typename Tile>
void choose_tile(ForwardSizes& sizes) {
  double least = -1;
  for (int th = 1; th <= Tile::kOutputs; th *= 2) {
    for (int tw = 1; th * tw <= Tile::kOutputs; tw *= 2) {
      // Not more than the axis has; powers of two otherwise.
      const TileAxis h = tile_axis(sizes.h, th < sizes.h.out ? th : sizes.h.out);
      const TileAxis w = tile_axis(sizes.w, tw < sizes.w.out ? tw : sizes.w.out);
      const double rounds = (static_cast<int64_t>(h.rows) * w.rows + Tile::kPlaces - 1) /
                            static_cast<double>(Tile::kPlaces);
      const double cost = static_cast<double>(static_cast<int64_t>(rounds)) * h.tiles *
                          static_cast<double>(w.tiles);
      // Among equals the wider, whose rows lie in one run of memory.
      if (least < 0 || cost < least || (cost == least && w.outputs >= sizes.tile_w.outputs)) {
        least = cost;
        sizes.tile_h = h;
        sizes.tile_w = w;
      }
      if (tw >= sizes.w.out) break;
    }
    if (th >= sizes.h.out) break;
  }
}

template <typename S, typename Tile>
void launch_forward_general(const ForwardArgs& args, ForwardSizes sizes,
                            const Execution& execution) {
  choose_tile<Tile>(sizes);
  sizes.channel_blocks = (sizes.out_channels + Tile::kChannels - 1) / Tile::kChannels;
  sizes.tasks = args.geometry.batch * sizes.groups * sizes.channel_blocks * sizes.tile_h.tiles *
                sizes.tile_w.tiles;
  launch("forward_general", forward_general_kernel<S, Tile>, blocks_for(sizes.tasks),
         kForwardThreads, Tile::template shared<Accumulator<S>>(), execution, args, sizes);
}

template <typename S>
void forward_general_typed(const ForwardArgs& args, const Execution& execution) {
  const Geometry& g = args.geometry;
  ForwardSizes sizes{};
  sizes.h = sizes_of(g.h);
  sizes.w = sizes_of(g.w);
  sizes.channels = static_cast<int>(g.in_channels_per_group());
  sizes.out_channels = static_cast<int>(g.out_channels_per_group());
  sizes.groups = static_cast<int>(g.groups);
  // Rows of output channels that nobody wants are computed all the same: few channels, few rows.
  if (sizes.out_channels <= 4) {
    launch_forward_general<S, ForwardTile<4, 256, 4, 1>>(args, sizes, execution);
  } else if (sizes.out_channels <= 16) {
    launch_forward_general<S, ForwardTile<16, 128, 4, 2>>(args, sizes, execution);
  } else {
    launch_forward_general<S, ForwardTile<32, 128, 4, 4>>(args, sizes, execution);
  }
}

}  // namespace

const char* why_not_general(const Problem& problem, const Target&) {
  const Geometry& g = problem.geometry;
  // Coordinates along an axis are 32-bit, and so are places among an output channel's weights;
  // offsets and counts of elements are not. No coordinate is more than four extents away from 0.
  constexpr int64_t kLargest = int64_t{1} << 28;
  if (g.in_channels_per_group() * g.taps() >= kLargest) {
    return "an output channel has 2^28 weights or more";
  }
  if (g.outputs() >= kLargest) return "a channel has 2^28 pooled outputs or more";
  for (const Axis* axis : {&g.h, &g.w}) {
    for (const int64_t extent :
         {axis->padded(), axis->stride, axis->dilation, axis->pool_stride, axis->pool_dilation}) {
      if (extent >= kLargest) return "an axis reaches over 2^28 elements or more, padding included";
    }
  }
  return nullptr;
}

void forward_general(const ForwardArgs& args, const Execution& execution) {
  for_storage(args.type,
              [&](auto storage) { forward_general_typed<decltype(storage)>(args, execution); });
}

}  // namespace fusedcnn::cuda
