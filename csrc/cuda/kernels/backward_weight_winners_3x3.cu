// grad_weight and grad_bias on CUDA cores, sums in float: 3x3 convolution of stride 1 under a 2x2
// pool of stride 2.
//
// Of a window's four convolution outputs at most one has a gradient, so a quarter of the arithmetic
// is left, and less where ReLU is off. A warp takes kChannels output channels and walks over
// windows; its lanes own Slots weights (c, kh, kw) of each channel. Per window a lane loads the
// four pixels that its weight may meet, one for each code, and keeps them in registers for all
// output channels: the code, the same for all lanes, then says which one is multiplied, by a branch
// that all lanes take together. Nothing else depends on it, and a window that is off costs one
// branch.
//
// Weight k = (c * 3 + kh) * 3 + kw of a lane meets the pixel at c * plane + kh * pitch + kw: with a
// pitch of 3 and planes of 9 (mod 32) words, 32 neighbouring weights meet 32 banks.
//
// 16 channels: 20 loads of pixels a window and warp, for 8 x 5 multiply-adds where all are live;
// about 14 instructions a live pair of window and output channel, 4 for one that is off. 16 -> 32
// at 16x16, half of the pairs live: 2,048 pairs x 9 + 4 warps x 64 windows x 30 = 26,000 warp
// instructions an image, 6,500 cycles of four issue slots, 25 ns on 132 multiprocessors at 1.98
// GHz; all four elements at the FMA peak would take 9,216 cycles, the live quarter's own
// multiply-adds 1,152. 3 -> 16 at 32x32: 27 of 32 lanes work, for one multiply-add a pair; 4,096
// pairs x 7 + 2 x 256 x 15 = 36,000 instructions, 9,100 cycles, 35 ns, where all four elements at
// the peak would take 3,456 and memory 7.6 ns: with so few channels, lanes had better be output
// channels, as in backward_weight_winners_3x3_few_channels.cu. These are
// counts; an H200 took 211 ns an image of 16 -> 32 and 164 of 3 -> 16, at 1,024 images in float32.
//
// Sums run over a slab of the images' tiles, in registers for a tile, then in shared memory; those
// of the warps that share output channels are added up, and the second stage adds up the slabs in
// order. How many there are depends on the geometry alone.

#include <type_traits>

#include "cuda/kernels/backward_weight_tiles.h"

namespace fusedcnn::cuda {
namespace {

constexpr int kWinnersThreads = 128, kWinnersWarps = kWinnersThreads / kWarp;
constexpr int kChannels = 8;  // output channels of a warp
constexpr int kTile = 16;     // windows of a tile along an axis, at most
constexpr int kPitch = 35;    // columns of a tile, its halo, and one more: 3 (mod 32)
static_assert(kPitch >= 2 * kTile + 2 && kPitch % 32 == 3);

// Input channels whose weights the lanes of a warp have slots for.
constexpr int slice_channels(int slots) { return slots * kWarp / 9; }

struct WeightWinnersSizes : WeightTileSizes {
  int plane;          // words of a channel in shared memory
  int slices;         // of input channels
  int channel_warps;  // warps of a block with different output channels; the others share these
};

template <int Slots>
WeightWinnersSizes weight_winners_sizes(const Geometry& g) {
  // Many channels: half the height, or shared memory has room for fewer blocks, on some GPUs none.
  constexpr int64_t kMostHeight = Slots == 1 ? kTile : kTile / 2;
  const int tile_h = static_cast<int>(g.h.out < kMostHeight ? g.h.out : kMostHeight);
  const int tile_w = static_cast<int>(g.w.out < kTile ? g.w.out : kTile);
  const int warps = g.out_channels <= kChannels ? 1 : g.out_channels <= 2 * kChannels ? 2 : 4;
  int plane = (2 * tile_h + 2) * kPitch;
  plane += (9 - plane % kWarp + kWarp) % kWarp;
  const int slices = parts(static_cast<int>(g.in_channels), slice_channels(Slots));
  WeightWinnersSizes s{weight_tile_sizes(g, tile_h, tile_w, kChannels * warps), plane, slices,
                       warps};
  // 4 blocks for each of 132 multiprocessors.
  set_slabs(&s, 528 / (static_cast<int64_t>(s.slices) * s.channel_blocks));
  return s;
}

// A tile of windows of image n, the upper left one at (h, w).
struct WindowTile {
  int64_t n;
  int h, w;
};

// Fetches the pixels under the tile of `count` input channels from `first` on.
template <typename S>
FUSEDCNN_DEVICE void fetch_pixels(const BackwardArgs& args, const WeightWinnersSizes& sizes,
                                  const WindowTile& tile, int first, int count,
                                  Shared<float> pixels) {
  const Strides from = args.input_strides;
  const S* const image = static_cast<const S*>(args.input) + tile.n * from.n + first * from.c;
  const int cols = 2 * sizes.tile_w + 2, area = (2 * sizes.tile_h + 2) * cols;
  FUSEDCNN_NO_UNROLL
  for (int i = thread_index(); i < count * area; i += kWinnersThreads) {
    const int c = i / area, row = i % area / cols, col = i % area % cols;
    const int h = 2 * tile.h - sizes.padding_h + row;
    const int w = 2 * tile.w - sizes.padding_w + col;
    const bool real = inside(h, sizes.in_h) && inside(w, sizes.in_w);
    const S* const at = real ? image + c * from.c + h * from.h + w * from.w : image;
    const Shared<float> to = pixels + (c * sizes.plane + row * kPitch + col);
    if constexpr (sizeof(S) == sizeof(float)) {
      copy_async<4>(to, at, real ? 4 : 0);
    } else {
      *to = real ? widen(load_constant(at)) : 0.f;
    }
  }
  commit_copies();
  wait_copies<0>();
}

// Writes a window to the warp's list: its gradients in kChannels output channels from `oc0` on.
// Returns its codes plus one, four bits each. `real`: there is such a window, at (oh, ow).
template <typename S>
FUSEDCNN_DEVICE uint32_t list_window(const BackwardArgs& args, const WeightWinnersSizes& sizes,
                                     int64_t n, int oh, int ow, bool real, int oc0,
                                     Shared<float> gradients) {
  uint32_t word = 0;
  FUSEDCNN_NO_UNROLL
  for (int half = 0; half < kChannels; half += 4) {  // all eight would take more registers
    FUSEDCNN_UNROLL
    for (int o = half; o < half + 4; ++o) {
      float gradient = 0;
      int code = -1;
      if (real && oc0 + o < sizes.out_channels) {
        const Strides &at = args.code_strides, &from = args.grad_output_strides;
        code = load_code(static_cast<const uint8_t*>(args.code) + n * at.n + (oc0 + o) * at.c +
                         oh * at.h + ow * at.w);
        gradient = widen(load_constant(static_cast<const S*>(args.grad_output) + n * from.n +
                                       (oc0 + o) * from.c + oh * from.h + ow * from.w));
        // Where ReLU is off nothing flows, whatever stands there.
        if (code < 0) gradient = 0;
      }
      word |= static_cast<uint32_t>(code + 1) << 4 * o;
      gradients[o] = gradient;
    }
  }
  return word;
}

// Adds gradient x pixel of one window to the sums of this lane's weights. `chosen`: the window's
// codes, as list_window has them; meets: the pixel of code 0 that each weight meets.
template <int Slots>
FUSEDCNN_DEVICE void add_window(uint32_t chosen, Shared<float> window_pixels,
                                Shared<float> gradients, const int (&meets)[Slots],
                                float (&acc)[kChannels][Slots]) {
  float gradient[kChannels];
  load_row(gradients, gradient);
  float pixel[Slots][4];
  FUSEDCNN_UNROLL
  for (int i = 0; i < Slots; ++i) {
    FUSEDCNN_UNROLL
    for (int e = 0; e < 4; ++e) {
      pixel[i][e] = window_pixels[meets[i] + e / 2 * kPitch + e % 2];
    }
  }
  FUSEDCNN_UNROLL
  for (int o = 0; o < kChannels; ++o) {
    const auto add = [&](int e) {
      FUSEDCNN_UNROLL
      for (int i = 0; i < Slots; ++i) {
        acc[o][i] = multiply_add(gradient[o], pixel[i][e], acc[o][i]);
      }
    };
    switch (chosen >> 4 * o & 15) {
      case 1: add(0); break;
      case 2: add(1); break;
      case 3: add(2); break;
      case 4: add(3); break;
      default: break;
    }
  }
}

// args: grad_output and code [N, OC, OH, OW], input [N, C, H, W] or null where only grad_bias is
// wanted. partial: [slabs][OC][9 C + 1].
template <typename S, int Slots>
FUSEDCNN_KERNEL_RESIDENT(kWinnersThreads, Slots == 1 ? 5 : 3)
grad_weight_winners_3x3_kernel(BackwardArgs args, WeightWinnersSizes sizes, float* partial) {
  constexpr int kSliceChannels = slice_channels(Slots);
  SharedMemory memory;
  // Of each warp, 32 windows at a time: gradients of its output channels, their codes plus one,
  // four bits each, and where the window's first pixel lies.
  const Shared<float> gradients = memory.array<float>(kWinnersThreads * kChannels);
  const Shared<uint32_t> codes = memory.array<uint32_t>(kWinnersThreads);
  const Shared<int> places = memory.array<int>(kWinnersThreads);
  const Shared<float> totals = memory.array<float>(kChannels * Slots * kWinnersThreads);
  const Shared<float> biases = memory.array<float>(kWinnersWarps * kChannels);
  const bool want_weight = args.grad_weight != nullptr;
  const int slice = sizes.channels < kSliceChannels ? sizes.channels : kSliceChannels;
  const Shared<float> pixels = memory.array<float>(want_weight ? slice * sizes.plane : 0);

  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int list = warp * kWarp;
  const int group = warp / sizes.channel_warps, groups = kWinnersWarps / sizes.channel_warps;
  const int slices = want_weight ? sizes.slices : 1;
  const int64_t tasks = sizes.slabs * slices * sizes.channel_blocks;

  for (int64_t task = block_index(); task < tasks; task += grid_blocks()) {
    const int first = static_cast<int>(task % slices) * kSliceChannels;
    const int channel_block = static_cast<int>(task / slices % sizes.channel_blocks);
    const int64_t slab = task / slices / sizes.channel_blocks;
    const int oc0 = (channel_block * sizes.channel_warps + warp % sizes.channel_warps) * kChannels;
    const int count = sizes.channels - first < slice ? sizes.channels - first : slice;

    int meets[Slots];  // the pixel of code 0 in a window at place 0
    FUSEDCNN_UNROLL
    for (int i = 0; i < Slots; ++i) {
      const int k = i * kWarp + lane;
      meets[i] = k < 9 * count ? k / 9 * sizes.plane + k % 9 / 3 * kPitch + k % 3 : 0;
    }
    // Sums of a tile make one chain; chains are then added up, in shared memory, to round no more
    // than the stock layers do.
    float acc[kChannels][Slots];
    float bias[kChannels];  // of this lane's windows: short chains already
    FUSEDCNN_UNROLL
    for (int o = 0; o < kChannels; ++o) {
      FUSEDCNN_UNROLL
      for (int i = 0; i < Slots; ++i) {
        acc[o][i] = 0;
        totals[(o * Slots + i) * kWinnersThreads + thread_index()] = 0;
      }
      bias[o] = 0;
    }

    const int64_t last = (slab + 1) * sizes.units / sizes.slabs;
    for (int64_t unit = slab * sizes.units / sizes.slabs; unit < last; ++unit) {
      const int place = static_cast<int>(unit % (sizes.tiles_h * sizes.tiles_w));
      const WindowTile tile{unit / (sizes.tiles_h * sizes.tiles_w),
                            place / sizes.tiles_w * sizes.tile_h,
                            place % sizes.tiles_w * sizes.tile_w};
      if (want_weight) {
        fetch_pixels<S>(args, sizes, tile, first, count, pixels);
        sync_threads();
      }

      const int windows = sizes.tile_h * sizes.tile_w;
      for (int begin = group * kWarp; begin < windows; begin += groups * kWarp) {
        const int window = begin + lane;
        const int y = window / sizes.tile_w, x = window % sizes.tile_w;
        const int oh = tile.h + y, ow = tile.w + x;
        const bool real = window < windows && oh < sizes.out_h && ow < sizes.out_w;
        const uint32_t word = list_window<S>(args, sizes, tile.n, oh, ow, real, oc0,
                                             gradients + (list + lane) * kChannels);
        float own[kChannels];
        load_row(gradients + (list + lane) * kChannels, own);
        FUSEDCNN_UNROLL
        for (int o = 0; o < kChannels; ++o) bias[o] += own[o];
        codes[list + lane] = word;
        places[list + lane] = 2 * y * kPitch + 2 * x;
        sync_warp();
        const int end = windows - begin < kWarp ? windows - begin : kWarp;
        for (int entry = list; want_weight && entry < list + end; ++entry) {
          const uint32_t chosen = codes[entry];
          if (!chosen) continue;
          add_window<Slots>(chosen, pixels + places[entry], gradients + entry * kChannels, meets,
                            acc);
        }
        sync_warp();  // the next windows overwrite these
      }
      FUSEDCNN_UNROLL
      for (int o = 0; o < kChannels; ++o) {
        FUSEDCNN_UNROLL
        for (int i = 0; i < Slots; ++i) {
          totals[(o * Slots + i) * kWinnersThreads + thread_index()] += acc[o][i];
          acc[o][i] = 0;
        }
      }
      sync_threads();  // the next tile overwrites this one
    }

    FUSEDCNN_UNROLL
    for (int o = 0; o < kChannels; ++o) {
      FUSEDCNN_UNROLL
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) bias[o] += shuffle_xor(bias[o], lanes);
      if (lane == 0) biases[warp * kChannels + o] = bias[o];
    }
    sync_threads();
    // The first warp of those that share output channels adds up their sums.
    if (group == 0) {
      FUSEDCNN_NO_UNROLL
      for (int o = 0; o < kChannels && oc0 + o < sizes.out_channels; ++o) {
        float* const to = partial + (slab * sizes.out_channels + oc0 + o) * sizes.sums.row;
        if (first == 0 && lane == 0) {
          float sum = 0;
          for (int other = warp; other < kWinnersWarps; other += sizes.channel_warps) {
            sum += biases[other * kChannels + o];
          }
          to[sizes.sums.row - 1] = sum;
        }
        for (int i = 0; want_weight && i < Slots; ++i) {
          const int k = i * kWarp + lane;
          if (k >= 9 * count) continue;
          float sum = 0;
          for (int other = warp; other < kWinnersWarps; other += sizes.channel_warps) {
            sum += totals[(o * Slots + i) * kWinnersThreads + other * kWarp + lane];
          }
          to[9 * first + k] = sum;
        }
      }
    }
    sync_threads();  // the next task's sums overwrite these
  }
}

// ---- host ---------------------------------------------------------------------------------------

// Calls body(integral constant of the slots) for the problem's number of channels.
template <typename Body>
auto for_slots(const Geometry& g, const Body& body) {
  if (g.in_channels <= slice_channels(1)) return body(std::integral_constant<int, 1>{});
  return body(std::integral_constant<int, 5>{});
}

// Bytes of shared memory of a block.
template <int Slots>
int64_t weight_winners_shared(const WeightWinnersSizes& sizes, bool want_weight) {
  const int slice = sizes.channels < slice_channels(Slots) ? sizes.channels : slice_channels(Slots);
  return shared_bytes<float>(kWinnersThreads * kChannels) + 2 * shared_bytes<int>(kWinnersThreads) +
         shared_bytes<float>(kChannels * Slots * kWinnersThreads) +
         shared_bytes<float>(kWinnersWarps * kChannels) +
         shared_bytes<float>(want_weight ? slice * sizes.plane : 0);
}

template <typename S, int Slots>
void launch_grad_weight_winners_3x3(const BackwardArgs& args, const Execution& execution) {
  const WeightWinnersSizes sizes = weight_winners_sizes<Slots>(args.geometry);
  float* const partial = static_cast<float*>(execution.workspace);
  const bool want_weight = args.grad_weight != nullptr;
  const int64_t tasks = sizes.slabs * (want_weight ? sizes.slices : 1) * sizes.channel_blocks;
  const int64_t shared = weight_winners_shared<Slots>(sizes, want_weight);
  launch("grad_weight_winners_3x3", grad_weight_winners_3x3_kernel<S, Slots>, blocks_for(tasks),
         kWinnersThreads, shared, execution, args, sizes, partial);
  launch_grad_weight_finish<S>(args, sizes.sums, partial, execution);
}

}  // namespace

const char* why_not_grad_weight_winners_3x3(const Problem& problem, const Target& target) {
  if (const char* reason = why_not_3x3_block(problem)) return reason;
  const int64_t shared = for_slots(problem.geometry, [&](auto slots) {
    return weight_winners_shared<slots>(weight_winners_sizes<slots>(problem.geometry), true);
  });
  return shared <= target.device.shared_bytes ? nullptr : kTooLittleShared;
}

int64_t grad_weight_winners_3x3_workspace(const Problem& problem) {
  return for_slots(problem.geometry, [&](auto slots) {
    const WeightWinnersSizes sizes = weight_winners_sizes<slots>(problem.geometry);
    return sizes.slabs * slab_bytes(sizes);
  });
}

void grad_weight_winners_3x3(const BackwardArgs& args, const Execution& execution) {
  for_slots(args.geometry, [&](auto slots) {
    for_block_storage(args.type, [&](auto storage) {
      launch_grad_weight_winners_3x3<decltype(storage), slots>(args, execution);
    });
  });
}

}  // namespace fusedcnn::cuda
