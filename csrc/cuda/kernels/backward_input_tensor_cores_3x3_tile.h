// The operands of the products in backward_input_tensor_cores_3x3.cu: a tile's gradients and the
// weights, both in shared memory.
#pragma once

#include <cstring>

#include "cuda/kernels/block_3x3.h"
#include "cuda/kernels/mma.h"

namespace fusedcnn::cuda {
namespace {

// 16 x TileW pixels, 8 * NTiles * Split input channels: Split warps share a warp's pixels.
template <int TileW, int NTiles, int Split>
struct InputTile {
  static constexpr int kTileH = 16, kTileW = TileW, kNTiles = NTiles, kSplit = Split;
  static constexpr int kPixelWarps = kTileH * kTileW / 128;
  static constexpr int kThreads = kPixelWarps * Split * kWarp;
  static constexpr int kChannels = 8 * NTiles * Split;
  static constexpr int kPatches = kTileW / 4;  // next to each other
  // Windows that the tile's taps may meet: as many as its pixels have, and a ring around them.
  static constexpr int kWindowsH = kTileH / 2 + 2, kWindowsW = kTileW / 2 + 2;
  static constexpr int kCore = (kWindowsH - 2) * (kWindowsW - 2);
  static constexpr int kRing = kWindowsH * kWindowsW - kCore;
  // What a thread fetches: items are a plane's channels of a window.
  static constexpr int kCoreItems = 4 * kCore / kThreads;
  static constexpr int kRingItems = (4 * kRing + kThreads - 1) / kThreads;
  static_assert(4 * kCore % kThreads == 0);
  // Lanes g of a load reach over 8 patches, lanes t over four planes: 32 banks.
  static constexpr int kPitch = kPatches == 4 ? 24 : 12;
  static constexpr int kPlane = (2 * kWindowsH * kPitch + 31) / 32 * 32 + 9;
  static_assert(kPitch >= 2 * kWindowsW && (kPatches == 4 || kPatches == 2));
  static constexpr int kGradients = 8 * kPlane;  // words
  static constexpr int kTap = Split * kWarp * 2 * NTiles, kSlice = 9 * kTap;

  // Blocks to a multiprocessor: 128 registers of a thread for 32 accumulators, 168 for 64, and some
  // more where a thread fetches most.
  static constexpr int kResident =
      ((NTiles == 1 ? 512 : 384) - (TileW == 8 && Split == 1 ? 128 : 0)) / kThreads;
};

struct InputMmaSizes : MapSizes {
  int tiles_h, tiles_w, batch, channel_blocks;
  int slices;           // of output channels
  int kept_slices;      // of weights in shared memory: all, or one
  bool ring;            // some tile meets windows beyond its own
  bool gradients_last;  // grad_output's and the code's channels are neighbours in memory
  bool gradient_packs;  // and can be loaded as many at once as a plane has
  bool channel_packs;   // a thread's channels can be written at once
  bool pixel_fours;     // four pixels of a row can
  int64_t tasks;        // tiles of all images, for all blocks of channels
};

// A walk over a block's share of the tasks, one after the other: tiles first, so that neighbours'
// rings are in the cache, and blocks of channels last, so that weights are kept.
class InputWalk {
 public:
  FUSEDCNN_DEVICE explicit InputWalk(const InputMmaSizes& sizes) {
    const int64_t share = sizes.tasks / grid_blocks(), more = sizes.tasks % grid_blocks();
    const int64_t block = block_index();
    left_ = static_cast<int>(share + (block < more));  // no memory holds more
    const int64_t first = block * share + (block < more ? block : more);
    const int tiles = sizes.tiles_h * sizes.tiles_w;
    tile_ = static_cast<int>(first % tiles);
    n_ = static_cast<int>(first / tiles % sizes.batch);
    channel_block_ = static_cast<int>(first / tiles / sizes.batch);
  }
  FUSEDCNN_DEVICE bool done() const { return left_ == 0; }
  FUSEDCNN_DEVICE void advance(const InputMmaSizes& sizes) {
    --left_;
    if (++tile_ < sizes.tiles_h * sizes.tiles_w) return;
    tile_ = 0;
    if (++n_ < sizes.batch) return;
    n_ = 0;
    ++channel_block_;
  }
  FUSEDCNN_DEVICE int64_t n() const { return n_; }
  FUSEDCNN_DEVICE int tile_h(const InputMmaSizes& sizes) const { return tile_ / sizes.tiles_w; }
  FUSEDCNN_DEVICE int tile_w(const InputMmaSizes& sizes) const { return tile_ % sizes.tiles_w; }
  FUSEDCNN_DEVICE int channel_block() const { return channel_block_; }

 private:
  int left_, n_, tile_, channel_block_;
};

// Gradients of a window in a plane's output channels, and their codes, a byte each.
template <typename S>
constexpr int kItemChannels = 2 * kPerWord<S>;
struct InputItem {
  uint32_t values[2];
  uint32_t codes;
};

// The item whose first gradient and code these are, of `count` channels that there are.
template <typename S>
FUSEDCNN_DEVICE InputItem load_item(const BackwardArgs& args, const InputMmaSizes& sizes,
                                    const S* gradient, const uint8_t* code, int count) {
  constexpr int kItem = kItemChannels<S>;
  InputItem item{{0, 0}, 0xffffffffu};
  if (count <= 0) return item;
  if (sizes.gradient_packs) {
    const auto values = load_pack<kItem, S>(gradient);
    const auto codes = load_pack<kItem, uint8_t>(code);
    std::memcpy(item.values, values.values, sizeof item.values);
    std::memcpy(&item.codes, codes.values, sizeof codes.values);
    return item;
  }
  S values[kItem]{};
  uint32_t codes = 0xffffffffu;
  FUSEDCNN_UNROLL
  for (int i = 0; i < kItem; ++i) {
    if (i >= count) continue;
    values[i] = load_constant(gradient + i * args.grad_output_strides.c);
    const uint32_t one = load_constant(code + i * args.code_strides.c);
    codes ^= (one ^ 0xffu) << 8 * i;
  }
  std::memcpy(item.values, values, sizeof item.values);
  item.codes = codes;
  return item;
}

// Calls body(index, plane, row, col) for this thread's items: windows of the tile itself, or of the
// ring around it, and planes `plane` and `plane` + 4 of words.
template <typename Tile, typename Body>
FUSEDCNN_DEVICE void for_core_items(const InputMmaSizes& sizes, const Body& body) {
  // Neighbouring lanes are neighbours in memory: planes of a window, or windows of a plane. A
  // thread's items are then the same number of rows or planes apart.
  constexpr int kCols = Tile::kWindowsW - 2;
  static_assert(Tile::kThreads % (4 * kCols) == 0 && Tile::kThreads % Tile::kCore == 0);
  const bool last = sizes.gradients_last;
  const int plane = last ? thread_index() % 4 : thread_index() / Tile::kCore;
  const int window = last ? thread_index() / 4 : thread_index() % Tile::kCore;
  const int planes = last ? 0 : Tile::kThreads / Tile::kCore;
  const int rows = last ? Tile::kThreads / 4 / kCols : 0;
  FUSEDCNN_UNROLL
  for (int k = 0; k < Tile::kCoreItems; ++k) {
    body(k, plane + k * planes, 1 + window / kCols + k * rows, 1 + window % kCols);
  }
}
template <typename Tile, typename Body>
FUSEDCNN_DEVICE void for_ring_items(const Body& body) {
  FUSEDCNN_UNROLL
  for (int k = 0; k < Tile::kRingItems; ++k) {
    const int i = thread_index() + k * Tile::kThreads, ring = i / 4;
    if (ring >= Tile::kRing) continue;
    // The first row, the last one, and between them the first and the last column.
    const int beside = ring - 2 * Tile::kWindowsW;
    const int row = beside < 0 ? ring / Tile::kWindowsW * (Tile::kWindowsH - 1) : 1 + beside / 2;
    const int col = beside < 0 ? ring % Tile::kWindowsW : beside % 2 * (Tile::kWindowsW - 1);
    body(k, i % 4, row, col);
  }
}

// A window's four words, in the order of codes xor `flip`: gradients where their codes say so, and
// zeros elsewhere. What stands where a code is off is not multiplied by zero, it is replaced.
FUSEDCNN_DEVICE void place_word(float, uint32_t value, uint32_t code, uint32_t flip,
                                uint32_t (&words)[4]) {
  const uint32_t rounded = to_tf32(float_from(value)), at = (code & 0xffu) ^ flip;
  FUSEDCNN_UNROLL
  for (uint32_t i = 0; i < 4; ++i) words[i] = at == i ? rounded : 0u;
}
template <typename S>
FUSEDCNN_DEVICE void place_word(S, uint32_t value, uint32_t codes, uint32_t flip,
                                uint32_t (&words)[4]) {
  const uint32_t low = (codes & 0xffu) ^ flip, high = (codes >> 8 & 0xffu) ^ flip;
  FUSEDCNN_UNROLL
  for (uint32_t i = 0; i < 4; ++i) {
    words[i] = (low == i ? value & 0xffffu : 0u) | (high == i ? value & 0xffff0000u : 0u);
  }
}

// Writes an item's four places in both of its planes, `to` being the first. Windows of neighbouring
// lanes are two columns apart: the upper half of a warp begins with the second one, and all lanes
// meet different banks.
template <typename S, typename Tile>
FUSEDCNN_DEVICE void expand(const InputItem& item, Shared<uint32_t> to) {
  const int flip = thread_index() / 16 % 2;
  FUSEDCNN_UNROLL
  for (int plane = 0; plane < 2; ++plane) {
    uint32_t words[4];
    place_word(S{}, item.values[plane], item.codes >> 8 * kPerWord<S> * plane,
               static_cast<uint32_t>(flip), words);
    FUSEDCNN_UNROLL
    for (int i = 0; i < 4; ++i) {
      to[4 * plane * Tile::kPlane + i / 2 * Tile::kPitch + (i % 2 ^ flip)] = words[i];
    }
  }
}

// Column `col` of tile `tile` of N, as one of a warp's channels: columns 2t and 2t + 1 of all tiles
// are neighbours.
template <int NTiles>
FUSEDCNN_DEVICE int channel_of(int tile, int col) {
  return (col / 2 * NTiles + tile) * 2 + col % 2;
}

// Weights of `count` slices from `first` on, as fragments: [slice][tap][warp of Split][lane]
// [tile of N][register]. Zeros behind the last channel and output channel.
template <typename S, typename Tile>
FUSEDCNN_DEVICE void fetch_input_fragments(const BackwardArgs& args, const InputMmaSizes& sizes,
                                           int channel_block, int first, int count,
                                           Shared<uint32_t> to) {
  constexpr int kLaneWords = 2 * Tile::kNTiles;
  const Strides strides = args.weight_strides;
  // Words of one tap, of all slices: each takes nine, all on their way at once.
  FUSEDCNN_NO_UNROLL
  for (int i = thread_index(); i < count * Tile::kTap; i += Tile::kThreads) {
    const int part = i % 2, tile = i % kLaneWords / 2, lane = i / kLaneWords % kWarp;
    const int split = i / kLaneWords / kWarp % Tile::kSplit, slice = i / Tile::kTap;
    const int c = channel_block * Tile::kChannels + split * 8 * Tile::kNTiles +
                  channel_of<Tile::kNTiles>(tile, lane / 4);
    const int oc = (((first + slice) * 4 + lane % 4) * 2 + part) * kPerWord<S>;
    const S* const from = static_cast<const S*>(args.weight) + oc * strides.n + c * strides.c;
    FUSEDCNN_UNROLL
    for (int kh = 0; kh < 3; ++kh) {
      S taps[kPerWord<S>][3]{};
      FUSEDCNN_UNROLL
      for (int half = 0; half < kPerWord<S>; ++half) {
        if (c >= sizes.channels || oc + half >= sizes.out_channels) continue;
        FUSEDCNN_UNROLL
        for (int kw = 0; kw < 3; ++kw) {
          taps[half][kw] = load_constant(from + half * strides.n + kh * strides.h + kw * strides.w);
        }
      }
      FUSEDCNN_UNROLL
      for (int kw = 0; kw < 3; ++kw) {
        const Shared<uint32_t> word =
            to + (slice * Tile::kSlice + (3 * kh + kw) * Tile::kTap + i % Tile::kTap);
        if constexpr (sizeof(S) == 4) {
          *word = to_tf32(taps[0][kw]);
        } else {
          *word = two_halves(taps[0][kw], taps[1][kw]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace fusedcnn::cuda
