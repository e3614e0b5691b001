// Forward on tensor cores: 3x3 convolution of stride 1 under a 2x2 pool of stride 2, in bfloat16,
// float16 or float32 rounded to tf32; sums in float.
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
// Outputs in channels_last are written one by one. These are counts; an H200 took 31 (39) ns an
// image of 3 -> 16 and 25 (40) of 16 -> 32, at 1,024 images.
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
  static constexpr int kInputStage = Planes * kPlane;
  static constexpr int kWeights = kSteps * MTiles * kWarp * 4;
  static_assert((TileW == 16 || TileW == 8) && kPitch >= kLead + kCols && kPlane % 8 == 2);

  // Blocks to a multiprocessor: 512 threads have all the registers that they need, and 768 where
  // accumulators and planes are few.
  static constexpr int kResident = (MTiles == 1 && Planes == 2 ? 768 : 512) / kThreads;

  static constexpr int64_t shared(int slices) {
    return shared_bytes<uint32_t>(2 * kInputStage) + shared_bytes<uint32_t>(slices * kWeights);
  }
};

struct MmaSizes : MapSizes {
  TileGrid grid;
  bool pixels_first;   // channels are neighbours in memory
  bool input_pairs;    // two pixels of a row can be copied at once
  bool channel_pairs;  // two channels of a pixel can
  bool output_fours;   // four windows of a row can be written at once
  int slices;          // of channels
};

template <int N>
struct Width {
  static constexpr int value = N;
};

// Calls body(plane, row, col, width) for the words of a stage that this thread fetches: `width`
// neighbours, 1 or 2. A few at a time, so that the loads of all are under way before the first
// arrives.
template <typename Tile, typename Body>
FUSEDCNN_DEVICE void for_words(const MmaSizes& sizes, const Body& body) {
  if (sizes.input_pairs) {
    constexpr int kPairs = (Tile::kCols - 2) / 2, kPlaneRows = Tile::kPlanes * Tile::kRows;
    FUSEDCNN_UNROLL_TWICE
    for (int i = thread_index(); i < kPlaneRows * kPairs; i += Tile::kThreads) {
      const int row = i / kPairs;
      body(row / Tile::kRows, row % Tile::kRows, 1 + 2 * (i % kPairs), Width<2>{});
    }
    FUSEDCNN_NO_UNROLL
    for (int i = thread_index(); i < kPlaneRows * 2; i += Tile::kThreads) {  // the halos
      const int row = i / 2;
      body(row / Tile::kRows, row % Tile::kRows, i % 2 ? Tile::kCols - 1 : 0, Width<1>{});
    }
  } else {
    constexpr int kPlaces = Tile::kRows * Tile::kCols;
    FUSEDCNN_NO_UNROLL
    for (int i = thread_index(); i < Tile::kPlanes * kPlaces; i += Tile::kThreads) {
      const int plane = sizes.pixels_first ? i % Tile::kPlanes : i / kPlaces;
      const int place = sizes.pixels_first ? i / Tile::kPlanes : i % kPlaces;
      body(plane, place / Tile::kCols, place % Tile::kCols, Width<1>{});
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
  for_words<Tile>(sizes, [&](int plane, int row, int col, auto width) {
    const int c = first + plane * kPerWord<S>, h = h0 + row, w = w0 + col;
    const bool real = inside(h, sizes.in_h) && inside(w, sizes.in_w) && c < sizes.channels;
    const S* const from = real ? image + c * strides.c + h * strides.h + w * strides.w : image;
    const Shared<uint32_t> word =
        to + (plane * Tile::kPlane + row * Tile::kPitch + Tile::kLead + col);
    if constexpr (sizeof(S) == 4) {
      constexpr int kBytes = 4 * decltype(width)::value;
      copy_async<kBytes>(word, reinterpret_cast<const uint32_t*>(from), real ? kBytes : 0);
    } else if constexpr (decltype(width)::value == 2) {
      // Of two channels; their first pixels make a word, and their second.
      uint32_t low = 0, high = 0;
      if (real) low = load_constant(reinterpret_cast<const uint32_t*>(from));
      if (real && c + 1 < sizes.channels) {
        high = load_constant(reinterpret_cast<const uint32_t*>(from + strides.c));
      }
      store_pack(word,
                 Pack<2, uint32_t>{{(low & 0xffff) | high << 16, low >> 16 | (high & 0xffff0000)}});
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
  for_words<Tile>(sizes, [&](int plane, int row, int col, auto width) {
    const Shared<uint32_t> word =
        stage + (plane * Tile::kPlane + row * Tile::kPitch + Tile::kLead + col);
    FUSEDCNN_UNROLL
    for (int i = 0; i < decltype(width)::value; ++i) word[i] = to_tf32(float_from(word[i]));
  });
}

// Word i of the weights of the same channels, as fragments: [step][tile of M][lane][register].
// Zeros behind the last tap, channel and output channel.
template <typename S, typename Tile>
FUSEDCNN_DEVICE uint32_t fragment_word(const ForwardArgs& args, const MmaSizes& sizes,
                                       int channel_block, int first, int i) {
  const Strides strides = args.weight_strides;
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
    return to_tf32(real ? load_constant(from) : 0.f);
  } else {
    S low{}, high{};
    if (real) low = load_constant(from);
    if (real && c + 1 < sizes.channels) high = load_constant(from + strides.c);
    return two_halves(low, high);
  }
}

// Fetches all those words. Several of a thread's are under way before the first arrives.
template <typename S, typename Tile>
FUSEDCNN_DEVICE void fetch_fragments(const ForwardArgs& args, const MmaSizes& sizes,
                                     int channel_block, int first, Shared<uint32_t> to) {
  constexpr int kAtOnce = 6;
  FUSEDCNN_NO_UNROLL
  for (int i = thread_index(); i < Tile::kWeights; i += kAtOnce * Tile::kThreads) {
    uint32_t words[kAtOnce];
    FUSEDCNN_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      words[j] = fragment_word<S, Tile>(args, sizes, channel_block, first, i + j * Tile::kThreads);
    }
    FUSEDCNN_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      const int at = i + j * Tile::kThreads;
      if (at < Tile::kWeights) to[at] = words[j];
    }
  }
}

// Multiplies a slice of channels, all its steps: rows t and t + 4 of each. The pointers are this
// thread's own in the first.
template <typename S, typename Tile>
FUSEDCNN_DEVICE void multiply_slice(Shared<uint32_t> pixels, Shared<uint32_t> fragment, int t,
                                    float (&acc)[4][Tile::kMTiles][2][4]) {
  // All steps at once, or a row of taps: more would be loaded ahead than there are registers.
  constexpr int kSteps = Tile::kPlanes == 8 ? 3 : Tile::kSteps;
  FUSEDCNN_NO_UNROLL
  for (int done = 0; done < Tile::kSteps; done += kSteps) {
    FUSEDCNN_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[Tile::kMTiles][4];
      FUSEDCNN_UNROLL
      for (int m = 0; m < Tile::kMTiles; ++m) {
        load_row(fragment + (step * Tile::kMTiles + m) * kWarp * 4, a[m]);
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
        uint32_t b[2][2];
        FUSEDCNN_UNROLL
        for (int dy = 0; dy < 2; ++dy) {
          FUSEDCNN_UNROLL
          for (int i = 0; i < 2; ++i) {
            const int at = offset[i] + dy * Tile::kPitch + 2 * j;
            // Zero times what lies there would be NaN where that is infinite.
            b[dy][i] = real[i] ? static_cast<uint32_t>(pixels[at]) : 0u;
          }
          FUSEDCNN_UNROLL
          for (int m = 0; m < Tile::kMTiles; ++m) multiply(S{}, acc[j][m][dy], a[m], b[dy]);
        }
      }
    }
    pixels += Tile::kPitch;  // the next row of taps
    fragment += kSteps * Tile::kMTiles * kWarp * 4;
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
  const Shared<uint32_t> fragments = memory.array<uint32_t>(sizes.slices * Tile::kWeights);
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

  int weights_of = -1;  // channel block whose weights are in shared memory
  for (TileWalk walk(sizes.grid); !walk.done(sizes.grid); walk.advance(sizes.grid)) {
    const int channel_block = walk.channel_block(sizes.grid);
    if (weights_of != channel_block) {
      for (int slice = 0; slice < sizes.slices; ++slice) {
        fetch_fragments<S, Tile>(args, sizes, channel_block, slice * kSliceChannels,
                                 fragments + slice * Tile::kWeights);
      }
      weights_of = channel_block;
    }
    float acc[4][kMTiles][2][4];  // [j][tile of M][dy][register]
    FUSEDCNN_UNROLL
    for (int i = 0; i < kMTiles * 32; ++i) {
      acc[i / 8 / kMTiles][i / 8 % kMTiles][i / 4 % 2][i % 4] = 0;
    }

    Shared<uint32_t> fragment = fragments + lane * 4;
    for (int channel = 0; channel < sizes.channels; channel += kSliceChannels, stage ^= 1) {
      TileWalk next = walk;  // the slice after this one, of the next task after the last
      int next_channel = channel + kSliceChannels;
      if (next_channel >= sizes.channels) next_channel = 0, next.advance(sizes.grid);
      fetch(next, next_channel, stage ^ 1);
      wait_copies<1>();
      const Shared<uint32_t> input = inputs + stage * Tile::kInputStage;
      if constexpr (sizeof(S) == 4) round_planes<Tile>(sizes, input);
      sync_threads();
      multiply_slice<S, Tile>(input + b_place, fragment, t, acc);
      fragment = fragment + Tile::kWeights;
      sync_threads();  // the next but one overwrites this stage, and the next task weights
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
  // Blocks that all have a place at once on sm_90's 132 multiprocessors: each fetches its weights
  // once, and an image while it multiplies another.
  sizes.grid =
      tile_grid(args.geometry, Tile::kTileH, Tile::kTileW, Tile::kChannels, 132 * Tile::kResident);
  sizes.slices = parts(args.geometry.in_channels, Tile::kPlanes * kPerWord<S>);
  launch("forward_tensor_cores", forward_tensor_cores_kernel<S, Tile>, sizes.grid.blocks,
         Tile::kThreads, Tile::shared(sizes.slices), execution, args, sizes);
}

// Calls body(Tile{}) with the tile for a geometry.
template <int Planes, typename Body>
auto with_mma_tile(const Geometry& g, const Body& body) {
  // 8 x 16 windows unless 8 x 8 leave less of their tiles empty.
  const auto empty = [&](int tile_w) { return (g.w.out + tile_w - 1) / tile_w * tile_w; };
  if (g.out_channels <= 16) return body(MmaTile<8, 16, 1, Planes>{});
  if (empty(16) <= empty(8)) return body(MmaTile<8, 16, 2, Planes>{});
  return body(MmaTile<8, 8, 2, Planes>{});
}

template <typename S, int Planes>
void forward_tensor_cores_planes(const ForwardArgs& args, const Execution& execution) {
  with_mma_tile<Planes>(args.geometry, [&](auto tile) {
    launch_forward_tensor_cores<S, decltype(tile)>(args, execution);
  });
}

}  // namespace

const char* why_not_tensor_cores_3x3(const Problem& problem, const Target& target) {
  if (problem.type == DataType::kFloat32 && !target.allow_tf32) return "tf32 is not allowed";
  if (const char* reason = why_not_sm_80(target.device)) return reason;
  return why_not_3x3_block(problem);
}

const char* why_not_forward_tensor_cores_3x3(const Problem& problem, const Target& target) {
  if (problem.geometry.in_channels > 32) return "more than 32 input channels";
  return why_not_tensor_cores_3x3(problem, target);
}

void forward_tensor_cores_3x3(const ForwardArgs& args, const Execution& execution) {
  for_block_storage(args.type, [&](auto storage) {
    using S = decltype(storage);
    constexpr int kFew = 4 / kPerWord<S>;  // planes of up to four channels
    if (args.geometry.in_channels <= 4) {
      forward_tensor_cores_planes<S, kFew>(args, execution);
    } else {
      forward_tensor_cores_planes<S, 8>(args, execution);
    }
  });
}

}  // namespace fusedcnn::cuda
