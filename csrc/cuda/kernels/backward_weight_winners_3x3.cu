// grad_weight and grad_bias on CUDA cores, sums in float: 3x3 convolution of stride 1 under a 2x2
// pool of stride 2.
//
// A lane owns one output channel, and its 9 weights in up to four input channels are registers. A
// warp has 32 output channels at one window, or 16 at two windows. Of a window each lane reads its
// own code, and that says at which of four pixels its 3x3 patch of the input begins: a load from
// shared memory for each weight, at fixed distances, and as many multiply-adds. Only lanes whose
// window is off sit idle; the others wait for nobody, and nothing branches on a code. (Lanes that
// owned weights, and branched on the codes of one output channel after the other, took 211 ns an
// image of 16 -> 32 channels on an H200, of which 25 were counted.)
//
// Up to four input channels: each warp has windows of its own. More: two or four warps, slices,
// have the same windows and other input channels, up to 16 in all; of more channels, other blocks.
//
// Gradients and codes lie in memory window by window, the wrong way round for this. So a warp first
// brings 16 windows of 32 output channels (or twice 16 of 16) through lists in shared memory, for
// all slices: it reads them with neighbouring lanes at neighbouring windows, and keeps of a code
// the place of its pixel. Four places are then one load, and so are four gradients.
//
// Banks: with rows of 4 (mod 32) words a window's four pixels are words 0, 1, 4 and 5, and 16
// windows further on, one row of 16 windows, they are 8, 9, 12 and 13; with rows of 18 words 0, 1,
// 18 and 19, and two rows of 8 windows further on 8, 9, 26 and 27. A load takes one wavefront,
// whatever the codes (counted for other widths: with 16 output channels 1.25 where tiles are 12
// wide, 1.16 where they are 13). Hence 32-bit loads: 128 bits, of four channels at once, would be a
// third of the instructions, but four wavefronts each (eight lanes at a time), 36 a window instead
// of 27, and wavefronts are what there is too few of. Nor are live windows moved together, lane by
// lane: lanes at different windows would meet the same banks, 3.4 lanes in the fullest one on
// average.
//
// An image, in sm_90's code, on 132 multiprocessors of four issue slots at 1.98 GHz:
//                      windows         lists and tiles  issue  wavefronts     memory
//   3 -> 16 at 32x32   128 of 84       5,100            15 ns  4,100, 16 ns   7.6 ns
//   16 -> 32 at 16x16  4 x 64 of 83    7,500            28 ns  10,000, 38 ns  6.2 ns
// At 1,024 images in float32, an H200 took 40 ns of the first; no GPU has run the second. Windows
// that are off save something only where they are so for all 32 lanes.
//
// Sums run over a slab of the images' tiles: a chain of a tile, at most 64 products long, then
// totals of tiles, both in registers. Warps and windows side by side are added up at the end, and
// the second stage adds up the slabs in order. How many there are depends on the geometry alone.

#include <type_traits>

#include "cuda/kernels/backward_weight_tiles.h"

namespace fusedcnn::cuda {
namespace {

constexpr int kWinnersThreads = 128, kWinnersWarps = kWinnersThreads / kWarp;
constexpr int kMostChannels = 16;  // input channels of a block

// Slices: of a block's input channels, of which a warp takes one.
template <int Slices>
struct WinnersTile {
  static_assert(kWinnersWarps % Slices == 0);
  // Windows along each axis, at most; pixels with their halo.
  static constexpr int kTileH = 8, kTileW = Slices == 1 ? 16 : 8;
  static constexpr int kRows = 2 * kTileH + 2, kCols = 2 * kTileW + 2;
  static constexpr int kPitch = Slices == 1 ? 36 : 18;
  static constexpr int kPlane = kRows * kPitch;
  static_assert(kPitch >= kCols);
};

// A warp's lists: for each lane, 16 windows. Four more to a row, so that eight rows of gradients
// (128 bits of each) and 16 rows of places (64 bits of each) lie in different banks.
constexpr int kList = 16, kListPitch = kList + 4;
// Rows 16 to 31 begin 16 elements on: they are written at once with rows 0 to 15, to other banks.
FUSEDCNN_DEVICE int list_row(int row) { return row * kListPitch + row / 16 * 16; }
constexpr int kLists = kWarp * kListPitch + 16;
constexpr uint16_t kNowhere = 0xffff;  // the place of a window that is off
static_assert(WinnersTile<1>::kPlane < kNowhere && WinnersTile<2>::kPlane < kNowhere);
// At the end they hold the threads' sums, nine at a time.
static_assert(kWinnersWarps * kLists >= 9 * kWinnersThreads);

struct WeightWinnersSizes : WeightTileSizes {
  int lane_channels;   // output channels of a warp: 16 or 32
  int chunks;          // of the input channels
  int chunk_channels;  // of each but the last, which may have fewer
};

template <int Channels, int Slices>
WeightWinnersSizes weight_winners_sizes(const Geometry& g) {
  using Tile = WinnersTile<Slices>;
  const int lane_channels = g.out_channels <= 16 ? 16 : 32;
  // All tiles of about the same size.
  const int out_h = static_cast<int>(g.h.out), out_w = static_cast<int>(g.w.out);
  WeightWinnersSizes s{weight_tile_sizes(g, parts(out_h, parts(out_h, Tile::kTileH)),
                                         parts(out_w, parts(out_w, Tile::kTileW)), lane_channels),
                       lane_channels, parts(g.in_channels, Channels * Slices), Channels * Slices};
  // 4 blocks for each of 132 multiprocessors, and no more than 256 tiles in a chain of totals,
  // but for kMostPartialBytes.
  const int64_t wanted = 528 / (static_cast<int64_t>(s.channel_blocks) * s.chunks);
  const int64_t chains = (s.units + 255) / 256;
  set_slabs(&s, wanted < chains ? chains : wanted);
  return s;
}

// Brings one tile of `count` input channels from `first` on, with its halo, to [Fetched][kRows]
// [kPitch], of which the other channels become zeros; what is copied asynchronously has to be
// waited for. Lanes have neighbouring columns, warps every fourth row.
template <typename S, typename Tile, int Fetched>
FUSEDCNN_DEVICE void fetch_tile(const BackwardArgs& args, const WeightWinnersSizes& sizes,
                                int64_t n, int first_h, int first_w, int first, int count,
                                Shared<float> to) {
  constexpr int kRows = Tile::kRows, kPitch = Tile::kPitch, kPlane = Tile::kPlane;
  const Strides from = args.input_strides;
  const S* const image = static_cast<const S*>(args.input) + n * from.n + first * from.c;
  const int rows = 2 * sizes.tile_h + 2, cols = 2 * sizes.tile_w + 2;
  const int h0 = 2 * first_h - sizes.padding_h, w0 = 2 * first_w - sizes.padding_w;
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const auto copy = [&](const S* at, bool real, Shared<float> pixel) {
    if constexpr (sizeof(S) == sizeof(float)) {
      copy_async<4>(pixel, real ? at : image, real ? 4 : 0);
    } else {
      *pixel = real ? widen(load_constant(at)) : 0.f;
    }
  };
  const bool real_w = inside(w0 + lane, sizes.in_w);
  if (lane < cols) {
    FUSEDCNN_NO_UNROLL
    for (int c = 0; c < Fetched; ++c) {
      const S* at = image + c * from.c + (h0 + warp) * from.h + (w0 + lane) * from.w;
      FUSEDCNN_UNROLL
      for (int row = 0; row < kRows; row += kWinnersWarps) {
        if (row + warp < rows) {
          copy(at, c < count && real_w && inside(h0 + row + warp, sizes.in_h),
               to + (c * kPlane + (row + warp) * kPitch + lane));
        }
        at += kWinnersWarps * from.h;
      }
    }
  }
  if constexpr (Tile::kCols > kWarp) {
    // The last two columns of the widest tiles.
    if (cols <= kWarp) return;
    FUSEDCNN_NO_UNROLL
    for (int i = thread_index(); i < Fetched * kRows * 2; i += kWinnersThreads) {
      const int c = i / 2 / kRows, row = i / 2 % kRows, col = kWarp + i % 2;
      if (row >= rows) continue;
      const int h = h0 + row, w = w0 + col;
      const bool real = c < count && inside(h, sizes.in_h) && inside(w, sizes.in_w);
      copy(image + c * from.c + h * from.h + w * from.w, real,
           to + (c * kPlane + row * kPitch + col));
    }
  }
}

// args: grad_output and code [N, OC, OH, OW], input [N, C, H, W] or null where only grad_bias is
// wanted. partial: [slabs][OC][9 C + 1].
template <typename S, int Channels, int Slices>
FUSEDCNN_KERNEL_RESIDENT(kWinnersThreads, 4)
grad_weight_winners_3x3_kernel(BackwardArgs args, WeightWinnersSizes sizes, float* partial) {
  using Tile = WinnersTile<Slices>;
  constexpr int kPitch = Tile::kPitch, kPlane = Tile::kPlane;
  constexpr int kWeights = 9 * Channels, kFetched = Channels * Slices;
  SharedMemory memory;
  const Shared<float> all_gradients = memory.array<float>(kWinnersWarps * kLists);
  const Shared<uint16_t> all_places = memory.array<uint16_t>(kWinnersWarps * kLists);
  const bool want_weight = args.grad_weight != nullptr;
  const Shared<float> pixels = memory.array<float>(want_weight ? kFetched * kPlane : 0);

  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int slice = warp % Slices, first_list = warp - slice;
  const Shared<float> own_pixels = pixels + slice * Channels * kPlane;
  // What the lane fetches: one window of 16 rows, this one and those that follow.
  const int fetched_row = lane / 16 * 16, fetched_window = lane % 16;
  const int windows = sizes.tile_h * sizes.tile_w;
  // Windows in a warp's lists: 16, or twice as many where its lanes have 16 output channels.
  const int step = kWarp / sizes.lane_channels * kList;
  const int chunks = want_weight ? sizes.chunks : 1;
  const int64_t tasks = sizes.slabs * sizes.channel_blocks * chunks;

  for (int64_t task = block_index(); task < tasks; task += grid_blocks()) {
    const int first_channel = static_cast<int>(task % chunks) * sizes.chunk_channels;
    const int count = sizes.channels - first_channel;  // or more than a chunk
    const int oc0 = static_cast<int>(task / chunks % sizes.channel_blocks) * sizes.lane_channels;
    const int64_t slab = task / chunks / sizes.channel_blocks;
    // Lists serve the warps of all slices.
    const auto sync_lists = [] {
      if constexpr (Slices == 1) {
        sync_warp();
      } else {
        sync_threads();
      }
    };
    float acc[kWeights], total[kWeights];
    float bias = 0, bias_total = 0;
    FUSEDCNN_UNROLL
    for (int i = 0; i < kWeights; ++i) acc[i] = total[i] = 0;

    const int64_t last = (slab + 1) * sizes.units / sizes.slabs;
    for (int64_t unit = slab * sizes.units / sizes.slabs; unit < last; ++unit) {
      const int64_t n = unit / (sizes.tiles_h * sizes.tiles_w);
      const int tile = static_cast<int>(unit % (sizes.tiles_h * sizes.tiles_w));
      const int first_h = tile / sizes.tiles_w * sizes.tile_h;
      const int first_w = tile % sizes.tiles_w * sizes.tile_w;
      if (want_weight) {
        fetch_tile<S, Tile, kFetched>(args, sizes, n, first_h, first_w, first_channel, count,
                                      pixels);
      }
      commit_copies();

      for (int begin = 0; begin < windows; begin += kWinnersWarps * step) {
        // 16 windows for each lane, by two lanes at a time.
        const int first_oc = oc0 + fetched_row % sizes.lane_channels;
        const int window =
            begin + warp * step + fetched_row / sizes.lane_channels * kList + fetched_window;
        const int y = window / sizes.tile_w, x = window % sizes.tile_w;
        const int oh = first_h + y, ow = first_w + x;
        const bool real = window < windows && oh < sizes.out_h && ow < sizes.out_w;
        const Strides &at = args.code_strides, &from = args.grad_output_strides;
        const uint8_t* code = static_cast<const uint8_t*>(args.code) + n * at.n + first_oc * at.c +
                              oh * at.h + ow * at.w;
        const S* gradient = static_cast<const S*>(args.grad_output) + n * from.n +
                            first_oc * from.c + oh * from.h + ow * from.w;
        const int to = warp * kLists + list_row(fetched_row) + fetched_window;
        Shared<float> to_gradients = all_gradients + to;
        Shared<uint16_t> to_places = all_places + to;
        const int place = 2 * y * kPitch + 2 * x;
        int left = real ? sizes.out_channels - first_oc : 0;
        constexpr int kAtOnce = 8;  // loads under way
        FUSEDCNN_NO_UNROLL
        for (int first = 0; first < 16; first += kAtOnce) {
          int winner[kAtOnce];
          float value[kAtOnce];
          FUSEDCNN_UNROLL
          for (int i = 0; i < kAtOnce; ++i) {
            winner[i] = i < left ? load_code(code) : -1;
            value[i] = i < left ? widen(load_constant(gradient)) : 0.f;
            code += at.c;
            gradient += from.c;
          }
          FUSEDCNN_UNROLL
          for (int i = 0; i < kAtOnce; ++i) {
            const int element = place + winner[i] + (winner[i] >> 1) * (kPitch - 2);
            // Codes that no forward writes are off, too: they would point beyond the pixels.
            const bool on = inside(winner[i], 4);
            to_places[i * kListPitch] = on ? static_cast<uint16_t>(element) : kNowhere;
            to_gradients[i * kListPitch] = value[i];
          }
          to_places += kAtOnce * kListPitch;
          to_gradients += kAtOnce * kListPitch;
          left -= kAtOnce;
        }
        if (begin == 0) {
          wait_copies<0>();
          sync_threads();
        } else {
          sync_lists();
        }

        FUSEDCNN_NO_UNROLL
        for (int other = 0; other < Slices; ++other) {
          const int row = (first_list + other) * kLists + list_row(lane);
          FUSEDCNN_NO_UNROLL
          for (int i = 0; i < kList; i += 4) {
            const Pack<4, float> four = load_pack<4, float>(all_gradients + (row + i));
            const Pack<4, uint16_t> begins = load_pack<4, uint16_t>(all_places + (row + i));
            FUSEDCNN_UNROLL
            for (int j = 0; j < 4; ++j) {
              // Where ReLU is off nothing flows, whatever stands there.
              if (begins.values[j] == kNowhere) continue;
              bias += four.values[j];
              if (!want_weight) continue;
              const Shared<float> patch = own_pixels + begins.values[j];
              FUSEDCNN_UNROLL
              for (int k = 0; k < kWeights; ++k) {
                const float pixel = patch[k / 9 * kPlane + k % 9 / 3 * kPitch + k % 3];
                acc[k] = multiply_add(four.values[j], pixel, acc[k]);
              }
            }
          }
        }
        sync_lists();  // the next windows overwrite these
      }
      FUSEDCNN_UNROLL
      for (int k = 0; k < kWeights; ++k) total[k] += acc[k], acc[k] = 0;
      bias_total += bias, bias = 0;
      sync_threads();  // the next tile overwrites this one
    }

    // Adds up what the block's threads have of each sum, `count` of a thread, and writes those for
    // which place(slice, its number) is one among the output channel's.
    const auto finish = [&](const float* own, int count_own, const auto& place) {
      FUSEDCNN_UNROLL
      for (int i = 0; i < count_own; ++i) {
        all_gradients[i * kWinnersThreads + thread_index()] = own[i];
      }
      sync_threads();
      for (int i = thread_index(); i < count_own * Slices * sizes.lane_channels;
           i += kWinnersThreads) {
        const int channel = i % sizes.lane_channels, rest = i / sizes.lane_channels;
        const int its_slice = rest % Slices, k = rest / Slices, to = place(its_slice, k);
        if (oc0 + channel >= sizes.out_channels || to < 0) continue;
        float sum = 0;
        for (int from = its_slice * kWarp; from < kWinnersThreads; from += Slices * kWarp) {
          for (int l = channel; l < kWarp; l += sizes.lane_channels) {
            sum += all_gradients[k * kWinnersThreads + from + l];
          }
        }
        partial[(slab * sizes.out_channels + oc0 + channel) * sizes.sums.row + to] = sum;
      }
      sync_threads();  // the next sums overwrite these
    };
    if (want_weight) {
      FUSEDCNN_UNROLL
      for (int c = 0; c < Channels; ++c) {
        finish(total + 9 * c, 9, [&](int its_slice, int k) {
          const int channel = its_slice * Channels + c;
          return channel < count ? 9 * (first_channel + channel) + k : -1;
        });
      }
    }
    finish(&bias_total, 1, [&](int its_slice, int) {
      return its_slice == 0 && first_channel == 0 ? sizes.sums.row - 1 : -1;
    });
  }
}

// ---- host ---------------------------------------------------------------------------------------

// Calls body(integral constants of a warp's input channels and of the slices).
template <typename Body>
auto for_channels(const Geometry& g, const Body& body) {
  constexpr std::integral_constant<int, 1> k1{};
  constexpr std::integral_constant<int, 2> k2{};
  constexpr std::integral_constant<int, 3> k3{};
  constexpr std::integral_constant<int, 4> k4{};
  switch (g.in_channels) {
    case 1: return body(k1, k1);
    case 2: return body(k2, k1);
    case 3: return body(k3, k1);
    case 4: return body(k4, k1);
    case 5:
    case 6: return body(k3, k2);
    case 7:
    case 8: return body(k4, k2);
    default: break;
  }
  // Of more than a block takes: as many chunks as it takes, and no larger ones than needed.
  const int64_t chunk = parts(g.in_channels, parts(g.in_channels, kMostChannels));
  return chunk <= 12 ? body(k3, k4) : body(k4, k4);
}

template <typename S, int Channels, int Slices>
void launch_grad_weight_winners_3x3(const BackwardArgs& args, const Execution& execution) {
  const WeightWinnersSizes sizes = weight_winners_sizes<Channels, Slices>(args.geometry);
  float* const partial = static_cast<float*>(execution.workspace);
  const bool want_weight = args.grad_weight != nullptr;
  constexpr int kPixels = Channels * Slices * WinnersTile<Slices>::kPlane;
  const int64_t shared = shared_bytes<float>(kWinnersWarps * kLists) +
                         shared_bytes<uint16_t>(kWinnersWarps * kLists) +
                         shared_bytes<float>(want_weight ? kPixels : 0);
  const int64_t tasks = sizes.slabs * sizes.channel_blocks * (want_weight ? sizes.chunks : 1);
  launch("grad_weight_winners_3x3", grad_weight_winners_3x3_kernel<S, Channels, Slices>,
         blocks_for(tasks), kWinnersThreads, shared, execution, args, sizes, partial);
  launch_grad_weight_finish<S>(args, sizes.sums, partial, execution);
}

}  // namespace

const char* why_not_grad_weight_winners_3x3(const Problem& problem, const Target&) {
  return why_not_3x3_block(problem);
}

int64_t grad_weight_winners_3x3_workspace(const Problem& problem) {
  return for_channels(problem.geometry, [&](auto channels, auto slices) {
    const WeightWinnersSizes sizes = weight_winners_sizes<channels, slices>(problem.geometry);
    return sizes.slabs * slab_bytes(sizes);
  });
}

void grad_weight_winners_3x3(const BackwardArgs& args, const Execution& execution) {
  for_channels(args.geometry, [&](auto channels, auto slices) {
    for_block_storage(args.type, [&](auto storage) {
      launch_grad_weight_winners_3x3<decltype(storage), channels, slices>(args, execution);
    });
  });
}

}  // namespace fusedcnn::cuda
