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
// Weights lie as fragments, 128 bits a lane; a block fetches those of all input channels once for
// its output channels, which it keeps where a launch has several images.
//
// A step costs a warp 16 loads of 32 bits and MTiles of 128: 16 + 4 MTiles wavefronts, for 8 MTiles
// products. Pixels come by way of registers, which round them to tf32 and pair the channels of
// halves; blocks that share a multiprocessor hide one another's loads.
//
// Warp instructions an image, from the machine code for sm_90 (nvcc 13.0; input and output
// contiguous, blocks of many images), and nanoseconds: of a GPU of 132 multiprocessors at 1.98 GHz
// that issues one from each of its four schedulers in every cycle; and of the bytes at 4.3 TB/s.
//
//                     pixels  products  pooling  walk    all     ns   KiB    ns
//   3->16 at 32 bf16   1,500     1,650    3,700   900  7,750    7.4    18   4.2
//               tf32   1,650     2,200    3,700   900  8,450    8.1    32   7.6
//   16->32 at 16 bf16    980     1,220    1,600   260  4,060    3.9    14   3.3
//               tf32   2,080     2,430    1,600   400  6,510    6.2    26   6.2
//
// The version before had two to three times the instructions, and an H200 took 31 (tf32: 39) and
// 25 (40) ns an image of 1,024, most of them waiting. This one has not met a GPU.
#include "cuda/kernels/forward_tensor_cores_3x3_stage.h"

namespace fusedcnn::cuda {
namespace {

// Fetches the weights of a slice of channels as fragments: [step][tile of M][lane][register].
// Zeros stand behind the last tap, channel and output channel. Several words of a thread are under
// way before the first arrives.
template <typename S, typename Tile>
FUSEDCNN_DEVICE void fetch_fragments(const ForwardArgs& args, const MmaSizes& sizes,
                                     int channel_block, int first, Shared<uint32_t> to) {
  constexpr int kUnit = 4 * kWarp, kUnits = Tile::kSteps * Tile::kMTiles, kAtOnce = 6;
  constexpr int kWays = Tile::kThreads / kUnit;  // units that the block's threads fetch at once
  static_assert(Tile::kThreads % kUnit == 0);
  const Strides strides = args.weight_strides;
  // Register and lane are this thread's own, and so are its row of words and output channel.
  const int part = thread_index() % 4, lane = thread_index() / 4 % kWarp;
  const int oc = channel_block * Tile::kChannels + lane / 4 + part % 2 * 8;
  const int k = lane % 4 + part / 2 * 4;
  const int c = first + k % Tile::kPlanes * kPerWord<S>;
  const S* const weight = static_cast<const S*>(args.weight) + oc * strides.n + c * strides.c;
  FUSEDCNN_NO_UNROLL
  for (int i = thread_index() / kUnit; i < kUnits; i += kAtOnce * kWays) {
    uint32_t words[kAtOnce];
    FUSEDCNN_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      const int unit = i + j * kWays, tile = unit % Tile::kMTiles;
      const int tap = unit / Tile::kMTiles * Tile::kTapsPerStep + k / Tile::kPlanes;
      const bool real = oc + 16 * tile < sizes.out_channels && tap < 9 && c < sizes.channels;
      const S* const from =
          weight + 16 * tile * strides.n + tap / 3 * strides.h + tap % 3 * strides.w;
      if constexpr (sizeof(S) == 4) {
        words[j] = to_tf32(real ? load_constant(from) : 0.f);
      } else {
        S low{}, high{};
        if (real) low = load_constant(from);
        if (real && c + 1 < sizes.channels) high = load_constant(from + strides.c);
        words[j] = two_halves(low, high);
      }
    }
    FUSEDCNN_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      const int unit = i + j * kWays;
      if (unit < kUnits) to[unit * kUnit + thread_index() % kUnit] = words[j];
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
                                   int channel, int oh, int ow, Shared<float> biases,
                                   const float (&acc)[4][Tile::kMTiles][2][4]) {
  if (channel >= sizes.out_channels) return;
  const int64_t at = n * args.output_strides.n + channel * sizes.output_c + oh * sizes.output_h +
                     ow * sizes.output_w;
  S* const output = static_cast<S*>(args.output) + at;
  uint8_t* const code = args.code ? static_cast<uint8_t*>(args.code) + at : nullptr;
  FUSEDCNN_UNROLL
  for (int row = 0; row < 2 * Tile::kMTiles; ++row) {
    const int m = row / 2, i = row % 2 * 2;
    if (channel + 8 * row >= sizes.out_channels) continue;
    const int to = 8 * row * sizes.output_c;
    float v[4][4];
    FUSEDCNN_UNROLL
    for (int j = 0; j < 16; ++j) v[j / 4][j % 4] = acc[j / 4][m][j / 2 % 2][i + j % 2];
    Pooled pooled[4];
    const float bias = biases[8 * row];
    const bool whole = windows_are_whole<4>(sizes, oh, ow);
    if (!pool_plain_windows(v, bias, pooled) || !whole) {
      pool_windows_in_order(v, bias, sizes, oh, ow, pooled);
    }
    Pack<4, S> values;
    Pack<4, uint8_t> codes;
    FUSEDCNN_UNROLL
    for (int j = 0; j < 4; ++j) {
      values.values[j] = narrow<S>(pooled[j].value);
      codes.values[j] = static_cast<uint8_t>(pooled[j].code);
    }
    if (sizes.output_fours) {
      store_pack(output + to, values);
      if (code) store_pack(code + to, codes);
      continue;
    }
    FUSEDCNN_UNROLL
    for (int j = 0; j < 4; ++j) {
      if (ow + j >= sizes.out_w) continue;
      output[to + j * sizes.output_w] = values.values[j];
      if (code) code[to + j * sizes.output_w] = codes.values[j];
    }
  }
}

// args: input [N, C, H, W], weight [OC, C, 3, 3], bias [OC] or null, output and code
// [N, OC, OH, OW] (code may be null).
template <typename S, typename Tile>
FUSEDCNN_KERNEL_RESIDENT(Tile::kThreads, Tile::kResident)
forward_tensor_cores_kernel(ForwardArgs args, MmaSizes sizes) {
  constexpr int kMTiles = Tile::kMTiles, kSliceChannels = Tile::kPlanes * kPerWord<S>;
  const int slices = Tile::kPlanes < 8 ? 1 : sizes.slices;  // few planes hold all channels
  SharedMemory memory;
  const Shared<uint32_t> stage = memory.array<uint32_t>(Tile::kStage);
  const Shared<float> biases = memory.array<float>(Tile::kChannels);
  const Shared<uint32_t> fragments = memory.array<uint32_t>(slices * Tile::kWeights);
  const int lane = thread_index() % kWarp, t = lane % 4, column = lane / 4;
  // The pixel of this thread's column in tile (0, 0), and its rows of words.
  const int b_window = thread_index() / kWarp * 16 + column / 2 * 4;
  const int b_place = b_window / Tile::kTileW * 2 * Tile::kPitch + Tile::kLead +
                      b_window % Tile::kTileW * 2 + column % 2 + t % Tile::kPlanes * Tile::kPlane;

  for (int i = 4 * thread_index(); i < Tile::kStage; i += 4 * Tile::kThreads) {
    store_pack(stage + i, Pack<4, uint32_t>{});
  }
  TileWalk walk(sizes.grid);
  int weights_of = -1;  // channel block whose weights and bias are in shared memory
  while (!walk.done(sizes.grid)) {
    if (weights_of != walk.channel_block()) {
      weights_of = walk.channel_block();
      sync_threads();  // those of the task before are no longer read
      for (int i = 0; i < slices; ++i) {
        fetch_fragments<S, Tile>(args, sizes, weights_of, i * kSliceChannels,
                                 fragments + i * Tile::kWeights);
      }
      for (int i = thread_index(); i < Tile::kChannels; i += Tile::kThreads) {
        const int oc = weights_of * Tile::kChannels + i;
        const bool real = args.bias && oc < sizes.out_channels;
        biases[i] =
            real ? widen(load_constant(static_cast<const S*>(args.bias) + oc * args.bias_stride))
                 : 0.f;
      }
    }
    float acc[4][kMTiles][2][4];  // [j][tile of M][dy][register]
    FUSEDCNN_UNROLL
    for (int i = 0; i < kMTiles * 32; ++i) {
      acc[i / 8 / kMTiles][i / 8 % kMTiles][i / 4 % 2][i % 4] = 0;
    }

    for (int slice = 0; slice < slices; ++slice) {
      const int first = slice * kSliceChannels;
      sync_threads();  // what lies there is no longer read
      copy_slice<S, Tile>(args, sizes, walk, first, stage);
      sync_threads();
      multiply_slice<S, Tile>(stage + b_place, fragments + (slice * Tile::kWeights + lane * 4), t,
                              acc);
    }

    // The four windows that this thread pools, and its row of the tiles of M.
    const int thread = fresh_thread_index(), g = thread % kWarp / 4;
    const int window = thread / kWarp * 16 + thread % 4 * 4;
    const int oh = walk.tile_h() * Tile::kTileH + window / Tile::kTileW;
    const int ow = walk.tile_w() * Tile::kTileW + window % Tile::kTileW;
    if (oh < sizes.out_h && ow < sizes.out_w) {
      const int channel = walk.channel_block() * Tile::kChannels + g;
      store_windows<S, Tile>(args, sizes, walk.n(), channel, oh, ow, biases + g, acc);
    }
    walk.advance(sizes.grid);
  }
}

// ---- host ---------------------------------------------------------------------------------------

template <typename S, typename Tile>
MmaSizes mma_sizes(const ForwardArgs& args, int multiprocessors) {
  constexpr int64_t kBytes = sizeof(S);
  constexpr int kVectorChannels = 4 * kPerWord<S>;
  const Geometry& g = args.geometry;
  const Strides in = args.input_strides, out = args.output_strides;
  MmaSizes s{};
  static_cast<MapSizes&>(s) = map_sizes(g);
  // As many blocks as have a place at once.
  s.grid = tile_grid(g, Tile::kTileH, Tile::kTileW, Tile::kChannels,
                     int64_t{multiprocessors} * Tile::kResident);
  s.slices = parts(g.in_channels > 0 ? g.in_channels : 1, Tile::kPlanes * kPerWord<S>);
  s.planes = s.slices == 1 ? parts(g.in_channels, kPerWord<S>) : Tile::kPlanes;
  s.access = Access::kWords;
  if (has_small_images(in, g)) {
    s.input_c = static_cast<uint32_t>(in.c);
    s.input_h = static_cast<uint32_t>(in.h);
    s.input_w = static_cast<uint32_t>(in.w);
    if (in.w == 1 && s.padding_w == 1 && s.in_w % 4 == 0 &&
        aligned(args.input, kBytes, 4 * kBytes, {in.n, in.c, in.h})) {
      s.access = Access::kRows;
    } else if (Tile::kPlanes >= 4 && in.c == 1 && g.in_channels % kVectorChannels == 0 &&
               aligned(args.input, kBytes, 16, {in.n, in.h, in.w})) {
      s.access = Access::kPixels;
    }
  }
  s.pixels_first = in.c == 1 && g.in_channels > 1;
  s.channel_pairs =
      in.c == 1 && g.in_channels % 2 == 0 && aligned(args.input, kBytes, 4, {in.n, in.h, in.w});
  s.halos = s.grid.tiles_w > 1 || s.in_w > 2 * Tile::kTileW;
  // Dense, of fewer than 2^30 elements an image: see why_not_3x3_block.
  s.output_c = static_cast<int>(out.c);
  s.output_h = static_cast<int>(out.h);
  s.output_w = static_cast<int>(out.w);
  s.output_fours = out.w == 1 && s.out_w % 4 == 0 &&
                   aligned(args.output, kBytes, 4 * kBytes, {out.n, out.c, out.h}) &&
                   aligned(args.code, 1, 4, {out.n, out.c, out.h});
  return s;
}

template <typename S, typename Tile>
void launch_forward_tensor_cores(const ForwardArgs& args, const Execution& execution) {
  const MmaSizes sizes = mma_sizes<S, Tile>(args, execution.multiprocessors);
  launch("forward_tensor_cores", forward_tensor_cores_kernel<S, Tile>, sizes.grid.blocks,
         Tile::kThreads, Tile::shared(sizes.slices), execution, args, sizes);
}

// Calls body(Tile{}) with the tile for a geometry.
template <int Planes, typename Body>
auto with_mma_tile(const Geometry& g, int multiprocessors, const Body& body) {
  using Small = MmaTile<8, 8, 1, Planes>;
  using Wide = MmaTile<8, 16, 1, Planes>;
  using Square = MmaTile<8, 8, 2, Planes>;
  using Large = MmaTile<8, 16, 2, Planes>;
  // 8 x 16 windows unless 8 x 8 leave less of their tiles empty.
  const auto empty = [&](int tile_w) { return (g.w.out + tile_w - 1) / tile_w * tile_w; };
  const bool wide = empty(16) <= empty(8);
  if (g.out_channels <= 16) {
    return wide && fills_gpu<Wide>(g, multiprocessors) ? body(Wide{}) : body(Small{});
  }
  if (wide && fills_gpu<Large>(g, multiprocessors)) return body(Large{});
  return fills_gpu<Square>(g, multiprocessors) ? body(Square{}) : body(Small{});
}

template <typename S, int Planes>
void forward_tensor_cores_planes(const ForwardArgs& args, const Execution& execution) {
  with_mma_tile<Planes>(args.geometry, execution.multiprocessors, [&](auto tile) {
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
