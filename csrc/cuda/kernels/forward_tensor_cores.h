// Forward on tensor cores: 3x3 convolution of stride 1 under a 2x2 pool of stride 2, in bfloat16,
// float16, float32 rounded to tf32, or full float32 by three products in tf32; sums in float.
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
// Outputs in channels_last are written one by one. These are counts, not measurements: the kernel
// has run on a CPU only, which does not show the order of sums inside a matrix instruction.
//
// With three products (split_tf32.h), pixels and weights are split once, when they have arrived,
// not in each of the nine taps that load them: hi in place, low in a stage of its own. A step then
// takes 32 + 8 MTiles wavefronts and 24 MTiles products; mma.sync may make six of ten cycles a
// product. 16 -> 32 at 16x16, per image: 4 x 18 steps x 48 = 3,456 cycles of shared memory and
// 3,456 products in 5,760 cycles, beside some 6,600 of issue slots (3,100 in steps, of which 1,152
// are the float additions; 1,700 to fetch and split pixels, 1,440 weights, 400 to pool): 22 to 25
// ns, where forward_cuda_cores_3x3.cu counts 35 ns of multiply-adds and some 12,400 cycles of issue
// slots, 47 ns. 3 -> 16 at 32x32 pads three channels to eight (or four, which gains less than is
// certain), and stays on CUDA cores.
#pragma once

#include "cuda/kernels/block_3x3.h"
#include "cuda/kernels/mma.h"
#include "cuda/kernels/split_tf32.h"

namespace fusedcnn::cuda {
namespace {

// TileH x TileW windows, 16 * MTiles output channels; Planes words of channels at a time. Products:
// 3 for operands that are split, else 1.
template <int TileH, int TileW, int MTiles, int Planes, int Products = 1>
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
  static constexpr bool kSplit = Products == 3;
  static_assert((TileW == 16 || TileW == 8) && kPitch >= kLead + kCols && kPlane % 8 == 2);
  static_assert(Products == 1 || (kSplit && Planes == 8));

  // Blocks to a multiprocessor: 512 threads have all the registers that they need, and 768 where
  // accumulators and planes are few. Three blocks' split planes fill sm_90's shared memory.
  static constexpr int kResident =
      kSplit && TileW == 8 ? 3 : (MTiles == 1 && Planes == 2 ? 768 : 512) / kThreads;

  static constexpr int64_t shared() {
    const int64_t bytes =
        shared_bytes<uint32_t>(2 * kInputStage) + shared_bytes<uint32_t>(kWeights);
    return !kSplit ? bytes
                   : bytes + shared_bytes<uint32_t>(kInputStage) +
                         shared_bytes<uint32_t>(kWeights) + shared_bytes<uint32_t>(kWarps);
  }
};

struct MmaSizes : MapSizes {
  TileGrid grid;
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

// Splits what this thread has fetched: hi in place, low at the same place of `low`. Whether any of
// it is extreme.
template <typename Tile>
FUSEDCNN_DEVICE bool split_planes(const MmaSizes& sizes, Shared<uint32_t> stage,
                                  Shared<uint32_t> low) {
  bool any = false;
  for_words<Tile>(sizes, [&](int plane, int row, int col, int width) {
    const int at = plane * Tile::kPlane + row * Tile::kPitch + Tile::kLead + col;
    for (int i = 0; i < width; ++i) {
      const float value = float_from(stage[at + i]);
      const SplitFloat split = split_float(value);
      stage[at + i] = split.hi;
      low[at + i] = split.low;
      any = any || extreme(value);
    }
  });
  return any;
}

// The weights of the same channels, as fragments: [step][tile of M][lane][register]. Zeros behind
// the last tap, channel and output channel. Where they are split, low parts go to `to_low`, and the
// result says whether any is extreme.
template <typename S, typename Tile>
FUSEDCNN_DEVICE bool fetch_fragments(const ForwardArgs& args, const MmaSizes& sizes,
                                     int channel_block, int first, Shared<uint32_t> to,
                                     Shared<uint32_t> to_low) {
  const Strides strides = args.weight_strides;
  bool any = false;
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
    if constexpr (Tile::kSplit) {
      const float value = real ? load_constant(from) : 0.f;
      const SplitFloat split = split_float(value);
      to[i] = split.hi;
      to_low[i] = split.low;
      any = any || extreme(value);
    } else if constexpr (sizeof(S) == 4) {
      to[i] = to_tf32(real ? load_constant(from) : 0.f);
    } else {
      S low{}, high{};
      if (real) low = load_constant(from);
      if (real && c + 1 < sizes.channels) high = load_constant(from + strides.c);
      to[i] = two_halves(low, high);
    }
  }
  return any;
}

// Multiplies a slice of channels, all its steps: rows t and t + 4 of each. The pointers are this
// thread's own in the first.
template <typename S, typename Tile>
FUSEDCNN_DEVICE void multiply_slice(Shared<uint32_t> pixels, Shared<uint32_t> pixels_low,
                                    Shared<uint32_t> fragment, Shared<uint32_t> fragment_low, int t,
                                    float (&acc)[4][Tile::kMTiles][2][4]) {
  // All steps at once, or a row of taps, or, of split words, one tap at a time: more would be
  // loaded ahead than there are registers.
  constexpr int kSteps = Tile::kSplit ? 1 : Tile::kPlanes == 8 ? 3 : Tile::kSteps;
  FUSEDCNN_NO_UNROLL
  for (int done = 0; done < Tile::kSteps; done += kSteps) {
    FUSEDCNN_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[Tile::kMTiles][4], a_low[Tile::kMTiles][4];
      FUSEDCNN_UNROLL
      for (int m = 0; m < Tile::kMTiles; ++m) {
        load_row(fragment + (step * Tile::kMTiles + m) * kWarp * 4, a[m]);
        if constexpr (Tile::kSplit) {
          load_row(fragment_low + (step * Tile::kMTiles + m) * kWarp * 4, a_low[m]);
          FUSEDCNN_UNROLL
          for (int i = 0; i < 4; ++i) a_low[m][i] = truncated_tf32(a_low[m][i]);
        }
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
        uint32_t b[2][2], b_low[2][2];
        FUSEDCNN_UNROLL
        for (int dy = 0; dy < 2; ++dy) {
          FUSEDCNN_UNROLL
          for (int i = 0; i < 2; ++i) {
            const int at = offset[i] + dy * Tile::kPitch + 2 * j;
            // Zero times what lies there would be NaN where that is infinite.
            b[dy][i] = real[i] ? static_cast<uint32_t>(pixels[at]) : 0u;
            if constexpr (Tile::kSplit) b_low[dy][i] = truncated_tf32(pixels_low[at]);
          }
          if constexpr (!Tile::kSplit) {
            FUSEDCNN_UNROLL
            for (int m = 0; m < Tile::kMTiles; ++m) multiply(S{}, acc[j][m][dy], a[m], b[dy]);
          }
        }
        if constexpr (Tile::kSplit) {
          multiply_split(acc[j], a, a_low, b, b_low);
          // Not all pixels of a step may be loaded ahead: there are no registers for them.
          if (j == 1) sync_warp();
        }
      }
    }
    // The next tap, or the next row of taps.
    const int next = kSteps > 1 ? Tile::kPitch : done % 3 == 2 ? Tile::kPitch - 2 : 1;
    pixels += next;
    fragment += kSteps * Tile::kMTiles * kWarp * 4;
    if constexpr (Tile::kSplit) {
      pixels_low += next;
      fragment_low += kSteps * Tile::kMTiles * kWarp * 4;
    }
  }
}

// Writes what a thread owns: values and codes of four windows from (oh, ow) on, in output channels
// `channel` and 8 on of every tile of M.
template <typename S, typename Tile>
FUSEDCNN_DEVICE void store_windows(const ForwardArgs& args, const MmaSizes& sizes, int64_t n,
                                   int channel, int oh, int ow,
                                   const float (&acc)[4][Tile::kMTiles][2][4]) {
  FUSEDCNN_UNROLL
  for (int row = 0; row < 2 * Tile::kMTiles; ++row) {
    const int m = row / 2, i = row % 2 * 2;
    const int oc = channel + 16 * m + row % 2 * 8;
    if (oc >= sizes.out_channels) continue;
    float bias = 0;
    if (args.bias) {
      bias = widen(load_constant(static_cast<const S*>(args.bias) + oc * args.bias_stride));
    }
    Pack<4, S> values;
    Pack<4, uint8_t> codes;
    FUSEDCNN_UNROLL
    for (int j = 0; j < 4; ++j) {
      const float (&top)[4] = acc[j][m][0], (&bottom)[4] = acc[j][m][1];
      const Pooled pooled =
          pool_window(top[i] + bias, top[i + 1] + bias, bottom[i] + bias, bottom[i + 1] + bias,
                      2 * (ow + j) + 1 < sizes.conv_w, 2 * oh + 1 < sizes.conv_h);
      values.values[j] = narrow<S>(pooled.value);
      codes.values[j] = static_cast<uint8_t>(pooled.code);
    }
    const Strides to = args.output_strides;
    const int64_t at = n * to.n + oc * to.c + oh * to.h + ow * to.w;
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

// args: input [N, C, H, W], weight [OC, C, 3, 3], bias [OC] or null, output and code
// [N, OC, OH, OW] (code may be null).
template <typename S, typename Tile>
FUSEDCNN_KERNEL_RESIDENT(Tile::kThreads, Tile::kResident)
forward_tensor_cores_kernel(ForwardArgs args, MmaSizes sizes) {
  constexpr int kMTiles = Tile::kMTiles, kSliceChannels = Tile::kPlanes * kPerWord<S>;
  SharedMemory memory;
  const Shared<uint32_t> inputs = memory.array<uint32_t>(2 * Tile::kInputStage);
  const Shared<uint32_t> fragments = memory.array<uint32_t>(Tile::kWeights);
  // Low parts of the slice in use, and whether each warp has met an extreme operand in it.
  constexpr int kSplit = Tile::kSplit ? 1 : 0;
  const Shared<uint32_t> inputs_low = memory.array<uint32_t>(kSplit * Tile::kInputStage);
  const Shared<uint32_t> fragments_low = memory.array<uint32_t>(kSplit * Tile::kWeights);
  const Shared<uint32_t> votes = memory.array<uint32_t>(kSplit * Tile::kWarps);
  const int lane = thread_index() % kWarp, g = lane / 4, t = lane % 4;
  const int first_window = thread_index() / kWarp * 16;
  // The pixel of column g in tile (0, 0), and this thread's rows of words.
  const int b_window = first_window + g / 2 * 4;
  const int b_place = b_window / Tile::kTileW * 2 * Tile::kPitch + Tile::kLead +
                      b_window % Tile::kTileW * 2 + g % 2 + t % Tile::kPlanes * Tile::kPlane;

  const auto fetch = [&](const TileWalk& task, int first, int into) {
    if (!task.done(sizes.grid)) {
      fetch_planes<S, Tile>(args, sizes, task, first, inputs + into * Tile::kInputStage);
    }
    commit_copies();
  };
  int stage = 0;
  fetch(TileWalk(sizes.grid), 0, stage);

  int weights_of = -1;           // channel block whose only slice of weights is in shared memory
  bool extreme_weights = false;  // among those that this thread fetched last
  for (TileWalk walk(sizes.grid); !walk.done(sizes.grid); walk.advance(sizes.grid)) {
    const int channel_block = walk.channel_block(sizes.grid);
    float acc[4][kMTiles][2][4];  // [j][tile of M][dy][register]
    FUSEDCNN_UNROLL
    for (int i = 0; i < kMTiles * 32; ++i) {
      acc[i / 8 / kMTiles][i / 8 % kMTiles][i / 4 % 2][i % 4] = 0;
    }

    for (int channel = 0; channel < sizes.channels; channel += kSliceChannels, stage ^= 1) {
      TileWalk next = walk;  // the slice after this one, of the next task after the last
      int next_channel = channel + kSliceChannels;
      if (next_channel >= sizes.channels) next_channel = 0, next.advance(sizes.grid);
      fetch(next, next_channel, stage ^ 1);
      if (sizes.channels > kSliceChannels || weights_of != channel_block) {
        extreme_weights =
            fetch_fragments<S, Tile>(args, sizes, channel_block, channel, fragments, fragments_low);
        weights_of = channel_block;
      }
      wait_copies<1>();
      const Shared<uint32_t> input = inputs + stage * Tile::kInputStage;
      if constexpr (Tile::kSplit) {
        const bool met = split_planes<Tile>(sizes, input, inputs_low);
        const uint32_t vote = ballot(met || extreme_weights);
        if (lane == 0) votes[thread_index() / kWarp] = vote;
      } else if constexpr (sizeof(S) == 4) {
        round_planes<Tile>(sizes, input);
      }
      sync_threads();
      if constexpr (Tile::kSplit) {
        uint32_t any = 0;
        FUSEDCNN_UNROLL
        for (int warp = 0; warp < Tile::kWarps; ++warp) any |= votes[warp];
        if (any) {  // in all warps alike
          const int first = first_window + 4 * t;
          const int place =
              first / Tile::kTileW * 2 * Tile::kPitch + Tile::kLead + first % Tile::kTileW * 2;
          multiply_plainly<Tile>(input, inputs_low, place, fragments, fragments_low, acc);
          sync_threads();  // as below
          continue;
        }
      }
      Shared<uint32_t> pixels = input + b_place, pixels_low = inputs_low + b_place;
      Shared<uint32_t> fragment = fragments + lane * 4, fragment_low = fragments_low + lane * 4;
      multiply_slice<S, Tile>(pixels, pixels_low, fragment, fragment_low, t, acc);
      sync_threads();  // the next but one overwrites this stage, the next the weights
    }

    const int window = first_window + 4 * t;
    const int oh = walk.tile_h(sizes.grid) * Tile::kTileH + window / Tile::kTileW;
    const int ow = walk.tile_w(sizes.grid) * Tile::kTileW + window % Tile::kTileW;
    if (oh >= sizes.out_h || ow >= sizes.out_w) continue;
    store_windows<S, Tile>(args, sizes, walk.n(), channel_block * Tile::kChannels + g, oh, ow, acc);
  }
  wait_copies<0>();
}

// ---- host ---------------------------------------------------------------------------------------

template <typename S>
MmaSizes mma_sizes(const ForwardArgs& args) {
  constexpr int64_t kBytes = sizeof(S);
  const Geometry& g = args.geometry;
  MmaSizes s{};
  static_cast<MapSizes&>(s) = map_sizes(g);
  const Strides in = args.input_strides, out = args.output_strides;
  s.pixels_first = in.c == 1 && g.in_channels > 1;
  s.input_pairs = in.w == 1 && s.padding_w == 1 && s.in_w % 2 == 0 &&
                  aligned(args.input, kBytes, 2 * kBytes, {in.n, in.c, in.h});
  s.channel_pairs =
      in.c == 1 && g.in_channels % 2 == 0 && aligned(args.input, kBytes, 4, {in.n, in.h, in.w});
  s.output_fours = out.w == 1 && s.out_w % 4 == 0 &&
                   aligned(args.output, kBytes, 4 * kBytes, {out.n, out.c, out.h}) &&
                   aligned(args.code, 1, 4, {out.n, out.c, out.h});
  return s;
}

template <typename S, typename Tile>
void launch_forward_tensor_cores(const ForwardArgs& args, const Execution& execution) {
  MmaSizes sizes = mma_sizes<S>(args);
  sizes.grid = tile_grid(args.geometry, Tile::kTileH, Tile::kTileW, Tile::kChannels);
  launch("forward_tensor_cores", forward_tensor_cores_kernel<S, Tile>, sizes.grid.blocks,
         Tile::kThreads, Tile::shared(), execution, args, sizes);
}

// Calls body(Tile{}) with the tile for a geometry.
template <int Planes, int Products, typename Body>
auto with_mma_tile(const Geometry& g, const Body& body) {
  // 8 x 16 windows unless 8 x 8 leave less of their tiles empty, or 128 registers are too few.
  const auto empty = [&](int tile_w) { return (g.w.out + tile_w - 1) / tile_w * tile_w; };
  if (g.out_channels <= 16) return body(MmaTile<8, 16, 1, Planes, Products>{});
  if constexpr (Products == 1) {
    if (empty(16) <= empty(8)) return body(MmaTile<8, 16, 2, Planes, Products>{});
  }
  return body(MmaTile<8, 8, 2, Planes, Products>{});
}

template <typename S, int Planes, int Products>
void forward_tensor_cores_planes(const ForwardArgs& args, const Execution& execution) {
  with_mma_tile<Planes, Products>(args.geometry, [&](auto tile) {
    launch_forward_tensor_cores<S, decltype(tile)>(args, execution);
  });
}

}  // namespace
}  // namespace fusedcnn::cuda
