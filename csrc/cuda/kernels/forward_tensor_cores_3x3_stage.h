// What the tensor cores' forward multiplies from: tiles, and how their pixels come into shared
// memory. See forward_tensor_cores_3x3.cu.
#pragma once

#include "cuda/kernels/block_3x3.h"
#include "cuda/kernels/mma.h"

namespace fusedcnn::cuda {
namespace {

// TileH x TileW windows, 16 * MTiles output channels; Planes words of channels at a time.
template <int TileH, int TileW, int MTiles, int Planes>
struct MmaTile {
  static constexpr int kTileH = TileH, kTileW = TileW, kMTiles = MTiles, kPlanes = Planes;
  static constexpr int kWarps = TileH * TileW / 16, kThreads = kWarps * kWarp;
  static constexpr int kChannels = 16 * MTiles;
  static constexpr int kRows = 2 * TileH + 2, kCols = 2 * TileW + 2;
  // Column 1 of a tile, where rows of an image begin that has a padding of 1, is aligned to 8
  // bytes.
  static constexpr int kLead = 3;
  // Lanes reach over one or two rows of windows: two pitches are 16 banks.
  static constexpr int kPitch = TileW == 16 ? 40 : 24;
  static constexpr int kPlane = kRows * kPitch + 2;
  static constexpr int kTapsPerStep = 8 / Planes;
  static constexpr int kSteps = (9 + kTapsPerStep - 1) / kTapsPerStep;
  static constexpr int kStage = Planes * kPlane;
  static constexpr int kWeights = kSteps * MTiles * kWarp * 4;
  static_assert((TileW == 16 || TileW == 8) && kPitch >= kLead + kCols && kPlane % 8 == 2);

  // Blocks to a multiprocessor: 512 threads have all the registers that they need, and 768 where
  // accumulators and planes are few.
  static constexpr int kResident = (MTiles == 1 && Planes == 2 ? 768 : 512) / kThreads;

  static constexpr int64_t shared(int slices) {
    return shared_bytes<uint32_t>(kStage) + shared_bytes<uint32_t>(slices * kWeights) +
           shared_bytes<float>(kChannels);
  }
};

// What lies side by side in the input.
enum class Access : int {
  kRows,    // four pixels of a row
  kPixels,  // the channels of four planes
  kWords,   // nothing, or the two channels of a word
};

struct MmaSizes : MapSizes {
  TileGrid grid;
  int slices;  // of channels
  int planes;  // of a slice, that channels there are lie in
  // Strides of the input, unless words are read one by one. They may wrap where nothing is read.
  uint32_t input_c, input_h, input_w;
  int output_c, output_h, output_w;  // strides of the output
  Access access;
  bool halos;          // whether pixels lie beside a tile that is read by rows
  bool pixels_first;   // of single words: channels are neighbours in memory
  bool channel_pairs;  // and the two of a word can be read at once
  bool output_fours;   // four windows of a row can be written at once
};

// Where a slice of channels of one task's pixels lies in the input.
template <typename S, typename Tile>
struct Place {
  FUSEDCNN_DEVICE Place(const ForwardArgs& args, const MmaSizes& sizes, const TileWalk& walk,
                        int first_channel)
      : image(static_cast<const S*>(args.input) + walk.n() * args.input_strides.n),
        first(first_channel),
        h0(walk.tile_h() * 2 * Tile::kTileH - sizes.padding_h),
        w0(walk.tile_w() * 2 * Tile::kTileW - sizes.padding_w) {}

  const S* image;
  int first, h0, w0;
};

template <typename Tile>
FUSEDCNN_DEVICE int place_in_stage(int plane, int row, int col) {
  return plane * Tile::kPlane + row * Tile::kPitch + Tile::kLead + col;
}

// store(i, load(i)) for every Step-th i from `begin` to `end`. AtOnce loads are under way before
// the first arrives; load() reads nothing outside the image for an i beyond the end.
template <int AtOnce, int Step, typename Load, typename Store>
FUSEDCNN_DEVICE void copy_items(int begin, int end, const Load& load, const Store& store) {
  FUSEDCNN_NO_UNROLL
  for (int i = begin; i < end; i += AtOnce * Step) {
    decltype(load(0)) held[AtOnce];
    FUSEDCNN_UNROLL
    for (int j = 0; j < AtOnce; ++j) held[j] = load(i + j * Step);
    FUSEDCNN_UNROLL
    for (int j = 0; j < AtOnce; ++j) {
      if (i + j * Step < end) store(i + j * Step, held[j]);
    }
  }
}

// Four pixels of a row at a time.
template <typename S, typename Tile>
FUSEDCNN_DEVICE void copy_rows(const MmaSizes& sizes, const Place<S, Tile>& place,
                               Shared<uint32_t> to) {
  constexpr int kFours = (Tile::kCols - 2) / 4;  // of a row, between the halos
  constexpr int kStep = Tile::kThreads / kFours;
  constexpr int kRounds = (Tile::kPlanes * Tile::kRows + kStep - 1) / kStep;
  constexpr int kAtOnce = kRounds < 3 ? kRounds : 3;
  using Held = Pack<4, uint32_t>;  // floats, or the lower channel's halves and then the upper's
  const int col = 1 + fresh_thread_index() % kFours * 4, w = place.w0 + col;
  const int in_h = w < sizes.in_w ? sizes.in_h : 0;
  const auto load = [&](int i) {
    const int plane = i / Tile::kRows;
    const int c = place.first + plane * kPerWord<S>, h = place.h0 + i % Tile::kRows;
    const bool real = c < sizes.channels && inside(h, in_h);
    const S* const from = place.image + (c * sizes.input_c + h * sizes.input_h + w);
    Held held{};
    if constexpr (sizeof(S) == 4) {
      if (real) held = load_pack<4>(reinterpret_cast<const uint32_t*>(from));
    } else {
      const auto load_two = [&](const S* at, uint32_t& first, uint32_t& second) {
        const auto two = load_pack<2>(reinterpret_cast<const uint32_t*>(at));
        first = two.values[0], second = two.values[1];
      };
      if (real) load_two(from, held.values[0], held.values[1]);
      if (real && c + 1 < sizes.channels) {
        load_two(from + sizes.input_c, held.values[2], held.values[3]);
      }
    }
    return held;
  };
  const auto store = [&](int i, const Held& held) {
    const Shared<uint32_t> word = to + place_in_stage<Tile>(i / Tile::kRows, i % Tile::kRows, col);
    const uint32_t (&v)[4] = held.values;
    if constexpr (sizeof(S) == 4) {
      const auto rounded = [&](int k) { return to_tf32(float_from(v[k])); };
      store_pack(word, Pack<2, uint32_t>{{rounded(0), rounded(1)}});
      store_pack(word + 2, Pack<2, uint32_t>{{rounded(2), rounded(3)}});
    } else {
      const auto lower = [&](int k) { return (v[k] & 0xffff) | v[k + 2] << 16; };
      const auto upper = [&](int k) { return v[k] >> 16 | (v[k + 2] & 0xffff0000); };
      store_pack(word, Pack<2, uint32_t>{{lower(0), upper(0)}});
      store_pack(word + 2, Pack<2, uint32_t>{{lower(1), upper(1)}});
    }
  };
  copy_items<kAtOnce, kStep>(fresh_thread_index() / kFours, sizes.planes * Tile::kRows, load,
                             store);
}

// The channels of four planes of a pixel at a time.
template <typename S, typename Tile>
FUSEDCNN_DEVICE void copy_pixels(const MmaSizes& sizes, const Place<S, Tile>& place,
                                 Shared<uint32_t> to) {
  constexpr int kVectors = (Tile::kPlanes + 3) / 4;  // of a pixel
  constexpr int kStep = Tile::kThreads / kVectors;
  using Held = Pack<4, uint32_t>;
  const int plane = fresh_thread_index() % kVectors * 4;
  const int c = place.first + plane * kPerWord<S>;
  const bool channels_are_real = c < sizes.channels;
  const auto load = [&](int i) {
    const int h = place.h0 + i / Tile::kCols, w = place.w0 + i % Tile::kCols;
    const bool real = channels_are_real && i < Tile::kRows * Tile::kCols && inside(h, sizes.in_h) &&
                      inside(w, sizes.in_w);
    const S* const from = place.image + (c + h * sizes.input_h + w * sizes.input_w);
    return real ? load_pack<4>(reinterpret_cast<const uint32_t*>(from)) : Held{};
  };
  const auto store = [&](int i, const Held& held) {
    const Shared<uint32_t> word =
        to + place_in_stage<Tile>(plane, i / Tile::kCols, i % Tile::kCols);
    FUSEDCNN_UNROLL
    for (int k = 0; k < 4; ++k) {
      const uint32_t v = held.values[k];
      word[k * Tile::kPlane] = sizeof(S) == 4 ? to_tf32(float_from(v)) : v;
    }
  };
  copy_items<3, kStep>(fresh_thread_index() / kVectors, Tile::kRows * Tile::kCols, load, store);
}

// One word at a time: whole rows, or their two halos alone.
template <typename S, typename Tile, bool Halos>
FUSEDCNN_DEVICE void copy_words(const ForwardArgs& args, const MmaSizes& sizes,
                                const Place<S, Tile>& place, Shared<uint32_t> to) {
  constexpr int kCols = Halos ? 2 : Tile::kCols, kPlaces = Tile::kRows * kCols;
  struct Spot {
    int plane, row, col;
  };
  const auto spot = [&](int i) {
    const bool pixels = !Halos && sizes.pixels_first;
    const int at = pixels ? i / Tile::kPlanes : i % kPlaces, col = at % kCols;
    return Spot{pixels ? i % Tile::kPlanes : i / kPlaces, at / kCols,
                Halos && col ? Tile::kCols - 1 : col};
  };
  const auto load = [&](int i) {
    const Spot at = spot(i);
    const int c = place.first + at.plane * kPerWord<S>, h = place.h0 + at.row;
    const int w = place.w0 + at.col;
    const bool real = c < sizes.channels && inside(h, sizes.in_h) && inside(w, sizes.in_w);
    const Strides strides = args.input_strides;
    const S* const from = place.image + c * strides.c + h * strides.h + w * strides.w;
    if constexpr (sizeof(S) == 4) {
      return to_tf32(real ? load_constant(from) : 0.f);
    } else {
      if (sizes.channel_pairs) {
        return real ? load_constant(reinterpret_cast<const uint32_t*>(from)) : 0u;
      }
      S low{}, high{};
      if (real) low = load_constant(from);
      if (real && c + 1 < sizes.channels) high = load_constant(from + strides.c);
      return two_halves(low, high);
    }
  };
  const auto store = [&](int i, uint32_t word) {
    const Spot at = spot(i);
    to[place_in_stage<Tile>(at.plane, at.row, at.col)] = word;
  };
  copy_items<Halos ? 1 : 4, Tile::kThreads>(
      fresh_thread_index(), (Halos ? sizes.planes : Tile::kPlanes) * kPlaces, load, store);
}

// Copies a slice of channels of one task's pixels into shared memory. Zeros stand outside the image
// and behind the last channel. Where nothing is ever written (planes without channels, the halos of
// images that are no wider than a tile), what was there stays: the caller's zeros.
template <typename S, typename Tile>
FUSEDCNN_DEVICE void copy_slice(const ForwardArgs& args, const MmaSizes& sizes,
                                const TileWalk& walk, int first, Shared<uint32_t> to) {
  const Place<S, Tile> place(args, sizes, walk, first);
  if (sizes.access == Access::kRows) {
    copy_rows<S, Tile>(sizes, place, to);
    if (sizes.halos) copy_words<S, Tile, true>(args, sizes, place, to);
  } else if (Tile::kPlanes >= 4 && sizes.access == Access::kPixels) {
    copy_pixels<S, Tile>(sizes, place, to);
  } else {
    copy_words<S, Tile, false>(args, sizes, place, to);
  }
}

}  // namespace
}  // namespace fusedcnn::cuda
