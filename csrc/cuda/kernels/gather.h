// The gradient of a plane around the stock convolution: a pooled output's gradient goes to its
// window's winner, and an element is given what all the windows that hold it send there.
//
// A thread owns elements of the plane, of neighbouring pixels or channels (library.h), and gathers:
// it goes through the windows that hold a pixel and asks each code whether this is the winner. No
// element is written twice, and a sum over overlapping windows has their order, in float, and is
// rounded once.
#pragma once

#include "cuda/device.h"
#include "cuda/kernel.h"
#include "cuda/kernels/library.h"
#include "cuda/kernels/plane_order.h"
#include "cuda/kernels/sizes.h"
#include "cuda/launch.h"

namespace fusedcnn::cuda {
namespace {

struct PlaneSizes {
  PoolAxis h, w;
  PlaneSteps plane;
  Tiles tiles;  // of the convolution's outputs
};

// The windows that may hold a convolution output, along one axis: first..last, of the first of
// which it lies `distance` places behind the begin.
struct Holders {
  int first, last, distance;
};
FUSEDCNN_DEVICE Holders holders_of(const PoolAxis& axis, int at) {
  const int top = at + axis.padding, bottom = top - axis.window;
  // The first window that ends behind it, and the last that begins before it.
  const int first = bottom < 0 ? 0 : divide(bottom, axis.by_stride).quotient + 1;
  const int last = divide(top, axis.by_stride).quotient;
  return {first, last < axis.out ? last : axis.out - 1, top - first * axis.stride};
}

// body(offset of the gradient, offset of the code, number of the element) for every window that
// holds the pixel, from the image's first element.
template <typename Body>
FUSEDCNN_DEVICE void for_windows(const BackwardArgs& args, const PlaneSizes& sizes, Pixel pixel,
                                 const Body& body) {
  const Strides &grads = args.grad_output_strides, &codes = args.code_strides;
  const Holders rows = holders_of(sizes.h, pixel.row), columns = holders_of(sizes.w, pixel.column);
  for (int oh = rows.first, y = rows.distance; oh <= rows.last; ++oh, y -= sizes.h.stride) {
    const Division row = divide(y, sizes.h.by_dilation);
    if (row.remainder != 0) continue;
    for (int ow = columns.first, x = columns.distance; ow <= columns.last;
         ++ow, x -= sizes.w.stride) {
      const Division column = divide(x, sizes.w.by_dilation);
      if (column.remainder != 0) continue;
      body(oh * grads.h + ow * grads.w, oh * codes.h + ow * codes.w,
           row.quotient * sizes.w.kernel + column.quotient);
    }
  }
}

// Whether the stored code names this element; none has the number of "off".
template <typename C>
FUSEDCNN_DEVICE bool names(C code, int element) {
  return static_cast<int>(code) == element;
}

// A tile's first element; its pixels follow each other.
template <typename S>
FUSEDCNN_DEVICE S* tile_in_plane(const BackwardArgs& args, const PlaneSizes& sizes,
                                 const Tile& tile) {
  return static_cast<S*>(args.plane) + tile.n * sizes.plane.image +
         tile.channel * sizes.plane.channel + tile.pixel * sizes.plane.column;
}

// What becomes of the sums of V neighbouring channels: with this, the plane's elements.
struct AsTheyAre {
  template <int V, typename S>
  FUSEDCNN_DEVICE Pack<V, S> operator()(const Pack<V, S>& sums, const S*, int64_t) const {
    return sums;
  }
};

// Of a channels_last plane, gradients and codes. finish(sums, their elements in the plane, the
// first one's channel): see AsTheyAre.
template <typename S, typename C, int V, typename Finish>
FUSEDCNN_KERNEL_RESIDENT(kLibraryThreads, 4)
gather_channels_kernel(BackwardArgs args, PlaneSizes sizes, Finish finish) {
  using T = Accumulator<S>;
  const Tiles& tiles = sizes.tiles;
  const int lane = thread_index() & ((1 << tiles.channel_bits) - 1);
  for (int64_t task = block_index(); task < tiles.tasks; task += grid_blocks()) {
    const Tile tile = tile_of<V>(tiles, task);
    if (lane * V >= tile.channels) continue;
    const int64_t channel = tile.channel + lane * V;
    const S* const grads =
        static_cast<const S*>(args.grad_output) + tile.n * args.grad_output_strides.n + channel;
    const C* const codes =
        static_cast<const C*>(args.code) + tile.n * args.code_strides.n + channel;
    S* const plane = tile_in_plane<S>(args, sizes, tile) + lane * V;
    for (int p = thread_index() >> tiles.channel_bits; p < tile.pixels;
         p += kLibraryThreads >> tiles.channel_bits) {
      const Pixel pixel = pixel_of(tiles, tile, p);
      T sum[V];
      FUSEDCNN_UNROLL
      for (int v = 0; v < V; ++v) sum[v] = 0;
      for_windows(args, sizes, pixel, [&](int64_t grad_at, int64_t code_at, int element) {
        const Pack<V, S> grad = load_pack<V>(grads + grad_at);
        const Pack<V, C> code = load_pack<V>(codes + code_at);
        FUSEDCNN_UNROLL
        for (int v = 0; v < V; ++v) {
          if (names(code.values[v], element)) sum[v] += widen(grad.values[v]);
        }
      });
      Pack<V, S> total;
      FUSEDCNN_UNROLL
      for (int v = 0; v < V; ++v) total.values[v] = narrow<S>(sum[v]);
      S* const to = plane + p * sizes.plane.column;
      // A register less over the loop, which sm_75 would spill.
      const int fresh_lane = fresh_thread_index() & ((1 << tiles.channel_bits) - 1);
      store_pack(to, finish(total, to, tile.channel + fresh_lane * V));
    }
  }
}

// Channels of a pixel that its thread goes through at once: all that it has of a tile.
constexpr int kChannelsAtOnce = 16;

// Of a plane of channels; gradients and codes of any layout.
template <typename S, typename C, typename Finish>
FUSEDCNN_KERNEL_RESIDENT(kLibraryThreads, 2)
gather_pixels_kernel(BackwardArgs args, PlaneSizes sizes, Finish finish) {
  using T = Accumulator<S>;
  const Tiles& tiles = sizes.tiles;
  const int p = thread_index() & ((1 << tiles.pixel_bits) - 1);
  const int first = thread_index() >> tiles.pixel_bits;
  const int step = kLibraryThreads >> tiles.pixel_bits;
  const int64_t grad_step = step * args.grad_output_strides.c;
  const int64_t code_step = step * args.code_strides.c;
  for (int64_t task = block_index(); task < tiles.tasks; task += grid_blocks()) {
    const Tile tile = tile_of<1>(tiles, task);
    const int channels = p < tile.pixels ? tile.channels : 0;
    if (first >= channels) continue;
    const Pixel pixel = pixel_of(tiles, tile, p);
    const S* const grads = static_cast<const S*>(args.grad_output) +
                           tile.n * args.grad_output_strides.n +
                           (tile.channel + first) * args.grad_output_strides.c;
    const C* const codes = static_cast<const C*>(args.code) + tile.n * args.code_strides.n +
                           (tile.channel + first) * args.code_strides.c;
    S* const plane = tile_in_plane<S>(args, sizes, tile) + p * sizes.plane.column;
    T sum[kChannelsAtOnce];
    FUSEDCNN_UNROLL
    for (int i = 0; i < kChannelsAtOnce; ++i) sum[i] = 0;
    for_windows(args, sizes, pixel, [&](int64_t grad_at, int64_t code_at, int element) {
      const C* code = codes + code_at;
      const S* grad = grads + grad_at;
      FUSEDCNN_UNROLL
      for (int i = 0; i < kChannelsAtOnce; ++i, code += code_step, grad += grad_step) {
        if (first + i * step >= channels) continue;
        const bool wins = names(load_constant(code), element);
        const T value = widen(load_constant(grad));
        if (wins) sum[i] += value;
      }
    });
    FUSEDCNN_UNROLL
    for (int i = 0; i < kChannelsAtOnce; ++i) {
      const int c = first + i * step;
      if (c >= channels) continue;
      S* const to = plane + c * sizes.plane.channel;
      const Pack<1, S> total{{narrow<S>(sum[i])}};
      store_pack(to, finish(total, to, tile.channel + c));
    }
  }
}

// ---- host ---------------------------------------------------------------------------------------

Tiles plane_tiles(const Geometry& g, int vector, int channel_bits, int bits) {
  return tiles_of(g.batch, g.out_channels, g.h.conv, g.w.conv, vector, channel_bits, bits);
}

template <typename S, typename C, int V, typename Finish>
void launch_gather_channels(const char* name, const BackwardArgs& args, PlaneSizes sizes,
                            const Finish& finish, const Execution& execution) {
  // Eight elements or four vectors a thread.
  sizes.tiles = plane_tiles(args.geometry, V, kChannelBits, kThreadBits + (V == 1 ? 3 : 2));
  launch(name, gather_channels_kernel<S, C, V, Finish>, blocks_for(sizes.tiles.tasks),
         kLibraryThreads, 0, execution, args, sizes, finish);
}

// Overwrites args.plane with what `finish` makes of the sums. args: as in_plane_order has them.
template <typename S, typename C, typename Finish>
void gather(const char* name, const BackwardArgs& args, const Finish& finish,
            const Execution& execution) {
  const Geometry& g = args.geometry;
  PlaneSizes sizes{pool_axis(g.h), pool_axis(g.w), plane_steps(g, args.plane_channels_last), {}};
  const Strides &grads = args.grad_output_strides, &codes = args.code_strides;
  if (!args.plane_channels_last) {
    sizes.tiles = plane_tiles(g, 1, kChannelBits, kThreadBits + bits_for(kChannelsAtOnce, 30));
    launch(name, gather_pixels_kernel<S, C, Finish>, blocks_for(sizes.tiles.tasks), kLibraryThreads,
           0, execution, args, sizes, finish);
    return;
  }
  if constexpr (sizeof(C) == 1) {
    constexpr int64_t kSize = sizeof(S), kV = kVector<S>;
    if (g.out_channels % kV == 0 && aligned(args.plane, kSize, 16, {}) &&
        aligned(args.grad_output, kSize, 16, {grads.n, grads.h, grads.w}) &&
        aligned(args.code, 1, kV, {codes.n, codes.h, codes.w})) {
      return launch_gather_channels<S, C, kV>(name, args, sizes, finish, execution);
    }
  }
  launch_gather_channels<S, C, 1>(name, args, sizes, finish, execution);
}

}  // namespace
}  // namespace fusedcnn::cuda
