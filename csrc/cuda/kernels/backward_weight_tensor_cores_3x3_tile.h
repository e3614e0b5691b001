// The operands of the products in backward_weight_tensor_cores_3x3.cu: a tile's pixels, in shared
// memory, and the gradients of a lane's windows, in its registers.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/kernels/backward_weight_tiles.h"
#include "cuda/kernels/mma.h"

namespace fusedcnn::cuda {
namespace {

constexpr int kMmaThreads = 128;
constexpr int kNTile = 8;  // input channels of a tile of N

// What pixels are in shared memory.
template <typename S>
using Pixel = std::conditional_t<sizeof(S) == 4, uint32_t, S>;
// Places left free after every eight pixels.
template <typename S>
constexpr int kSkew = sizeof(S) == 4 ? 1 : 2;

struct WeightMmaSizes : WeightTileSizes {
  int tile_w_bits;           // tile_w is a power of two
  int cover_h, cover_w;      // convolution outputs that lie in windows
  int rows, pitch, pairs;    // of pixels of a tile: rows, places in a row, pairs in a row
  int step_line, step_pair;  // from a thread's pair to its next
  int plane;                 // elements of a tile of channels in shared memory
  int quads, quad_h;         // of a tile; rows of windows of one
  int slices;                // of input channels
  int m_warps;      // warps of a block with different output channels; the others share these
  int m_warp_bits;  // m_warps is a power of two
  int shares;       // warps that share output channels: each takes quads of its own
  int64_t value_step, code_step;  // elements from a quad to the next, of gradients and of codes
  bool input_pairs;               // two pixels of a row can be read at once
  bool input_channels;            // kNTile channels of a pixel can
  bool window_fours;              // gradients of four windows, and their codes, can
};

// Four neighbouring windows of a row, in output channels g and g + 8.
template <typename S>
struct Gradients {
  uint32_t values[2][sizeof(S)];  // as they lie in memory
  uint32_t codes[2];              // a byte each; off where there is no window
};

template <typename S>
FUSEDCNN_DEVICE Gradients<S> fetch_gradients(const BackwardArgs& args, const WeightMmaSizes& sizes,
                                             const S* value, const uint8_t* code, int oh, int ow,
                                             int oc) {
  Gradients<S> got;
  FUSEDCNN_UNROLL
  for (int row = 0; row < 2; ++row) {
    constexpr uint8_t kNone = kOff<uint8_t>;
    Pack<4, S> values{};
    Pack<4, uint8_t> codes{{kNone, kNone, kNone, kNone}};
    const int channel = oc + 8 * row;
    if (channel < sizes.out_channels && oh < sizes.out_h && ow < sizes.out_w) {
      const Strides &at = args.code_strides, &from = args.grad_output_strides;
      if (sizes.window_fours) {
        values = load_pack<4, S>(value + 8 * row * from.c);
        codes = load_pack<4, uint8_t>(code + 8 * row * at.c);
      } else {
        FUSEDCNN_UNROLL
        for (int j = 0; j < 4; ++j) {
          if (ow + j >= sizes.out_w) continue;
          values.values[j] = load_constant(value + 8 * row * from.c + j * from.w);
          codes.values[j] = load_constant(code + 8 * row * at.c + j * at.w);
        }
      }
    }
    std::memcpy(got.values[row], values.values, sizeof values.values);
    std::memcpy(&got.codes[row], codes.values, sizeof codes.values);
  }
  return got;
}

template <typename S>
FUSEDCNN_DEVICE S gradient_of(const Gradients<S>& from, int row, int window) {
  S value;
  if constexpr (sizeof(S) == 4) {
    std::memcpy(&value, &from.values[row][window], sizeof value);
  } else {
    value.bits = static_cast<uint16_t>(from.values[row][window / 2] >> window % 2 * 16);
  }
  return value;
}

// A thread's walk over the pairs of pixels of a tile, row by row, one tile of channels after the
// other; without divisions on the way.
struct PairWalk {
  int line, pair;  // of all channels' rows; of a row

  FUSEDCNN_DEVICE explicit PairWalk(const WeightMmaSizes& sizes)
      : line(thread_index() / sizes.pairs), pair(thread_index() % sizes.pairs) {}
  FUSEDCNN_DEVICE void advance(const WeightMmaSizes& sizes) {
    line += sizes.step_line;
    pair += sizes.step_pair;
    if (pair >= sizes.pairs) pair -= sizes.pairs, ++line;
  }
};

// Two neighbouring pixels of a row, 16 bytes of channels each, or of those the first Loaded.
template <typename S, int Loaded>
struct PixelPair {
  static constexpr int kPack = 16 / sizeof(S), kChannels = Loaded < kPack ? Loaded : kPack;
  Pack<2, S> channels[kChannels];
};

// Reads input channels c0, c0 + 1, ... of pixels (h, w) and (h, w + 1); zeros outside the image and
// behind the last channel.
template <typename S, int Loaded>
FUSEDCNN_DEVICE PixelPair<S, Loaded> load_pair(const BackwardArgs& args,
                                               const WeightMmaSizes& sizes, int n, int c0, int h,
                                               int w) {
  constexpr int kChannels = PixelPair<S, Loaded>::kChannels;
  PixelPair<S, Loaded> got{};
  if (!inside(h, sizes.in_h)) return got;
  const Strides from = args.input_strides;
  const S* const row = static_cast<const S*>(args.input) + n * from.n + c0 * from.c + h * from.h;
  if (sizes.input_pairs) {
    if (!inside(w, sizes.in_w)) return got;
    FUSEDCNN_UNROLL
    for (int c = 0; c < kChannels; ++c) {
      if (c0 + c < sizes.channels) got.channels[c] = load_pack<2, S>(row + c * from.c + w);
    }
    return got;
  }
  FUSEDCNN_UNROLL
  for (int i = 0; i < 2; ++i) {
    if (!inside(w + i, sizes.in_w) || c0 >= sizes.channels) continue;
    const S* const pixel = row + (w + i) * from.w;
    if (sizes.input_channels) {
      const Pack<kChannels, S> pack = load_pack<kChannels, S>(pixel);
      FUSEDCNN_UNROLL
      for (int c = 0; c < kChannels; ++c) got.channels[c].values[i] = pack.values[c];
    } else {
      FUSEDCNN_UNROLL
      for (int c = 0; c < kChannels; ++c) {
        if (c0 + c < sizes.channels) {
          got.channels[c].values[i] = load_constant(pixel + c * from.c);
        }
      }
    }
  }
  return got;
}

// All channels of the pair's first or second pixel, 16 bytes; zeros for those that are not loaded.
template <typename S, int Loaded>
FUSEDCNN_DEVICE Pack<16 / sizeof(S), Pixel<S>> pixel_of(const PixelPair<S, Loaded>& pair, int i) {
  Pack<16 / sizeof(S), Pixel<S>> pixel{};
  FUSEDCNN_UNROLL
  for (int c = 0; c < PixelPair<S, Loaded>::kChannels; ++c) {
    const S value = pair.channels[c].values[i];
    if constexpr (sizeof(S) == 4) {
      pixel.values[c] = to_tf32(value);
    } else {
      pixel.values[c] = value;
    }
  }
  return pixel;
}

// The first column of a tile's pair. Pairs begin at odd columns: with a padding of 1, at even ones
// of the image.
FUSEDCNN_DEVICE int first_column(const PairWalk& walk) { return 2 * walk.pair - 1; }

// Writes the pixels of input channels from `first` on whose upper left one is (h0, w0), [tile of
// channels][row][place][channel].
template <typename S, int CTiles, int Loaded>
FUSEDCNN_DEVICE void stage_pixels(const BackwardArgs& args, const WeightMmaSizes& sizes,
                                  PairWalk walk, int n, int first, int h0, int w0,
                                  Shared<Pixel<S>> to) {
  constexpr int kChannels = PixelPair<S, Loaded>::kChannels, kParts = Loaded / kChannels;
  // Pairs whose loads are under way together, of up to five that a tile has for a thread: as
  // many as there are registers for.
  constexpr int kAtOnce = Loaded < kNTile ? 3 : sizeof(S) == 4 ? CTiles : 2;
  const int lines = CTiles * sizes.rows;
  FUSEDCNN_NO_UNROLL
  while (walk.line < lines) {
    PairWalk stored = walk;
    PixelPair<S, Loaded> pairs[kAtOnce][kParts];
    FUSEDCNN_UNROLL
    for (int i = 0; i < kAtOnce; ++i, walk.advance(sizes)) {
      const bool second = CTiles > 1 && walk.line >= sizes.rows;
      const int h = h0 + walk.line - (second ? sizes.rows : 0);
      FUSEDCNN_UNROLL
      for (int part = 0; part < kParts; ++part) {
        const int c = first + (second ? kNTile : 0) + part * kChannels;
        pairs[i][part] = {};
        if (walk.line < lines) {
          pairs[i][part] = load_pair<S, Loaded>(args, sizes, n, c, h, w0 + first_column(walk));
        }
      }
    }
    FUSEDCNN_UNROLL
    for (int i = 0; i < kAtOnce; ++i, stored.advance(sizes)) {
      FUSEDCNN_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int x = first_column(stored) + j;
        if (stored.line >= lines || !inside(x, 2 * sizes.tile_w + 2)) continue;
        const int place = stored.line * sizes.pitch + x + x / 8 * kSkew<S>;
        FUSEDCNN_UNROLL
        for (int part = 0; part < kParts; ++part) {
          store_pack(to + (place * kNTile + part * kChannels), pixel_of(pairs[i][part], j));
        }
      }
    }
  }
}

}  // namespace
}  // namespace fusedcnn::cuda
