// Forward, float32 on CUDA cores: 3x3 convolution of stride 1 under a 2x2 pool of stride 2.
//
// A thread owns two windows side by side for eight output channels: 64 accumulators, which never
// leave its registers; bias, ReLU, maximum and code are taken there. A block owns a tile of windows
// of one image for 8 * Groups output channels. Input, with its halo, comes through shared memory,
// kSlice channels at a time, by asynchronous copies: while one slice is used, the next is under
// way, also across tasks. So do weights of more than 16 input channels; those of fewer are fetched
// once for a block's output channels, which it keeps where a launch has several images. They lie
// [channel][tap][output channel], so that the lanes of a warp, which have different windows, all
// read the same ones.
//
// Per input channel a thread does 2 * 4 * 8 * 9 = 576 multiply-adds and loads
//   its windows' pixels, 4 rows of 6: 4 x (32 + 128 + 32 bits) = 12 loads, 48 wavefronts a warp
//   the weights, 9 x 8: 18 loads of 128 bits, the same for all lanes: 18 wavefronts
// that is 19 multiply-adds to a load, 8.7 to a wavefront, where 4 would keep shared memory (one
// wavefront a cycle) level with the four FMA pipes (4 a cycle).
//
// Up to 16 channels, 144 products, are one chain of additions. Of more, each 16 channels are one,
// and chains are added up: 64 registers of totals and, for 9,216 multiply-adds, 64 additions and as
// many zeros. One chain for all would err more than the stock layers do. With normal random data,
// the root mean square of the errors, in units of 2^-24 of the outputs' own size, is
//                          64    256    512 channels
//   one chain             7.6     16     23
//   chains of 16 channels 3.8    3.6    4.0
//   chains of 64 products 2.6    3.3    3.7
//   torch on a CPU        4.3    4.4    4.0, with one chain up to 16 channels, too
//
// For sm_90's 128 multiply-adds a cycle at 1.98 GHz and 132 multiprocessors: 3 -> 16 channels at
// 32x32 is 442,368 multiply-adds an image, 13.2 ns; 16 -> 32 at 16x16 1,179,648, 35.3 ns. Memory
// moves 32 KiB and 26 KiB: 7.6 and 6.2 ns at 4.3 TB/s. So the bound is arithmetic, if issue slots
// go to little else. Warp instructions an image, from the machine code for sm_90 (nvcc 13.0; input
// and output contiguous, blocks of many images):
//
//                   multiply-adds   their loads  copies  pooling  walk and rest     all     ns
//   3->16 at 32x32         13,824           840     970    3,180            830  19,640   18.8
//   16->32 at 16x16        36,864         2,240   1,950    1,590            760  43,400   41.5
//
// The version before had a third more, and an H200 took 40 and 88 ns an image of 1,024. This one
// has not met a GPU.

#include <type_traits>

#include "cuda/kernels/block_3x3.h"

namespace fusedcnn::cuda {
namespace {

constexpr int kSlice = 4;           // input channels in shared memory at a time
constexpr int kThreadChannels = 8;  // output channels of a thread
constexpr int kPatch = 6;           // pixels of its two windows in a row
// Slices whose products are summed in one chain: 144 products. Longer sums are taken in runs of so
// many and added up: see above.
constexpr int kChainSlices = 4;

// TileH x TileW windows for Groups * 8 output channels. 512 threads' worth of blocks, of 128
// registers each, fill the register file of a multiprocessor; where sums take several chains, 384,
// of 168. On sm_90 shared memory has room for as many, but of Small with 16 input channels for
// half.
template <int Groups, int TileH, int TileW, bool Chains>
struct WindowsTile {
  static constexpr int kTileH = TileH, kTileW = TileW;
  static constexpr bool kChains = Chains;
  static constexpr int kPairs = TileH * TileW / 2;  // of windows
  static constexpr int kThreads = Groups * kPairs;
  static constexpr int kResident = (Chains ? 384 : 512) / kThreads;
  static constexpr int kChannels = Groups * kThreadChannels;
  static constexpr int kRows = 2 * TileH + 2, kCols = 2 * TileW + 2;
  // A tile's column 0, the left halo, lies at kLead of a row, so that column 1 is aligned to 16
  // bytes: with a padding of 1, that is where the image's rows begin.
  static constexpr int kLead = 3;
  // Eight lanes read 16 bytes each in one wavefront. Where a row of the tile has but 4 or 2 of
  // them, they reach over 2 or 4 rows of windows, two pitches apart: 16 or 8 banks.
  static constexpr int kPitch = TileW == 4 ? 20 : (kLead + kCols + 3) / 4 * 4;
  static constexpr int kPlane = kRows * kPitch;
  // Four more: copies of 8 taps x 4 output channels then go to 32 banks.
  static constexpr int kWeightPitch = kChannels + 4;
  static constexpr int kInputStage = kSlice * kPlane;
  static_assert(kPitch >= kLead + kCols && kPitch * 2 * TileW / 2 % 4 == 0);

  // Input channels whose weights are in shared memory: where sums are one chain, all of them.
  static constexpr int kWeightChannels = Chains ? 2 * kSlice : kChainSlices * kSlice;
  static constexpr int weights(int channels) {
    return (Chains ? kWeightChannels : channels) * 9 * kWeightPitch;
  }

  static constexpr int64_t shared(int channels) {
    return shared_bytes<float>(2 * kInputStage) + shared_bytes<float>(weights(channels)) +
           shared_bytes<float>(kChannels);
  }
};

// How a kernel gets at its tensors.
enum class InputAccess : int { kWords, kPixelWords, kRows };         // in which order, how wide
enum class OutputAccess : int { kSingle, kPairs, kChannelVectors };  // neighbours written at once

struct WindowsSizes : MapSizes {
  TileGrid grid;
  InputAccess input;
  OutputAccess output;
  bool halos;                        // whether pixels lie beside a tile that is read by rows
  uint32_t input_c, input_h;         // strides, of what is read by rows; may wrap elsewhere
  int output_c, output_h, output_w;  // strides
};

// Calls body(i) for this thread's share of 0 <= i < count.
template <typename Tile, typename Body>
FUSEDCNN_DEVICE void for_each(int count, const Body& body) {
  FUSEDCNN_NO_UNROLL
  for (int i = fresh_thread_index(); i < count; i += Tile::kThreads) body(i);
}

// Starts the copies of input channels from `first` on, `count` of them, for one task. Nothing is
// ever written to the halos of images that are no wider than a tile: the caller's zeros stay.
template <typename Tile>
FUSEDCNN_DEVICE void fetch_input(const ForwardArgs& args, const WindowsSizes& sizes,
                                 const TileWalk& walk, int first, int count, Shared<float> to) {
  const int h0 = walk.tile_h() * 2 * Tile::kTileH - sizes.padding_h;
  const int w0 = walk.tile_w() * 2 * Tile::kTileW - sizes.padding_w;
  const Strides strides = args.input_strides;
  const float* const image =
      static_cast<const float*>(args.input) + walk.n() * strides.n + first * strides.c;
  const auto copy_one = [&](int c, int row, int col) {
    const int h = h0 + row, w = w0 + col;
    copy_async<4>(to + (c * Tile::kPlane + row * Tile::kPitch + Tile::kLead + col),
                  image + c * strides.c + h * strides.h + w * strides.w,
                  inside(h, sizes.in_h) && inside(w, sizes.in_w) ? 4 : 0);
  };
  if (sizes.input == InputAccess::kRows) {
    constexpr int kFours = (Tile::kCols - 2) / 4;  // of a row, between the halos
    const int col = 1 + fresh_thread_index() % kFours * 4, w = w0 + col;
    const int in_h = w < sizes.in_w ? sizes.in_h : 0;
    FUSEDCNN_NO_UNROLL
    for (int i = fresh_thread_index() / kFours; i < count * Tile::kRows;
         i += Tile::kThreads / kFours) {
      const int c = i / Tile::kRows, row = i % Tile::kRows, h = h0 + row;
      copy_async<16>(to + (c * Tile::kPlane + row * Tile::kPitch + Tile::kLead + col),
                     image + (c * sizes.input_c + h * sizes.input_h + w), inside(h, in_h) ? 16 : 0);
    }
    if (!sizes.halos) return;
    for_each<Tile>(count * Tile::kRows * 2, [&](int i) {
      copy_one(i / 2 / Tile::kRows, i / 2 % Tile::kRows, i % 2 ? Tile::kCols - 1 : 0);
    });
  } else {
    const bool pixels_first = sizes.input == InputAccess::kPixelWords;
    for_each<Tile>(count * Tile::kRows * Tile::kCols, [&](int i) {
      const int place = pixels_first ? i / count : i % (Tile::kRows * Tile::kCols);
      copy_one(pixels_first ? i % count : i / (Tile::kRows * Tile::kCols), place / Tile::kCols,
               place % Tile::kCols);
    });
  }
}

// Starts the copies of the same channels' weights, to [channel][tap][output channel]; output
// channels that there are not get zeros.
template <typename Tile>
FUSEDCNN_DEVICE void fetch_weights(const ForwardArgs& args, const WindowsSizes& sizes,
                                   int channel_block, int first, int count, Shared<float> to) {
  static_assert(Tile::kThreads % Tile::kChannels == 0);
  const Strides strides = args.weight_strides;
  const int place = fresh_thread_index() % Tile::kChannels;
  const int oc = channel_block * Tile::kChannels + place;
  const float* const weight =
      static_cast<const float*>(args.weight) + oc * strides.n + first * strides.c;
  FUSEDCNN_NO_UNROLL
  for (int i = fresh_thread_index() / Tile::kChannels; i < 9 * count;
       i += Tile::kThreads / Tile::kChannels) {
    copy_async<4>(to + (i * Tile::kWeightPitch + place),
                  weight + i / 9 * strides.c + i % 9 / 3 * strides.h + i % 3 * strides.w,
                  oc < sizes.out_channels ? 4 : 0);
  }
}

// Writes what a thread owns: values and codes of two windows for eight output channels.
FUSEDCNN_DEVICE void store_windows(const ForwardArgs& args, const WindowsSizes& sizes, int64_t n,
                                   int channel, int oh, int ow,
                                   const Pooled (&pooled)[kThreadChannels][2]) {
  if (channel >= sizes.out_channels) return;
  const int64_t at = n * args.output_strides.n + channel * sizes.output_c + oh * sizes.output_h +
                     ow * sizes.output_w;
  float* const output = static_cast<float*>(args.output) + at;
  uint8_t* const code = args.code ? static_cast<uint8_t*>(args.code) + at : nullptr;
  const auto byte = [](int winner) { return static_cast<uint8_t>(winner); };
  if (sizes.output == OutputAccess::kChannelVectors) {  // of channels that all exist
    FUSEDCNN_UNROLL
    for (int j = 0; j < 2; ++j) {
      if (ow + j >= sizes.out_w) continue;
      Pack<8, uint8_t> codes;
      FUSEDCNN_UNROLL
      for (int o = 0; o < 8; o += 4) {
        Pack<4, float> values;
        FUSEDCNN_UNROLL
        for (int i = 0; i < 4; ++i) {
          values.values[i] = pooled[o + i][j].value;
          codes.values[o + i] = byte(pooled[o + i][j].code);
        }
        store_pack(output + j * sizes.output_w + o, values);
      }
      if (code) store_pack(code + j * sizes.output_w, codes);
    }
    return;
  }
  const int channels = sizes.out_channels - channel;  // that there are
  const auto store = [&](auto* to, const auto& value) {
    FUSEDCNN_UNROLL
    for (int o = 0; o < kThreadChannels; ++o, to += sizes.output_c) {
      using T = std::decay_t<decltype(*to)>;
      if (o >= channels) continue;
      if (sizes.output == OutputAccess::kPairs) {
        store_pack(to, Pack<2, T>{{value(pooled[o][0]), value(pooled[o][1])}});
        continue;
      }
      FUSEDCNN_UNROLL
      for (int j = 0; j < 2; ++j) {
        if (ow + j < sizes.out_w) to[j * sizes.output_w] = value(pooled[o][j]);
      }
    }
  };
  store(output, [](const Pooled& window) { return window.value; });
  if (code) store(code, [](const Pooled& window) { return static_cast<uint8_t>(window.code); });
}

// args: input [N, C, H, W], weight [OC, C, 3, 3], bias [OC] or null, output and code
// [N, OC, OH, OW] (code may be null).
template <typename Tile>
FUSEDCNN_KERNEL_RESIDENT(Tile::kThreads, Tile::kResident)
forward_cuda_cores_3x3_kernel(ForwardArgs args, WindowsSizes sizes) {
  SharedMemory memory;
  // Two stages [kSlice][kRows][kPitch], and weights [input channel][9][kWeightPitch].
  const Shared<float> inputs = memory.array<float>(2 * Tile::kInputStage);
  const Shared<float> biases = memory.array<float>(Tile::kChannels);
  const Shared<float> weights = memory.array<float>(Tile::weights(sizes.channels));
  const int group = thread_index() / Tile::kPairs, pair = thread_index() % Tile::kPairs;
  const int row = pair / (Tile::kTileW / 2), col = pair % (Tile::kTileW / 2) * 2;
  const auto weights_of = [&](int channel) {
    return weights + channel % Tile::kWeightChannels * 9 * Tile::kWeightPitch;
  };

  for_each<Tile>(2 * Tile::kInputStage / 4,
                 [&](int i) { store_pack(inputs + 4 * i, Pack<4, float>{}); });
  sync_threads();
  const auto fetch = [&](const TileWalk& task, int first, int into) {
    if (!task.done(sizes.grid)) {
      const int left = sizes.channels - first, count = left < kSlice ? left : kSlice;
      fetch_input<Tile>(args, sizes, task, first, count, inputs + into * Tile::kInputStage);
      if (Tile::kChains) {
        fetch_weights<Tile>(args, sizes, task.channel_block(), first, count,
                            weights_of(into * kSlice));
      }
    }
    commit_copies();
  };
  TileWalk walk(sizes.grid), next = walk;
  int stage = 0;
  fetch(walk, 0, stage);

  int channel_block = -1;  // whose bias is in shared memory, and weights where they stay
  for (; !walk.done(sizes.grid); walk = next) {
    if (channel_block != walk.channel_block()) {
      channel_block = walk.channel_block();
      sync_threads();  // the task before has read its bias
      for_each<Tile>(Tile::kChannels, [&](int i) {
        const int oc = channel_block * Tile::kChannels + i;
        const bool real = args.bias && oc < sizes.out_channels;
        biases[i] =
            real ? load_constant(static_cast<const float*>(args.bias) + oc * args.bias_stride)
                 : 0.f;
      });
      if (!Tile::kChains) {
        fetch_weights<Tile>(args, sizes, channel_block, 0, sizes.channels, weights);
        commit_copies();  // the wait for the first slice waits for these, too
      }
    }
    float acc[kThreadChannels][2][4];    // [output channel][window][element]
    float total[kThreadChannels][2][4];  // of the chains before
    FUSEDCNN_UNROLL
    for (int i = 0; i < kThreadChannels * 8; ++i) {
      acc[i / 8][i / 4 % 2][i % 4] = total[i / 8][i / 4 % 2][i % 4] = 0;
    }

    // Once where there are no channels.
    for (int channel = 0; !channel || channel < sizes.channels; channel += kSlice, stage ^= 1) {
      // The slice after this one, of the next task after the last.
      int following = channel + kSlice;
      if (following >= sizes.channels) following = 0, next.advance(sizes.grid);
      fetch(next, following, stage ^ 1);
      wait_copies<1>();
      sync_threads();
      const int left = sizes.channels - channel, count = left < kSlice ? left : kSlice;
      Shared<float> pixels =
          inputs + (stage * Tile::kInputStage + 2 * row * Tile::kPitch + Tile::kLead + 2 * col);
      Shared<float> taps =
          weights_of(Tile::kChains ? stage * kSlice : channel) + group * kThreadChannels;
      for (int c = 0; c < count; ++c) {
        float patch[4][kPatch];
        FUSEDCNN_UNROLL
        for (int y = 0; y < 4; ++y) {
          const Shared<float> from = pixels + y * Tile::kPitch;
          const Pack<4, float> middle = load_pack<4, float>(from + 1);
          patch[y][0] = from[0];
          FUSEDCNN_UNROLL
          for (int x = 0; x < 4; ++x) patch[y][1 + x] = middle.values[x];
          patch[y][5] = from[5];
        }
        FUSEDCNN_UNROLL
        for (int tap = 0; tap < 9; ++tap) {
          const int kh = tap / 3, kw = tap % 3;
          float weight[kThreadChannels];
          load_row(taps + tap * Tile::kWeightPitch, weight);
          FUSEDCNN_UNROLL
          for (int o = 0; o < kThreadChannels; ++o) {
            FUSEDCNN_UNROLL
            for (int i = 0; i < 8; ++i) {
              const int window = i / 4, y = i % 4 / 2, x = i % 2;
              acc[o][window][i % 4] = multiply_add(weight[o], patch[y + kh][2 * window + x + kw],
                                                   acc[o][window][i % 4]);
            }
          }
        }
        pixels += Tile::kPlane;
        taps += 9 * Tile::kWeightPitch;
      }
      sync_threads();  // the next but one overwrites this stage
      if (Tile::kChains && following && following % (kChainSlices * kSlice) == 0) {
        FUSEDCNN_UNROLL
        for (int i = 0; i < kThreadChannels * 8; ++i) {
          total[i / 8][i / 4 % 2][i % 4] += acc[i / 8][i / 4 % 2][i % 4];
          acc[i / 8][i / 4 % 2][i % 4] = 0;
        }
      }
    }
    if (Tile::kChains) {
      FUSEDCNN_UNROLL
      for (int i = 0; i < kThreadChannels * 8; ++i) {
        acc[i / 8][i / 4 % 2][i % 4] += total[i / 8][i / 4 % 2][i % 4];
      }
    }

    const int oh = walk.tile_h() * Tile::kTileH + row, ow = walk.tile_w() * Tile::kTileW + col;
    if (oh >= sizes.out_h || ow >= sizes.out_w) continue;
    // The bias comes last: partial sums that carry it round more.
    float bias[kThreadChannels];
    load_row(biases + group * kThreadChannels, bias);
    Pooled pooled[kThreadChannels][2];
    bool plain = windows_are_whole<2>(sizes, oh, ow);
    FUSEDCNN_UNROLL
    for (int o = 0; o < kThreadChannels; ++o) {
      plain = pool_plain_windows(acc[o], bias[o], pooled[o]) && plain;
    }
    if (!plain) {
      FUSEDCNN_UNROLL
      for (int o = 0; o < kThreadChannels; ++o) {
        pool_windows_in_order(acc[o], bias[o], sizes, oh, ow, pooled[o]);
      }
    }
    const int channel = channel_block * Tile::kChannels + group * kThreadChannels;
    store_windows(args, sizes, walk.n(), channel, oh, ow, pooled);
  }
  wait_copies<0>();
}

// ---- host ---------------------------------------------------------------------------------------

template <typename Tile>
WindowsSizes windows_sizes(const ForwardArgs& args, int multiprocessors) {
  const Geometry& g = args.geometry;
  WindowsSizes s{};
  static_cast<MapSizes&>(s) = map_sizes(g);
  s.grid = tile_grid(g, Tile::kTileH, Tile::kTileW, Tile::kChannels,
                     int64_t{multiprocessors} * Tile::kResident);

  const Strides in = args.input_strides, out = args.output_strides;
  s.input = in.c == 1 && g.in_channels > 1 ? InputAccess::kPixelWords : InputAccess::kWords;
  if (in.w == 1 && s.padding_w == 1 && s.in_w % 4 == 0 && has_small_images(in, g) &&
      aligned(args.input, 4, 16, {in.n, in.c, in.h})) {
    s.input = InputAccess::kRows;
    s.input_c = static_cast<uint32_t>(in.c);
    s.input_h = static_cast<uint32_t>(in.h);
  }
  s.halos = s.grid.tiles_w > 1 || s.in_w > 2 * Tile::kTileW;
  s.output_c = static_cast<int>(out.c);
  s.output_h = static_cast<int>(out.h);
  s.output_w = static_cast<int>(out.w);
  // Codes have the values' strides, in bytes.
  s.output = OutputAccess::kSingle;
  if (out.w == 1 && s.out_w % 2 == 0 && aligned(args.output, 4, 8, {out.n, out.c, out.h}) &&
      aligned(args.code, 1, 2, {out.n, out.c, out.h})) {
    s.output = OutputAccess::kPairs;
  } else if (out.c == 1 && g.out_channels % 8 == 0 &&
             aligned(args.output, 4, 16, {out.n, out.h, out.w}) &&
             aligned(args.code, 1, 8, {out.n, out.h, out.w})) {
    s.output = OutputAccess::kChannelVectors;
  }
  return s;
}

template <typename Tile>
void launch_forward_cuda_cores_3x3(const ForwardArgs& args, const Execution& execution) {
  const WindowsSizes sizes = windows_sizes<Tile>(args, execution.multiprocessors);
  launch("forward_cuda_cores_3x3", forward_cuda_cores_3x3_kernel<Tile>, sizes.grid.blocks,
         Tile::kThreads, Tile::shared(sizes.channels), execution, args, sizes);
}

// Windows x output channels that a tile computes for one image, wanted or not.
template <typename Tile>
int64_t tile_work() {
  return static_cast<int64_t>(Tile::kTileH) * Tile::kTileW * Tile::kChannels;
}
template <typename Tile>
int64_t image_work(const Geometry& g) {
  return tile_grid(g, Tile::kTileH, Tile::kTileW, Tile::kChannels, 1).per_image * tile_work<Tile>();
}

// Calls body(Tile{}) with the tile of the least work for a geometry; among equals the larger one,
// whose halo is smaller.
template <bool Chains, typename Body>
auto with_tile(const Geometry& g, int multiprocessors, const Body& body) {
  // 32x32 images, 16 output channels; large maps. Half as high with twice the registers, so that a
  // multiprocessor has several blocks.
  using Wide = WindowsTile<2, Chains ? 8 : 16, 16, Chains>;
  using Square = WindowsTile<4, 8, 8, Chains>;  // 16x16 images, 32 output channels
  using Few = WindowsTile<2, 8, 8, Chains>;     // the same for fewer output channels
  using Small = WindowsTile<8, 4, 4, Chains>;   // 8x8 images, 64 output channels
  const int64_t wide = image_work<Wide>(g), square = image_work<Square>(g),
                few = image_work<Few>(g), small = image_work<Small>(g);
  if (wide <= square && wide <= few && wide <= small && fills_gpu<Wide>(g, multiprocessors))
    return body(Wide{});
  if (square <= few && square <= small && fills_gpu<Square>(g, multiprocessors))
    return body(Square{});
  return few <= small ? body(Few{}) : body(Small{});
}

template <typename Body>
auto with_windows_tile(const Geometry& g, int multiprocessors, const Body& body) {
  return g.in_channels <= kChainSlices * kSlice ? with_tile<false>(g, multiprocessors, body)
                                                : with_tile<true>(g, multiprocessors, body);
}

}  // namespace

const char* why_not_cuda_cores_3x3(const Problem& problem, const Target&) {
  if (problem.type != DataType::kFloat32) return "not float32";
  return why_not_3x3_block(problem);
}

void forward_cuda_cores_3x3(const ForwardArgs& args, const Execution& execution) {
  with_windows_tile(args.geometry, execution.multiprocessors, [&](auto tile) {
    launch_forward_cuda_cores_3x3<decltype(tile)>(args, execution);
  });
}

}  // namespace fusedcnn::cuda
