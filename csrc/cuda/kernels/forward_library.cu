// The forward around the stock convolution: bias, ReLU, pool and code of a convolution's output.
//
// A thread owns pooled outputs of neighbouring pixels or channels (library.h), and meets their
// windows' elements four at a time, so that as many loads are under way. Elements come in the order
// in which a window counts them, so that the first maximum is met first.
//
// Of a window of 2x2 in a half type it moves 8 bytes in and 3 out, 3.7 ps at 3 TB/s, in which 132
// multiprocessors at 1.75 GHz issue 108 instructions of a lane. sm_90's code has 540 for a vector
// of 8 outputs, 240 for an output by itself, and some 150 where a thread finds its window once for
// several channels; of a float32 window of 2x2, in planes of channels, memory leaves time for 207.

#include <initializer_list>

#include "cuda/kernels/library.h"

namespace fusedcnn::cuda {
namespace {

// V channels' pooled value and winner, -1 where ReLU is off.
template <typename T, int V>
struct PooledVector {
  T value[V];
  int code[V];
};

// plane: the image's, at the first of the channels.
template <typename S, int V>
FUSEDCNN_DEVICE PooledVector<Accumulator<S>, V> pool_vector(const PoolSizes& sizes, const S* plane,
                                                            const Window& window,
                                                            const Accumulator<S> (&bias)[V]) {
  using T = Accumulator<S>;
  constexpr int kAtOnce = 4;
  const int64_t column_step = dilation(sizes.w) * sizes.plane.column;
  const int64_t row_step = dilation(sizes.h) * sizes.plane.row - (window.columns - 1) * column_step;
  const int count = window.rows * window.columns;
  PooledVector<T, V> best;
  FUSEDCNN_UNROLL
  for (int v = 0; v < V; ++v) best.value[v] = -infinity<T>(), best.code[v] = -1;
  const S* from = plane + window.offset;
  int number = window.first, column = 0;
  for (int done = 0; done < count; done += kAtOnce) {
    Pack<V, S> elements[kAtOnce];
    int numbers[kAtOnce];
    FUSEDCNN_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      elements[i] = {};
      if (done + i < count) elements[i] = load_pack<V>(from);
      numbers[i] = number;
      const bool last = ++column == window.columns;
      if (last) column = 0;
      number += last ? sizes.w.kernel - window.columns + 1 : 1;
      from += last ? row_step : column_step;
    }
    FUSEDCNN_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (done + i >= count) continue;
      FUSEDCNN_UNROLL
      for (int v = 0; v < V; ++v) {
        const T value = widen(elements[i].values[v]) + bias[v];
        // NaN beats everything, a later NaN too, as in torch.
        if (value > best.value[v] || value != value) {
          best.value[v] = value, best.code[v] = numbers[i];
        }
      }
    }
  }
  FUSEDCNN_UNROLL
  for (int v = 0; v < V; ++v) {
    const bool off = best.value[v] <= 0;  // false for NaN, which ReLU lets through
    // ReLU comes before the pool, so only a window without elements keeps its -infinity.
    if (off && count > 0) best.value[v] = 0;
    if (off) best.code[v] = -1;
  }
  return best;
}

template <typename S>
FUSEDCNN_DEVICE Accumulator<S> load_bias(const ForwardArgs& args, int64_t channel) {
  if (!args.bias) return 0;
  return widen(load_constant(static_cast<const S*>(args.bias) + channel * args.bias_stride));
}

// Of a channels_last plane. `Crosses`: outputs and codes lie in planes of channels, without gaps.
template <typename S, typename C, int V, bool Crosses>
FUSEDCNN_KERNEL(kLibraryThreads)
forward_library_channels_kernel(ForwardArgs args, PoolSizes sizes) {
  using T = Accumulator<S>;
  const Tiles& tiles = sizes.tiles;
  const int tile_channels = V << tiles.channel_bits, pitch = (1 << tiles.pixel_bits) + 1;
  SharedMemory memory;
  const Shared<S> values = memory.array<S>(Crosses ? tile_channels * pitch : 0);
  const Shared<C> codes = memory.array<C>(Crosses ? tile_channels * pitch : 0);
  S* const output = static_cast<S*>(args.output);
  C* const code = static_cast<C*>(args.code);
  const Strides& to = args.output_strides;
  // A thread's channels are the same in every pixel.
  const int lane = thread_index() & ((1 << tiles.channel_bits) - 1);

  for (int64_t task = block_index(); task < tiles.tasks; task += grid_blocks()) {
    const Tile tile = tile_of<V>(tiles, task);
    const bool real = lane * V < tile.channels;
    const int64_t channel = tile.channel + lane * V;
    T bias[V];
    FUSEDCNN_UNROLL
    for (int v = 0; v < V; ++v) bias[v] = real ? load_bias<S>(args, channel + v) : T(0);
    const S* const plane = static_cast<const S*>(args.plane) + tile.n * sizes.plane.image + channel;
    for (int p = thread_index() >> tiles.channel_bits; real && p < tile.pixels;
         p += kLibraryThreads >> tiles.channel_bits) {
      const Pixel pixel = pixel_of(tiles, tile, p);
      const PooledVector<T, V> best =
          pool_vector<S, V>(sizes, plane, window_of(sizes, pixel), bias);
      Pack<V, S> value;
      Pack<V, C> winner;
      FUSEDCNN_UNROLL
      for (int v = 0; v < V; ++v) {
        value.values[v] = narrow<S>(best.value[v]);
        winner.values[v] = static_cast<C>(best.code[v]);
      }
      if constexpr (Crosses) {
        FUSEDCNN_UNROLL
        for (int v = 0; v < V; ++v) {
          values[(lane * V + v) * pitch + p] = value.values[v];
          codes[(lane * V + v) * pitch + p] = winner.values[v];
        }
      } else {
        const int64_t at = offset_of(to, tile.n, pixel) + channel;
        store_pack(output + at, value);
        if (code) store_pack(code + at, winner);
      }
    }
    if constexpr (Crosses) {
      sync_threads();
      const int p = thread_index() & ((1 << tiles.pixel_bits) - 1);
      for (int c = thread_index() >> tiles.pixel_bits; p < tile.pixels && c < tile.channels;
           c += kLibraryThreads >> tiles.pixel_bits) {
        const int64_t at = tile.n * to.n + (tile.channel + c) * to.c + tile.pixel + p;
        output[at] = values[c * pitch + p];
        if (code) code[at] = codes[c * pitch + p];
      }
      sync_threads();  // the next tile overwrites this one
    }
  }
}

// Of a plane of channels, and of any other.
template <typename S, typename C>
FUSEDCNN_KERNEL(kLibraryThreads)
forward_library_pixels_kernel(ForwardArgs args, PoolSizes sizes) {
  using T = Accumulator<S>;
  const Tiles& tiles = sizes.tiles;
  const int p = thread_index() & ((1 << tiles.pixel_bits) - 1);
  for (int64_t task = block_index(); task < tiles.tasks; task += grid_blocks()) {
    const Tile tile = tile_of<1>(tiles, task);
    if (p >= tile.pixels) continue;
    const Pixel pixel = pixel_of(tiles, tile, p);
    const Window window = window_of(sizes, pixel);
    const S* const plane = static_cast<const S*>(args.plane) + tile.n * sizes.plane.image;
    const int64_t output = offset_of(args.output_strides, tile.n, pixel);
    for (int c = thread_index() >> tiles.pixel_bits; c < tile.channels;
         c += kLibraryThreads >> tiles.pixel_bits) {
      const int64_t channel = tile.channel + c;
      const T bias[1] = {load_bias<S>(args, channel)};
      const PooledVector<T, 1> best =
          pool_vector<S, 1>(sizes, plane + channel * sizes.plane.channel, window, bias);
      const int64_t at = output + channel * args.output_strides.c;
      static_cast<S*>(args.output)[at] = narrow<S>(best.value[0]);
      if (args.code) static_cast<C*>(args.code)[at] = static_cast<C>(best.code[0]);
    }
  }
}

// ---- host ---------------------------------------------------------------------------------------

template <typename S, typename C, int V>
void launch_forward_channels(const ForwardArgs& args, PoolSizes sizes, const Execution& execution) {
  const Geometry& g = args.geometry;
  const bool crosses = args.output_strides.c != 1;
  // Eight elements a thread, or four vectors where they do not cross over.
  const int vector_bits = bits_for(V, 3);
  const int bits = kThreadBits + (crosses || V == 1 ? 3 - vector_bits : 2);
  sizes.tiles = tiles_of(g.batch, g.out_channels, g.h.out, g.w.out, V,
                         crosses ? kChannelBits - vector_bits : kChannelBits, bits);
  const int64_t blocks = blocks_for(sizes.tiles.tasks);
  if (crosses) {
    const int64_t crossing =
        (int64_t{V} << sizes.tiles.channel_bits) * ((int64_t{1} << sizes.tiles.pixel_bits) + 1);
    launch("forward_library", forward_library_channels_kernel<S, C, V, true>, blocks,
           kLibraryThreads, shared_bytes<S>(crossing) + shared_bytes<C>(crossing), execution, args,
           sizes);
  } else {
    launch("forward_library", forward_library_channels_kernel<S, C, V, false>, blocks,
           kLibraryThreads, 0, execution, args, sizes);
  }
}

template <typename S, typename C>
void forward_library_typed(const ForwardArgs& args, const Execution& execution) {
  const Geometry& g = args.geometry;
  PoolSizes sizes{pool_axis(g.h), pool_axis(g.w), plane_steps(g, args.plane_channels_last), {}};
  const Strides& to = args.output_strides;
  if (!args.plane_channels_last) {
    sizes.tiles =
        tiles_of(g.batch, g.out_channels, g.h.out, g.w.out, 1, kChannelBits - 1, kThreadBits + 3);
    launch("forward_library", forward_library_pixels_kernel<S, C>, blocks_for(sizes.tiles.tasks),
           kLibraryThreads, 0, execution, args, sizes);
    return;
  }
  if constexpr (sizeof(C) == 1) {
    constexpr int64_t kSize = sizeof(S), kV = kVector<S>;
    const bool outputs_aligned =
        to.c != 1 || (aligned(args.output, kSize, 16, {to.n, to.h, to.w}) &&
                      aligned(args.code, 1, kV, {to.n, to.h, to.w}));
    if (g.out_channels % kV == 0 && outputs_aligned && aligned(args.plane, kSize, 16, {})) {
      return launch_forward_channels<S, C, kV>(args, sizes, execution);
    }
  }
  launch_forward_channels<S, C, 1>(args, sizes, execution);
}

}  // namespace

const char* why_not_library(const Problem& problem, const Target&) {
  // Coordinates, and sums of two of them, have 32 bits; offsets and counts have 64.
  for (const Axis* axis : {&problem.geometry.h, &problem.geometry.w}) {
    if (axis->padded() + axis->reach() >= int64_t{1} << 29) {
      return "an axis reaches over 2^29 elements or more, padding included";
    }
  }
  return nullptr;
}

void forward_library(const ForwardArgs& args, const Execution& execution) {
  for_storage(args.type, [&](auto storage) {
    using S = decltype(storage);
    args.wide_code ? forward_library_typed<S, int32_t>(args, execution)
                   : forward_library_typed<S, uint8_t>(args, execution);
  });
}

}  // namespace fusedcnn::cuda
