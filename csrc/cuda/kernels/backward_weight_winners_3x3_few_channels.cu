// grad_weight and grad_bias on CUDA cores for up to four input channels, sums in float: 3x3
// convolution of stride 1 under a 2x2 pool of stride 2.
//
// A lane owns one output channel: its 9 * C weights are registers. A warp has 32 output channels at
// one window, or 16 at two windows. Of a window each lane reads its own code, and that says at
// which of four pixels its 3x3 patch of the input begins: 9 * C loads from shared memory at fixed
// distances, and as many multiply-adds. Only lanes whose window is off sit idle; the others wait
// for nobody.
//
// Gradients and codes lie in memory window by window, the wrong way round for this. So a warp first
// brings 16 windows of 32 output channels (or twice 16 of 16) through lists in shared memory: it
// reads them with neighbouring lanes at neighbouring windows, and keeps of a code the place of its
// pixel. Four places are then one load, and so are four gradients.
//
// Banks: with rows of 4 (mod 32) words a window's four pixels are words 0, 1, 4 and 5, and 16
// windows further on, one row of 16 windows, they are 8, 9, 12 and 13: a load takes one wavefront,
// whatever the codes (counted for other widths: with 16 output channels 1.25 where tiles are 12
// wide, 1.16 where they are 13). Hence 32-bit loads: 128 bits, of four channels at once, would be a
// third of the instructions, but four wavefronts each (eight lanes at a time), 36 a window instead
// of 27, and wavefronts are what there is too few of. Nor are live windows moved together, lane by
// lane: lanes at different windows would meet the same banks, 3.4 lanes in the fullest one on
// average.
//
// 3 -> 16 at 32x32: an image is 4,096 windows x channels, 128 steps of a warp. In wavefronts a step
// is 27, its share of the lists 3.5; the input's tiles are 230 in all: 4,100 cycles of an image. In
// instructions it is 62 and 24, for 27 multiply-adds; lists and tiles begin with 2,200 in all, the
// input is 2,600: 15,800, or 4,000 cycles of four issue slots. So 16 ns on 132 multiprocessors at
// 1.98 GHz at the very best, where memory takes 7.6 ns, and backward_weight_winners_3x3.cu,
// by such a count of its instructions, 35 ns. Windows that are off save something only where they
// are so for all 32 lanes. Counts, again: an H200 took 40 ns, at 1,024 images in float32.
//
// Sums run over a slab of the images' tiles: a chain of a tile, at most 32 products long, then
// totals of tiles, both in registers. Warps and windows side by side are added up at the end, and
// the second stage adds up the slabs in order. How many there are depends on the geometry alone.

#include "cuda/kernels/backward_weight_tiles.h"

namespace fusedcnn::cuda {
namespace {

constexpr int kMostChannels = 4;  // of the input
constexpr int kFewChannelsThreads = 128, kFewChannelsWarps = kFewChannelsThreads / kWarp;
// Windows of a tile along each axis, at most; pixels of a tile with its halo.
constexpr int kTileH = 8, kTileW = 16;
constexpr int kRows = 2 * kTileH + 2, kCols = 2 * kTileW + 2;
constexpr int kPitch = 36;  // 4 (mod 32)
constexpr int kPlane = kRows * kPitch;
static_assert(kPitch >= kCols && kPitch % 32 == 4);

// A warp's lists: for each lane, 16 windows. Four more to a row, so that eight rows of gradients
// (128 bits of each) and 16 rows of places (64 bits of each) lie in different banks.
constexpr int kList = 16, kListPitch = kList + 4;
// Rows 16 to 31 begin 16 elements on: they are written at once with rows 0 to 15, to other banks.
FUSEDCNN_DEVICE int list_row(int row) { return row * kListPitch + row / 16 * 16; }
constexpr int kLists = kWarp * kListPitch + 16;
constexpr uint16_t kNowhere = 0xffff;  // the place of a window that is off
static_assert(kMostChannels * kPlane < kNowhere);
// At the end they hold the threads' sums, nine at a time.
static_assert(kFewChannelsWarps * kLists >= 9 * kFewChannelsThreads);

struct FewChannelsSizes : WeightTileSizes {
  int lane_channels;  // output channels of a warp: 16 or 32
};

inline FewChannelsSizes few_channels_sizes(const Geometry& g) {
  const int lane_channels = g.out_channels <= 16 ? 16 : 32;
  // All tiles of about the same size.
  const int out_h = static_cast<int>(g.h.out), out_w = static_cast<int>(g.w.out);
  FewChannelsSizes s{weight_tile_sizes(g, parts(out_h, parts(out_h, kTileH)),
                                       parts(out_w, parts(out_w, kTileW)), lane_channels),
                     lane_channels};
  set_slabs(&s, 528 / s.channel_blocks);  // 4 blocks for each of 132 multiprocessors
  return s;
}

// Brings one tile of all channels, with its halo, to [C][kRows][kPitch]; what is copied
// asynchronously has to be waited for. Lanes have neighbouring columns, warps every fourth row.
template <typename S, int Channels>
FUSEDCNN_DEVICE void fetch_tile(const BackwardArgs& args, const FewChannelsSizes& sizes, int64_t n,
                                int first_h, int first_w, Shared<float> to) {
  const Strides from = args.input_strides;
  const S* const image = static_cast<const S*>(args.input) + n * from.n;
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
    for (int c = 0; c < Channels; ++c) {
      const S* at = image + c * from.c + (h0 + warp) * from.h + (w0 + lane) * from.w;
      FUSEDCNN_UNROLL
      for (int row = 0; row < kRows; row += kFewChannelsWarps) {
        if (row + warp < rows) {
          copy(at, real_w && inside(h0 + row + warp, sizes.in_h),
               to + (c * kPlane + (row + warp) * kPitch + lane));
        }
        at += kFewChannelsWarps * from.h;
      }
    }
  }
  // The last two columns of the widest tiles.
  if (cols <= kWarp) return;
  FUSEDCNN_NO_UNROLL
  for (int i = thread_index(); i < Channels * kRows * 2; i += kFewChannelsThreads) {
    const int c = i / 2 / kRows, row = i / 2 % kRows, col = kWarp + i % 2;
    if (row >= rows) continue;
    const int h = h0 + row, w = w0 + col;
    copy(image + c * from.c + h * from.h + w * from.w,
         inside(h, sizes.in_h) && inside(w, sizes.in_w), to + (c * kPlane + row * kPitch + col));
  }
}

// args: grad_output and code [N, OC, OH, OW], input [N, C, H, W] or null where only grad_bias is
// wanted. partial: [slabs][OC][9 C + 1].
template <typename S, int Channels>
FUSEDCNN_KERNEL_RESIDENT(kFewChannelsThreads, 4)
grad_weight_winners_3x3_few_channels_kernel(BackwardArgs args, FewChannelsSizes sizes,
                                            float* partial) {
  constexpr int kWeights = 9 * Channels;
  SharedMemory memory;
  const Shared<float> all_gradients = memory.array<float>(kFewChannelsWarps * kLists);
  const Shared<uint16_t> all_places = memory.array<uint16_t>(kFewChannelsWarps * kLists);
  const bool want_weight = args.grad_weight != nullptr;
  const Shared<float> pixels = memory.array<float>(want_weight ? Channels * kPlane : 0);

  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const Shared<float> gradients = all_gradients + warp * kLists;
  const Shared<uint16_t> places = all_places + warp * kLists;
  // What the lane fetches: one window of 16 rows, this one and those that follow.
  const int fetched_row = lane / 16 * 16, fetched_window = lane % 16;
  // Lists of the same output channels, for other windows.
  const int lists = kWarp / sizes.lane_channels;
  const int windows = sizes.tile_h * sizes.tile_w;
  const int step = lists * kList;  // windows of a warp at a time
  const int64_t tasks = sizes.slabs * sizes.channel_blocks;

  for (int64_t task = block_index(); task < tasks; task += grid_blocks()) {
    const int oc0 = static_cast<int>(task % sizes.channel_blocks) * sizes.lane_channels;
    const int64_t slab = task / sizes.channel_blocks;
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
      if (want_weight) fetch_tile<S, Channels>(args, sizes, n, first_h, first_w, pixels);
      commit_copies();

      for (int begin = 0; begin < windows; begin += kFewChannelsWarps * step) {
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
        Shared<float> to_gradients = gradients + (list_row(fetched_row) + fetched_window);
        Shared<uint16_t> to_places = places + (list_row(fetched_row) + fetched_window);
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
            to_places[i * kListPitch] = winner[i] < 0 ? kNowhere : static_cast<uint16_t>(element);
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
          sync_warp();
        }

        FUSEDCNN_NO_UNROLL
        for (int i = 0; i < kList; i += 4) {
          const Pack<4, float> four = load_pack<4, float>(gradients + (list_row(lane) + i));
          const Pack<4, uint16_t> begins = load_pack<4, uint16_t>(places + (list_row(lane) + i));
          FUSEDCNN_UNROLL
          for (int j = 0; j < 4; ++j) {
            // Where ReLU is off nothing flows, whatever stands there.
            if (begins.values[j] == kNowhere) continue;
            bias += four.values[j];
            if (!want_weight) continue;
            const Shared<float> patch = pixels + begins.values[j];
            FUSEDCNN_UNROLL
            for (int k = 0; k < kWeights; ++k) {
              const float pixel = patch[k / 9 * kPlane + k % 9 / 3 * kPitch + k % 3];
              acc[k] = multiply_add(four.values[j], pixel, acc[k]);
            }
          }
        }
        sync_warp();  // the next windows overwrite these
      }
      FUSEDCNN_UNROLL
      for (int k = 0; k < kWeights; ++k) total[k] += acc[k], acc[k] = 0;
      bias_total += bias, bias = 0;
      sync_threads();  // the next tile overwrites this one
    }

    // Adds up what the block's threads have of each sum, and writes it: `count` of a thread.
    const auto finish = [&](const float* own, int count, int to) {
      FUSEDCNN_UNROLL
      for (int i = 0; i < count; ++i)
        all_gradients[i * kFewChannelsThreads + thread_index()] = own[i];
      sync_threads();
      for (int i = thread_index(); i < count * sizes.lane_channels; i += kFewChannelsThreads) {
        const int channel = i % sizes.lane_channels, k = i / sizes.lane_channels;
        if (oc0 + channel >= sizes.out_channels) continue;
        float sum = 0;
        for (int other = channel; other < kFewChannelsThreads; other += sizes.lane_channels) {
          sum += all_gradients[k * kFewChannelsThreads + other];
        }
        partial[(slab * sizes.out_channels + oc0 + channel) * sizes.sums.row + to + k] = sum;
      }
      sync_threads();  // the next sums overwrite these
    };
    if (want_weight) {
      FUSEDCNN_UNROLL
      for (int c = 0; c < Channels; ++c) finish(total + 9 * c, 9, 9 * c);
    }
    finish(&bias_total, 1, kWeights);
  }
}

// ---- host ---------------------------------------------------------------------------------------

template <typename S, int Channels>
void launch_grad_weight_winners_3x3_few_channels(const BackwardArgs& args,
                                                 const Execution& execution) {
  const FewChannelsSizes sizes = few_channels_sizes(args.geometry);
  float* const partial = static_cast<float*>(execution.workspace);
  const int64_t shared = shared_bytes<float>(kFewChannelsWarps * kLists) +
                         shared_bytes<uint16_t>(kFewChannelsWarps * kLists) +
                         shared_bytes<float>(args.grad_weight ? Channels * kPlane : 0);
  launch("grad_weight_winners_3x3_few_channels",
         grad_weight_winners_3x3_few_channels_kernel<S, Channels>,
         blocks_for(sizes.slabs * sizes.channel_blocks), kFewChannelsThreads, shared, execution,
         args, sizes, partial);
  launch_grad_weight_finish<S>(args, sizes.sums, partial, execution);
}

template <typename S>
void grad_weight_winners_3x3_few_channels_typed(const BackwardArgs& args,
                                                const Execution& execution) {
  switch (args.geometry.in_channels) {
    case 1: return launch_grad_weight_winners_3x3_few_channels<S, 1>(args, execution);
    case 2: return launch_grad_weight_winners_3x3_few_channels<S, 2>(args, execution);
    case 3: return launch_grad_weight_winners_3x3_few_channels<S, 3>(args, execution);
    default: return launch_grad_weight_winners_3x3_few_channels<S, 4>(args, execution);
  }
}

}  // namespace

const char* why_not_winners_3x3_few_channels(const Problem& problem, const Target&) {
  if (problem.geometry.in_channels > kMostChannels) return "more than 4 input channels";
  return why_not_3x3_block(problem);
}

int64_t grad_weight_winners_3x3_few_channels_workspace(const Problem& problem) {
  const FewChannelsSizes sizes = few_channels_sizes(problem.geometry);
  return sizes.slabs * slab_bytes(sizes);
}

void grad_weight_winners_3x3_few_channels(const BackwardArgs& args, const Execution& execution) {
  for_block_storage(args.type, [&](auto storage) {
    grad_weight_winners_3x3_few_channels_typed<decltype(storage)>(args, execution);
  });
}

}  // namespace fusedcnn::cuda
