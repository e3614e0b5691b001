// Forward on tensor cores: 3x3 convolution of stride 1 under a 2x2 pool of stride 2, in bfloat16,
// float16, or float32 rounded to tf32; sums in float.
//
// An implicit matrix product, output channels (M) x pixels (N), over channels x taps (K). A warp
// owns 16 windows, that is 64 pixels or eight tiles of N = 8, for 16 * MTiles output channels.
// Which pixel is which column of a tile is free to choose: columns 2t and 2t + 1 of tile (j, dy)
// are the pixels dx = 0, 1 in row dy of window 4t + j. As a thread holds columns 2t and 2t + 1, it
// holds all four pixels of its four neighbouring windows, for the output channels g and g + 8 of
// every tile of M: bias, ReLU, maximum and code need no other thread, and four windows are written
// at once.
//
// Shared memory holds 32-bit words: a tf32 number, or the halves of channels 2p and 2p + 1. Words
// lie in planes [plane][row][col], so that both kinds of fragments are the same words: one step of
// K is eight rows of words, in which a thread needs rows t and t + 4. Planes per tap are 8, or 4 or
// 2 where there are so few channels: one step then takes 1, 2 or 4 taps. Planes are 2 (mod 8) words
// apart, and with 16 windows in four groups of 8 pixels the 32 lanes of a load meet 32 banks.
// Weights lie as fragments, 128 bits a lane.
//
// A step costs a warp 16 loads of 32 bits and MTiles of 128: 16 + 4 MTiles wavefronts, for 8 MTiles
// products. 3 -> 16 channels at 32x32, per image: 16 warps' worth x 3 steps (tf32: 5) x 20 = 960
// (1,600) cycles of shared memory on one of 132 multiprocessors, 3.7 (6.1) ns at 1.98 GHz, where
// memory takes 4.2 (7.6) at 4.3 TB/s for 18 (32) KiB. 16 -> 32 at 16x16: 4 x 9 (18) x 24 = 864
// (1,728) cycles, 3.3 (6.6) ns, beside 3.3 (6.2) for 14 (26) KiB. Staging comes on top:
// asynchronous for tf32 and for channels_last halves, by way of registers for halves in planes.
// Outputs in channels_last are written one by one. Counts, not measurements: so far this has run on
// a CPU only, which knows nothing of the order of sums inside a matrix instruction.
#pragma once

#include "cuda/kernels/mma.h"
#include "cuda/kernels/windows.h"

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
  static constexpr int kInputStage = Planes * kPlane;
  static constexpr int kWeights = kSteps * MTiles * kWarp * 4;
  static_assert((TileW == 16 || TileW == 8) && kPitch >= kLead + kCols && kPlane % 8 == 2);

  // Blocks to a multiprocessor: 512 threads have all the registers that they need, and 768 where
  // accumulators and planes are few.
  static constexpr int kResident = (MTiles == 1 && Planes == 2 ? 768 : 512) / kThreads;

  static constexpr int64_t shared() {
    return shared_bytes<uint32_t>(2 * kInputStage) + shared_bytes<uint32_t>(kWeights);
  }
};

struct MmaSizes {
  TileGrid grid;
  int in_h, in_w, conv_h, conv_w, out_h, out_w;
  int padding_h, padding_w;
  int channels, out_channels;
  bool pixels_first;   // channels are neighbours in memory
  bool input_pairs;    // two pixels of a row can be copied at once
  bool channel_pairs;  // two channels of a pixel can
  bool output_fours;   // four windows of a row can be written at once
};

// Calls body(plane, row, col, width) for the words of a stage that this thread fetches: `width`
// neighbours, 1 or 2.
template <typename Tile, typename Body>
FUSEDCNN_DEVICE void for_words(const MmaSizes& sizes, const Body& body) {
  if (sizes.input_pairs) {
    constexpr int kPairs = (Tile::kCols - 2) / 2, kItems = kPairs + 2;  // and the two halos
    FUSEDCNN_NO_UNROLL
    for (int i = thread_index(); i < Tile::kPlanes * Tile::kRows * kItems; i += Tile::kThreads) {
      const int item = i % kItems, row = i / kItems % Tile::kRows, plane = i / kItems / Tile::kRows;
      if (item < kPairs) {
        body(plane, row, 1 + 2 * item, 2);
      } else {
        body(plane, row, item == kPairs ? 0 : Tile::kCols - 1, 1);
      }
    }
  } else {
    constexpr int kPlaces = Tile::kRows * Tile::kCols;
    FUSEDCNN_NO_UNROLL
    for (int i = thread_index(); i < Tile::kPlanes * kPlaces; i += Tile::kThreads) {
      const int plane = sizes.pixels_first ? i % Tile::kPlanes : i / kPlaces;
      const int place = sizes.pixels_first ? i / Tile::kPlanes : i % kPlaces;
      body(plane, place / Tile::kCols, place % Tile::kCols, 1);
    }
  }
}

// Fetches the planes of input channels from `first` on for one task: asynchronously where words lie
// in memory as they do here. Zeros stand outside the image and behind the last channel.
template <typename S, typename Tile>
FUSEDCNN_DEVICE void fetch_planes(const ForwardArgs& args, const MmaSizes& sizes,
                                  const TileWalk& walk, int first, Shared<uint32_t> to) {
  const int h0 = walk.tile_h(sizes.grid) * 2 * Tile::kTileH - sizes.padding_h;
  const int w0 = walk.tile_w(sizes.grid) * 2 * Tile::kTileW - sizes.padding_w;
  const Strides strides = args.input_strides;
  const S* const image = static_cast<const S*>(args.input) + walk.n() * strides.n;
  for_words<Tile>(sizes, [&](int plane, int row, int col, int width) {
    const int c = first + plane * kPerWord<S>, h = h0 + row, w = w0 + col;
    const bool real = inside(h, sizes.in_h) && inside(w, sizes.in_w) && c < sizes.channels;
    const S* const from = real ? image + c * strides.c + h * strides.h + w * strides.w : image;
    const Shared<uint32_t> word =
        to + (plane * Tile::kPlane + row * Tile::kPitch + Tile::kLead + col);
    if constexpr (sizeof(S) == 4) {
      const auto* const bits = reinterpret_cast<const uint32_t*>(from);
      if (width == 2) {
        copy_async<8>(word, bits, real ? 8 : 0);
      } else {
        copy_async<4>(word, bits, real ? 4 : 0);
      }
    } else if (width == 2) {
      Pack<2, S> low{}, high{};
      if (real) low = load_pack<2, S>(from);
      if (real && c + 1 < sizes.channels) high = load_pack<2, S>(from + strides.c);
      store_pack(word, Pack<2, uint32_t>{{two_halves(low.values[0], high.values[0]),
                                          two_halves(low.values[1], high.values[1])}});
    } else if (sizes.channel_pairs) {
      copy_async<4>(word, reinterpret_cast<const uint32_t*>(from), real ? 4 : 0);
    } else {
      S low{}, high{};
      if (real) low = load_constant(from);
      if (real && c + 1 < sizes.channels) high = load_constant(from + strides.c);
      *word = two_halves(low, high);
    }
  });
}

// Rounds to tf32 what this thread has fetched.
template <typename Tile>
FUSEDCNN_DEVICE void round_planes(const MmaSizes& sizes, Shared<uint32_t> stage) {
  for_words<Tile>(sizes, [&](int plane, int row, int col, int width) {
    const Shared<uint32_t> word =
        stage + (plane * Tile::kPlane + row * Tile::kPitch + Tile::kLead + col);
    for (int i = 0; i < width; ++i) word[i] = to_tf32(float_from(word[i]));
  });
}

// The weights of the same channels, as fragments: [step][tile of M][lane][register]. Zeros behind
// the last tap, channel and output channel.
template <typename S, typename Tile>
FUSEDCNN_DEVICE void fetch_fragments(const ForwardArgs& args, const MmaSizes& sizes,
                                     int channel_block, int first, Shared<uint32_t> to) {
  const Strides strides = args.weight_strides;
  FUSEDCNN_NO_UNROLL  // registers are for the accumulators
      for (int i = thread_index(); i < Tile::kWeights; i += Tile::kThreads) {
    const int part = i % 4, lane = i / 4 % kWarp;
    const int tile = i / 4 / kWarp % Tile::kMTiles, step = i / 4 / kWarp / Tile::kMTiles;
    const int oc = channel_block * Tile::kChannels + 16 * tile + lane / 4 + part % 2 * 8;
    const int k = lane % 4 + part / 2 * 4;  // row of words in this step
    const int tap = step * Tile::kTapsPerStep + k / Tile::kPlanes;
    const int c = first + k % Tile::kPlanes * kPerWord<S>;
    const bool real = oc < sizes.out_channels && tap < 9 && c < sizes.channels;
    const S* const from = static_cast<const S*>(args.weight) + oc * strides.n + c * strides.c +
                          tap / 3 * strides.h + tap % 3 * strides.w;
    if constexpr (sizeof(S) == 4) {
      to[i] = to_tf32(real ? load_constant(from) : 0.f);
    } else {
      S low{}, high{};
      if (real) low = load_constant(from);
      if (real && c + 1 < sizes.channels) high = load_constant(from + strides.c);
      to[i] = two_halves(low, high);
    }
  }
}

// args: input [N, C, H, W], weight [OC, C, 3, 3], bias [OC] or null, output and code
// [N, OC, OH, OW] (code may be null).
template <typename S, typename Tile>
FUSEDCNN_KERNEL_RESIDENT(Tile::kThreads, Tile::kResident)
forward_mma_kernel(ForwardArgs args, MmaSizes sizes) {
  constexpr int kMTiles = Tile::kMTiles, kSliceChannels = Tile::kPlanes * kPerWord<S>;
  SharedMemory memory;
  const Shared<uint32_t> inputs = memory.array<uint32_t>(2 * Tile::kInputStage);
  const Shared<uint32_t> fragments = memory.array<uint32_t>(Tile::kWeights);
  const int lane = thread_index() % kWarp, g = lane / 4, t = lane % 4;
  const int first_window = thread_index() / kWarp * 16;
  // The pixel of column g in tile (0, 0), and this thread's rows of words.
  const int b_window = first_window + g / 2 * 4;
  const int b_place = b_window / Tile::kTileW * 2 * Tile::kPitch + Tile::kLead +
                      b_window % Tile::kTileW * 2 + g % 2 + t % Tile::kPlanes * Tile::kPlane;

  TileWalk fetched(sizes.grid);
  int fetched_channel = 0, stage = 0;
  const auto fetch = [&](int into) {
    if (!fetched.done(sizes.grid)) {
      fetch_planes<S, Tile>(args, sizes, fetched, fetched_channel,
                            inputs + into * Tile::kInputStage);
      fetched_channel += kSliceChannels;
      if (fetched_channel >= sizes.channels) fetched_channel = 0, fetched.advance(sizes.grid);
    }
    commit_copies();
  };
  fetch(0);

  int weights_of = -1;  // channel block whose only slice of weights is in shared memory
  for (TileWalk walk(sizes.grid); !walk.done(sizes.grid); walk.advance(sizes.grid)) {
    const int channel_block = walk.channel_block(sizes.grid);
    float acc[kMTiles][4][2][4];  // [tile of M][j][dy][register]
    FUSEDCNN_UNROLL
    for (int i = 0; i < kMTiles * 32; ++i) acc[i / 32][i / 8 % 4][i / 4 % 2][i % 4] = 0;

    for (int channel = 0; channel < sizes.channels; channel += kSliceChannels, stage ^= 1) {
      fetch(stage ^ 1);
      if (sizes.channels > kSliceChannels || weights_of != channel_block) {
        fetch_fragments<S, Tile>(args, sizes, channel_block, channel, fragments);
        weights_of = channel_block;
      }
      wait_copies<1>();
      if constexpr (sizeof(S) == 4) {
        round_planes<Tile>(sizes, inputs + stage * Tile::kInputStage);
      }
      sync_threads();
      Shared<uint32_t> pixels = inputs + (stage * Tile::kInputStage + b_place);
      Shared<uint32_t> fragment = fragments + lane * 4;
      // All steps at once, or a row of taps at a time: more would be loaded ahead than there are
      // registers.
      constexpr int kSteps = Tile::kPlanes == 8 ? 3 : Tile::kSteps;
      FUSEDCNN_NO_UNROLL
      for (int done = 0; done < Tile::kSteps; done += kSteps) {
        FUSEDCNN_UNROLL
        for (int step = 0; step < kSteps; ++step) {
          uint32_t a[kMTiles][4];
          FUSEDCNN_UNROLL
          for (int m = 0; m < kMTiles; ++m) {
            load_row(fragment + (step * kMTiles + m) * kWarp * 4, a[m]);
          }
          // Where rows t and t + 4 of this step are found: another tap, or four planes on.
          int offset[2];
          bool real[2];
          FUSEDCNN_UNROLL
          for (int i = 0; i < 2; ++i) {
            const int tap = step * Tile::kTapsPerStep + (t + 4 * i) / Tile::kPlanes;
            real[i] = tap < 9;
            offset[i] =
                tap / 3 * Tile::kPitch + tap % 3 + (Tile::kPlanes == 8 ? 4 * i * Tile::kPlane : 0);
          }
          FUSEDCNN_UNROLL
          for (int j = 0; j < 4; ++j) {
            FUSEDCNN_UNROLL
            for (int dy = 0; dy < 2; ++dy) {
              uint32_t b[2];
              FUSEDCNN_UNROLL
              for (int i = 0; i < 2; ++i) {
                // Zero times what lies there would be NaN where that is infinite.
                b[i] = real[i]
                           ? static_cast<uint32_t>(pixels[offset[i] + dy * Tile::kPitch + 2 * j])
                           : 0u;
              }
              FUSEDCNN_UNROLL
              for (int m = 0; m < kMTiles; ++m) multiply(S{}, acc[m][j][dy], a[m], b);
            }
          }
        }
        pixels += Tile::kPitch;
        fragment += kSteps * kMTiles * kWarp * 4;
      }
      sync_threads();  // the next but one overwrites this stage, the next the weights
    }

    const int window = first_window + 4 * t;
    const int oh = walk.tile_h(sizes.grid) * Tile::kTileH + window / Tile::kTileW;
    const int ow = walk.tile_w(sizes.grid) * Tile::kTileW + window % Tile::kTileW;
    if (oh >= sizes.out_h || ow >= sizes.out_w) continue;
    FUSEDCNN_UNROLL
    for (int row = 0; row < 2 * kMTiles; ++row) {
      const int m = row / 2, i = row % 2 * 2;
      const int oc = channel_block * Tile::kChannels + 16 * m + g + row % 2 * 8;
      if (oc >= sizes.out_channels) continue;
      float bias = 0;
      if (args.bias) {
        bias = widen(load_constant(static_cast<const S*>(args.bias) + oc * args.bias_stride));
      }
      Pack<4, S> values;
      Pack<4, uint8_t> codes;
      FUSEDCNN_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float (&top)[4] = acc[m][j][0], (&bottom)[4] = acc[m][j][1];
        const Pooled pooled =
            pool_window(top[i] + bias, top[i + 1] + bias, bottom[i] + bias, bottom[i + 1] + bias,
                        2 * (ow + j) + 1 < sizes.conv_w, 2 * oh + 1 < sizes.conv_h);
        values.values[j] = narrow<S>(pooled.value);
        codes.values[j] = static_cast<uint8_t>(pooled.code);
      }
      const Strides to = args.output_strides;
      const int64_t at = walk.n() * to.n + oc * to.c + oh * to.h + ow * to.w;
      S* const output = static_cast<S*>(args.output) + at;
      uint8_t* const code = args.code ? static_cast<uint8_t*>(args.code) + at : nullptr;
      if (sizes.output_fours) {
        store_pack(output, values);
        if (code) store_pack(code, codes);
        continue;
      }
      FUSEDCNN_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (ow + j >= sizes.out_w) continue;
        output[j * to.w] = values.values[j];
        if (code) code[j * to.w] = codes.values[j];
      }
    }
  }
  wait_copies<0>();
}

// ---- host ---------------------------------------------------------------------------------------

template <typename S>
MmaSizes mma_sizes(const ForwardArgs& args) {
  constexpr int64_t kBytes = sizeof(S);
  const Geometry& g = args.geometry;
  const AxisSizes h = sizes_of(g.h), w = sizes_of(g.w);
  MmaSizes s{};
  s.in_h = h.in, s.in_w = w.in;
  s.conv_h = h.conv, s.conv_w = w.conv;
  s.out_h = h.out, s.out_w = w.out;
  s.padding_h = h.padding, s.padding_w = w.padding;
  s.channels = static_cast<int>(g.in_channels);
  s.out_channels = static_cast<int>(g.out_channels);
  const Strides in = args.input_strides, out = args.output_strides;
  s.pixels_first = in.c == 1 && g.in_channels > 1;
  s.input_pairs = in.w == 1 && w.padding == 1 && w.in % 2 == 0 &&
                  aligned(args.input, kBytes, 2 * kBytes, {in.n, in.c, in.h});
  s.channel_pairs =
      in.c == 1 && g.in_channels % 2 == 0 && aligned(args.input, kBytes, 4, {in.n, in.h, in.w});
  s.output_fours = out.w == 1 && w.out % 4 == 0 &&
                   aligned(args.output, kBytes, 4 * kBytes, {out.n, out.c, out.h}) &&
                   aligned(args.code, 1, 4, {});
  return s;
}

template <typename S, typename Tile>
void launch_forward_mma(const ForwardArgs& args, const Execution& execution) {
  MmaSizes sizes = mma_sizes<S>(args);
  sizes.grid = tile_grid(args.geometry, Tile::kTileH, Tile::kTileW, Tile::kChannels);
  launch("forward_mma", forward_mma_kernel<S, Tile>, sizes.grid.blocks, Tile::kThreads,
         Tile::shared(), execution, args, sizes);
}

template <typename S, int Planes>
void forward_mma_planes(const ForwardArgs& args, const Execution& execution) {
  const Geometry& g = args.geometry;
  // 8 x 16 windows unless 8 x 8 leave less of their tiles empty.
  const auto empty = [&](int tile_w) { return (g.w.out + tile_w - 1) / tile_w * tile_w; };
  if (g.out_channels <= 16) {
    launch_forward_mma<S, MmaTile<8, 16, 1, Planes>>(args, execution);
  } else if (empty(16) <= empty(8)) {
    launch_forward_mma<S, MmaTile<8, 16, 2, Planes>>(args, execution);
  } else {
    launch_forward_mma<S, MmaTile<8, 8, 2, Planes>>(args, execution);
  }
}

template <typename S>
void forward_mma_typed(const ForwardArgs& args, const Execution& execution) {
  constexpr int kFew = 4 / kPerWord<S>;  // planes of up to four channels
  if (args.geometry.in_channels <= 4) {
    forward_mma_planes<S, kFew>(args, execution);
  } else {
    forward_mma_planes<S, 8>(args, execution);
  }
}

}  // namespace
}  // namespace fusedcnn::cuda
