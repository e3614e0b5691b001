// What the dense grad_input kernels of a 3x3 convolution under a 2x2 pool share: a tile of pixels,
// and the gradients of the convolution's outputs that meet it, in shared memory. Of these a pooled
// gradient and its code are fetched, and expanded into four places, of which the code names the one
// that gets it; the others get zeros.
//
// They lie in planes [k][row][col] of words of 32 bits: a float, or the halves of two output
// channels. The gradients of the next slice of output channels, or the next tile, are on their way
// to registers while the products of this one are taken; only those of windows around a tile, where
// a map has several, are waited for.
#pragma once

#include <cstring>

#include "cuda/kernels/block_3x3.h"
#include "cuda/kernels/mma.h"

namespace fusedcnn::cuda {
namespace {

// Windows that the taps of Rows x Cols pixels may meet: as many as these have, and a ring around
// them; and how many items, a plane's channels of a window, each of the block's threads fetches.
template <int Rows, int Cols, int Threads>
struct InputWindows {
  static constexpr int kTileH = Rows, kTileW = Cols, kThreads = Threads;
  static constexpr int kWindowsH = Rows / 2 + 2, kWindowsW = Cols / 2 + 2;
  static constexpr int kCore = (kWindowsH - 2) * (kWindowsW - 2);
  static constexpr int kRing = kWindowsH * kWindowsW - kCore;
  static constexpr int kCoreItems = 4 * kCore / kThreads;
  static constexpr int kRingItems = (4 * kRing + kThreads - 1) / kThreads;
  static_assert(4 * kCore % kThreads == 0);
};

struct InputTileSizes : MapSizes {
  int tiles_h, tiles_w, batch, channel_blocks;
  int slices;           // of output channels
  int kept_slices;      // of weights in shared memory: all, or one
  bool ring;            // some tile meets windows beyond its own
  bool gradients_last;  // grad_output's and the code's channels are neighbours in memory
  bool gradient_packs;  // and can be loaded as many at once as a plane has
  bool channel_packs;   // a thread's channels can be written at once
  bool pixel_packs;     // a thread's pixels of a row can
  int64_t tasks;        // tiles of all images, for all blocks of channels
};

// A walk over a block's share of the tasks, one after the other: tiles first, so that neighbours'
// rings are in the cache, and blocks of channels last, so that weights are kept.
class InputWalk {
 public:
  FUSEDCNN_DEVICE explicit InputWalk(const InputTileSizes& sizes) {
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
  FUSEDCNN_DEVICE void advance(const InputTileSizes& sizes) {
    --left_;
    if (++tile_ < sizes.tiles_h * sizes.tiles_w) return;
    tile_ = 0;
    if (++n_ < sizes.batch) return;
    n_ = 0;
    ++channel_block_;
  }
  FUSEDCNN_DEVICE int64_t n() const { return n_; }
  FUSEDCNN_DEVICE int tile_h(const InputTileSizes& sizes) const { return tile_ / sizes.tiles_w; }
  FUSEDCNN_DEVICE int tile_w(const InputTileSizes& sizes) const { return tile_ % sizes.tiles_w; }
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
FUSEDCNN_DEVICE InputItem load_item(const BackwardArgs& args, const InputTileSizes& sizes,
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
FUSEDCNN_DEVICE void for_core_items(const InputTileSizes& sizes, const Body& body) {
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
template <bool Tf32>
FUSEDCNN_DEVICE void place_word(float, uint32_t value, uint32_t code, uint32_t flip,
                                uint32_t (&words)[4]) {
  if constexpr (Tf32) value = to_tf32(float_from(value));
  const uint32_t at = (code & 0xffu) ^ flip;
  FUSEDCNN_UNROLL
  for (uint32_t i = 0; i < 4; ++i) words[i] = at == i ? value : 0u;
}
template <bool, typename S>
FUSEDCNN_DEVICE void place_word(S, uint32_t value, uint32_t codes, uint32_t flip,
                                uint32_t (&words)[4]) {
  const uint32_t low = (codes & 0xffu) ^ flip, high = (codes >> 8 & 0xffu) ^ flip;
  FUSEDCNN_UNROLL
  for (uint32_t i = 0; i < 4; ++i) {
    words[i] = (low == i ? value & 0xffffu : 0u) | (high == i ? value & 0xffff0000u : 0u);
  }
}

// Writes an item's four places in both of its planes, `to` being the first. Windows of neighbouring
// lanes are two columns apart: lanes that `flip` begin with the second one, and meet other banks.
template <typename S, typename Tile>
FUSEDCNN_DEVICE void expand(const InputItem& item, int flip, Shared<uint32_t> to) {
  FUSEDCNN_UNROLL
  for (int plane = 0; plane < 2; ++plane) {
    uint32_t words[4];
    place_word<Tile::kTf32>(S{}, item.values[plane], item.codes >> 8 * kPerWord<S> * plane,
                            static_cast<uint32_t>(flip), words);
    FUSEDCNN_UNROLL
    for (int i = 0; i < 4; ++i) {
      to[4 * plane * Tile::kPlane + i / 2 * Tile::kPitch + (i % 2 ^ flip)] = words[i];
    }
  }
}

// What a thread fetches of a block's gradients, a slice of output channels ahead.
template <typename S, typename Tile>
class GradientStage {
 public:
  static constexpr int kSliceChannels = 4 * kItemChannels<S>;

  FUSEDCNN_DEVICE explicit GradientStage(const InputTileSizes& sizes) : next_(sizes) {}

  // Places that no window reaches stay zeros.
  static FUSEDCNN_DEVICE void clear(const InputTileSizes& sizes, Shared<uint32_t> gradients) {
    if (sizes.ring) return;
    for (int i = thread_index(); i < Tile::kGradients; i += Tile::kThreads) gradients[i] = 0;
  }

  // Begins to fetch the next slice, which is the next tile's first after a tile's last.
  FUSEDCNN_DEVICE void fetch(const BackwardArgs& args, const InputTileSizes& sizes) {
    if (next_.done()) return;
    for_core_items<Tile>(sizes, [&](int index, int plane, int row, int col) {
      items_[index] = load(args, sizes, next_, next_slice_, plane, row, col);
    });
    if (++next_slice_ == sizes.slices) next_slice_ = 0, next_.advance(sizes);
  }

  // Writes what was fetched, a slice of the task, and the windows around its tile. Waits until
  // nobody reads the slice before; the caller sees to the barrier behind.
  FUSEDCNN_DEVICE void write(const BackwardArgs& args, const InputTileSizes& sizes,
                             const InputWalk& task, int slice, Shared<uint32_t> gradients) const {
    // In the caches mostly, since it is other tiles' own.
    InputItem ring[Tile::kRingItems];
    if (sizes.ring) {
      for_ring_items<Tile>([&](int index, int plane, int row, int col) {
        ring[index] = load(args, sizes, task, slice, plane, row, col);
      });
    }
    sync_threads();
    const int flip = thread_index() >> (sizes.gradients_last ? 4 : Tile::kFlipBit) & 1;
    const auto put = [&](const InputItem& item, int plane, int row, int col) {
      expand<S, Tile>(item, flip,
                      gradients + (plane * Tile::kPlane + 2 * row * Tile::kPitch + 2 * col));
    };
    for_core_items<Tile>(sizes, [&](int index, int plane, int row, int col) {
      put(items_[index], plane, row, col);
    });
    if (sizes.ring) {
      for_ring_items<Tile>(
          [&](int index, int plane, int row, int col) { put(ring[index], plane, row, col); });
    }
  }

 private:
  // The item of a window and plane, for a task and a slice of output channels.
  static FUSEDCNN_DEVICE InputItem load(const BackwardArgs& args, const InputTileSizes& sizes,
                                        const InputWalk& task, int slice, int plane, int row,
                                        int col) {
    const Strides &from = args.grad_output_strides, &at = args.code_strides;
    const int oc = slice * kSliceChannels + plane * kItemChannels<S>;
    const int h = task.tile_h(sizes) * (Tile::kTileH / 2) + sizes.padding_h / 2 - 1 + row;
    const int w = task.tile_w(sizes) * (Tile::kTileW / 2) + sizes.padding_w / 2 - 1 + col;
    const bool real = inside(h, sizes.out_h) && inside(w, sizes.out_w);
    return load_item(
        args, sizes,
        static_cast<const S*>(args.grad_output) + task.n() * from.n + oc * from.c + h * from.h +
            w * from.w,
        static_cast<const uint8_t*>(args.code) + task.n() * at.n + oc * at.c + h * at.h + w * at.w,
        real ? sizes.out_channels - oc : 0);
  }

  InputWalk next_;
  int next_slice_ = 0;
  InputItem items_[Tile::kCoreItems];
};

// ---- host ---------------------------------------------------------------------------------------

// A thread writes `row` neighbouring pixels and `channels` neighbouring channels at once where it
// can.
template <typename S, typename Tile>
InputTileSizes input_tile_sizes(const BackwardArgs& args, int row, int channels) {
  constexpr int64_t kBytes = sizeof(S), kItem = kItemChannels<S>;
  const Geometry& g = args.geometry;
  InputTileSizes s{};
  static_cast<MapSizes&>(s) = map_sizes(g);
  s.tiles_h = parts(s.in_h, Tile::kTileH);
  s.tiles_w = parts(s.in_w, Tile::kTileW);
  s.batch = static_cast<int>(g.batch);
  s.channel_blocks = parts(s.channels, Tile::kChannels);
  s.tasks = static_cast<int64_t>(s.channel_blocks) * s.batch * s.tiles_h * s.tiles_w;
  s.slices = parts(s.out_channels, 4 * kItem);
  const int64_t weights = shared_bytes<uint32_t>(int64_t{s.slices} * Tile::kSlice);
  s.kept_slices = weights > Tile::kMostWeights ? 1 : s.slices;
  s.ring = s.tiles_h > 1 || s.tiles_w > 1 || s.padding_h > 1 || s.padding_w > 1 ||
           s.out_h > Tile::kWindowsH - 2 || s.out_w > Tile::kWindowsW - 2;
  const Strides from = args.grad_output_strides, at = args.code_strides;
  s.gradients_last = from.c == 1 && at.c == 1 && s.out_channels > 1;
  s.gradient_packs = s.gradients_last && s.out_channels % kItem == 0 &&
                     aligned(args.grad_output, kBytes, kItem * kBytes, {from.n, from.h, from.w}) &&
                     aligned(args.code, 1, kItem, {at.n, at.h, at.w});
  const Strides to = args.grad_input_strides;
  s.channel_packs = to.c == 1 && s.channels % channels == 0 &&
                    aligned(args.grad_input, kBytes, channels * kBytes, {to.n, to.h, to.w});
  s.pixel_packs = to.w == 1 && s.in_w % row == 0 &&
                  aligned(args.grad_input, kBytes, row * kBytes, {to.n, to.c, to.h});
  return s;
}

// As many blocks as the multiprocessors hold: each takes its share in one go.
template <typename Tile>
void launch_input_tiles(const char* name, void (*kernel)(BackwardArgs, InputTileSizes),
                        const BackwardArgs& args, const InputTileSizes& sizes,
                        const Execution& execution) {
  const int64_t most = int64_t{execution.multiprocessors} * Tile::kResident;
  const int64_t blocks = blocks_for(sizes.tasks);
  launch(name, kernel, blocks < most ? blocks : most, Tile::kThreads,
         shared_bytes<uint32_t>(Tile::kGradients) +
             shared_bytes<uint32_t>(int64_t{sizes.kept_slices} * Tile::kSlice),
         execution, args, sizes);
}

}  // namespace
}  // namespace fusedcnn::cuda
