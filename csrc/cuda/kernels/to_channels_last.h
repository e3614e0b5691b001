// Pooled gradients and codes of any layout, in the order of a channels_last plane, for the passes
// around the stock convolution: a tile crosses over in shared memory.
//
// A pooled output of a half type is 3 bytes in and 3 out; the plane's gradient that is made of it
// under a window of 2x2 is 8.
#pragma once

#include "cuda/kernels/library.h"

namespace fusedcnn::cuda {
namespace {

// Words of each of a thread's tiles.
constexpr int kWordsAtOnce = 8;

// from: [N, channels, rows, columns] of any strides; to: [N, rows, columns, channels] without gaps.
template <typename Word>
FUSEDCNN_KERNEL(kLibraryThreads)
to_channels_last_kernel(const Word* from, Strides strides, Word* to, Tiles tiles) {
  const int pitch = (1 << tiles.channel_bits) + 1;
  SharedMemory memory;
  const Shared<Word> words = memory.array<Word>(pitch << tiles.pixel_bits);
  const int p = thread_index() & ((1 << tiles.pixel_bits) - 1);
  const int lane = thread_index() & ((1 << tiles.channel_bits) - 1);
  const int first = thread_index() >> tiles.pixel_bits;
  const int step = kLibraryThreads >> tiles.pixel_bits;
  for (int64_t task = block_index(); task < tiles.tasks; task += grid_blocks()) {
    const Tile tile = tile_of<1>(tiles, task);
    const int channels = p < tile.pixels ? tile.channels : 0;
    const Word* const pixel = from + offset_of(strides, tile.n, pixel_of(tiles, tile, p)) +
                              (tile.channel + first) * strides.c;
    Word loaded[kWordsAtOnce] = {};
    FUSEDCNN_UNROLL
    for (int i = 0; i < kWordsAtOnce; ++i) {
      if (first + i * step < channels) loaded[i] = load_constant(pixel + i * step * strides.c);
    }
    FUSEDCNN_UNROLL
    for (int i = 0; i < kWordsAtOnce; ++i) {
      if (first + i * step < channels) words[p * pitch + first + i * step] = loaded[i];
    }
    sync_threads();
    Word* const out =
        to + (tile.n * tiles.pixels + tile.pixel) * tiles.channels + tile.channel + lane;
    for (int q = thread_index() >> tiles.channel_bits; lane < tile.channels && q < tile.pixels;
         q += kLibraryThreads >> tiles.channel_bits) {
      out[q * tiles.channels] = words[q * pitch + lane];
    }
    sync_threads();  // the next tile overwrites this one
  }
}

// ---- host ---------------------------------------------------------------------------------------

inline int64_t pooled_bytes(const Geometry& g, int64_t element) {
  const int64_t bytes = g.batch * g.out_channels * g.h.out * g.w.out * element;
  return (bytes + 255) / 256 * 256;
}
// Bytes that `in_plane_order` may work in.
inline int64_t plane_order_bytes(const Geometry& g, DataType type, bool wide_code) {
  return pooled_bytes(g, element_size(type)) + pooled_bytes(g, wide_code ? 4 : 1);
}

template <typename Word>
void to_channels_last(const Geometry& g, const void* from, const Strides& strides, void* to,
                      const Execution& execution) {
  const Tiles tiles = tiles_of(g.batch, g.out_channels, g.h.out, g.w.out, 1, kChannelBits,
                               kThreadBits + bits_for(kWordsAtOnce, 30));
  const int64_t crossing = int64_t{(1 << tiles.channel_bits) + 1} << tiles.pixel_bits;
  launch("to_channels_last", to_channels_last_kernel<Word>, blocks_for(tiles.tasks),
         kLibraryThreads, shared_bytes<Word>(crossing), execution, static_cast<const Word*>(from),
         strides, static_cast<Word*>(to), tiles);
}

// The arguments with the gradients of pooled outputs and their codes in the plane's order: those
// that are not are copied into the workspace, in a launch for each. Planes of channels take any.
template <typename S, typename C>
BackwardArgs in_plane_order(const BackwardArgs& args, const Execution& execution) {
  BackwardArgs result = args;
  if (!args.plane_channels_last) return result;
  const Geometry& g = args.geometry;
  const int64_t row = g.w.out * g.out_channels;
  const Strides dense{g.h.out * row, 1, row, g.out_channels};
  char* const memory = static_cast<char*>(execution.workspace);
  if (args.grad_output_strides.c != 1) {
    to_channels_last<S>(g, args.grad_output, args.grad_output_strides, memory, execution);
    result.grad_output = memory;
    result.grad_output_strides = dense;
  }
  if (args.code_strides.c != 1) {
    char* const codes = memory + pooled_bytes(g, sizeof(S));
    to_channels_last<C>(g, args.code, args.code_strides, codes, execution);
    result.code = codes;
    result.code_strides = dense;
  }
  return result;
}

}  // namespace
}  // namespace fusedcnn::cuda
