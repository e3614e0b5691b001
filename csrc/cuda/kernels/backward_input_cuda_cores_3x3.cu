// grad_input on CUDA cores, in float32: 3x3 convolution of stride 1 under a 2x2 pool of stride 2.
//
// A direct convolution of the gradient of the convolution's outputs, which exists in shared memory
// only (backward_input_3x3_tile.h). A thread owns 4 rows of 2 pixels in LaneChannels input
// channels: of an output channel it loads the 24 gradients that their taps meet, once for all of
// its channels, and each weight once for its pixels. A warp's lanes are the patches of 16 x 16
// pixels; their weights are the same, and Split warps have other channels.
//
// Three of four products are with zeros, and yet this is quicker than following the codes. Lanes
// that are input channels share a window's code, by which they branch: 137 ns an image of 16 -> 32
// channels on an H200, of which 26 were counted. Lanes that are windows load the weights that their
// own codes name, each for one multiply-add: 16,400 wavefronts of shared memory.
//
// Banks: lanes are 2 columns apart, with rows of 4 (mod 8) words 16 banks from patch to patch, and
// load two columns at once, so that 16 lanes meet 32 banks. What they load begins at an even place:
// where the padding is odd, places are written one to the right.
//
// 16 -> 32 at 16x16, warp instructions an image in sm_90's code, 32 output channels x 4 warps:
//   products: 288 each, 36,900 in all
//   loads and loops: 30 each, 3,800
//   to fetch and expand windows of 8 output channels, and to add up: 370 each, 5,900
//   to write: 170 a warp, 700
// 47,300: 11,800 cycles of four issue slots, 45 ns on 132 multiprocessors at 1.98 GHz. Shared
// memory is busy for 4,200 to 7,700 of them, as a load of 128 bits of one address takes one
// wavefront or four; memory takes 6.2 ns. 3 -> 16 at 32x32: 39,000, 37 ns, a third of it to fetch.
// These are counts; no GPU has run it.
//
// A chain of additions has the products of a slice of eight output channels, of which one in four
// is with a gradient that is not zero; then come the slices' totals, to round no more than the
// stock layers do: in one chain, 16 -> 32 channels err by 2.6 times as much as these, and 4 -> 512
// by 7. The product is dense: see backward_input_tensor_cores_3x3.cu on NaN.

#include "cuda/kernels/backward_input_3x3_tile.h"

namespace fusedcnn::cuda {
namespace {

// 16 x 16 pixels in LaneChannels * Split input channels.
template <int LaneChannels, int Split>
struct CoresTile : InputWindows<16, 16, Split * kWarp> {
  using Windows = InputWindows<16, 16, Split * kWarp>;
  static constexpr bool kTf32 = false;
  static constexpr int kLaneChannels = LaneChannels, kChannels = LaneChannels * Split;
  static constexpr int kPatchH = 4, kPatchW = 2, kPatches = 16 / kPatchW;  // next to each other
  static constexpr int kPitch = 28, kPlane = 2 * Windows::kWindowsH * kPitch + 8;
  static_assert(kPitch >= 2 * Windows::kWindowsW + 1 && kPitch % 8 == 4);
  static constexpr int kPlanes = 8;  // output channels of a slice
  static constexpr int kGradients = kPlanes * kPlane;
  static constexpr int kSlice = kPlanes * 9 * kChannels;
  // Of a thread's number, by which it flips (see expand) where gradients lie in planes.
  static constexpr int kFlipBit = 3;
  // Bytes of weights that a block keeps: one fits into any multiprocessor.
  static constexpr int64_t kMostWeights = 44 * 1024;
  // Blocks to a multiprocessor: 168 registers of a thread, or 128 where it fetches least.
  static constexpr int kResident = (Split < 8 ? 384 : 512) / Windows::kThreads;
};

// Weights of `count` slices from `first` on, [slice][plane][tap][channel]. Zeros behind the last
// channel and output channel.
template <typename Tile>
FUSEDCNN_DEVICE void fetch_input_weights(const BackwardArgs& args, const InputTileSizes& sizes,
                                         int channel_block, int first, int count,
                                         Shared<float> to) {
  const Strides strides = args.weight_strides;
  // An output channel's nine taps at once.
  FUSEDCNN_NO_UNROLL
  for (int i = thread_index(); i < count * Tile::kPlanes * Tile::kChannels; i += Tile::kThreads) {
    const int channel = i % Tile::kChannels, row = i / Tile::kChannels;
    const int plane = row % Tile::kPlanes, slice = first + row / Tile::kPlanes;
    const int c = channel_block * Tile::kChannels + channel;
    // As load_item has them: neighbours lie four planes apart.
    const int oc = slice * Tile::kPlanes + plane % 4 * 2 + plane / 4;
    const bool real = c < sizes.channels && oc < sizes.out_channels;
    const float* const from =
        static_cast<const float*>(args.weight) + oc * strides.n + c * strides.c;
    float taps[9];
    FUSEDCNN_UNROLL
    for (int k = 0; k < 9; ++k) {
      taps[k] = real ? load_constant(from + k / 3 * strides.h + k % 3 * strides.w) : 0.f;
    }
    FUSEDCNN_UNROLL
    for (int k = 0; k < 9; ++k) {
      to[(9 * row + k) * Tile::kChannels + channel] = taps[k];
    }
  }
}

// args: grad_output and code [N, OC, OH, OW], weight [OC, C, 3, 3], grad_input [N, C, H, W].
template <typename Tile>
FUSEDCNN_KERNEL_RESIDENT(Tile::kThreads, Tile::kResident)
grad_input_cuda_cores_3x3_kernel(BackwardArgs args, InputTileSizes sizes) {
  constexpr int kLaneChannels = Tile::kLaneChannels, kH = Tile::kPatchH, kW = Tile::kPatchW;
  constexpr int kSums = kH * kW * kLaneChannels;
  SharedMemory memory;
  const Shared<uint32_t> gradients = memory.array<uint32_t>(Tile::kGradients);
  const Shared<float> weights = memory.array<float>(sizes.kept_slices * Tile::kSlice);
  const int lane = thread_index() % kWarp, split = thread_index() / kWarp;
  const int patch_h = lane / Tile::kPatches * kH, patch_w = lane % Tile::kPatches * kW;
  // Places of windows begin at an even coordinate, those that pixel 0 meets at any.
  const int odd_w = sizes.padding_w % 2;
  const Shared<uint32_t> patch_gradients =
      gradients + ((patch_h + sizes.padding_h % 2) * Tile::kPitch + patch_w + 2 * odd_w);
  const Shared<float> lane_weights = weights + split * kLaneChannels;

  GradientStage<float, Tile> stage(sizes);
  stage.clear(sizes, gradients);
  stage.fetch(args, sizes);

  int weights_of = -1;  // channel block whose weights, all of them, are in shared memory
  for (InputWalk walk(sizes); !walk.done(); walk.advance(sizes)) {
    float sum[kSums], total[kSums];  // [row][column][channel]
    FUSEDCNN_UNROLL
    for (int i = 0; i < kSums; ++i) sum[i] = total[i] = 0;

    for (int slice = 0; slice < sizes.slices; ++slice) {
      stage.write(args, sizes, walk, slice, gradients + odd_w);
      const bool kept = sizes.kept_slices == sizes.slices;
      if (!kept || weights_of != walk.channel_block()) {
        fetch_input_weights<Tile>(args, sizes, walk.channel_block(), kept ? 0 : slice,
                                  sizes.kept_slices, weights);
        weights_of = walk.channel_block();
      }
      sync_threads();
      stage.fetch(args, sizes);

      const Shared<float> slice_weights = lane_weights + (kept ? slice : 0) * Tile::kSlice;
      FUSEDCNN_NO_UNROLL
      for (int plane = 0; plane < Tile::kPlanes; ++plane) {
        float place[kH + 2][kW + 2];
        FUSEDCNN_UNROLL
        for (int i = 0; i < (kH + 2) * (kW + 2); i += 2) {
          const int row = i / (kW + 2), col = i % (kW + 2);
          const Pack<2, uint32_t> two =
              load_pack<2>(patch_gradients + (plane * Tile::kPlane + row * Tile::kPitch + col));
          place[row][col] = float_from(two.values[0]);
          place[row][col + 1] = float_from(two.values[1]);
        }
        FUSEDCNN_UNROLL
        for (int tap = 0; tap < 9; ++tap) {
          float weight[kLaneChannels];
          load_row(slice_weights + (9 * plane + tap) * Tile::kChannels, weight);
          FUSEDCNN_UNROLL
          for (int i = 0; i < kSums; ++i) {
            const int dy = i / kLaneChannels / kW, dx = i / kLaneChannels % kW;
            const int c = i % kLaneChannels;
            sum[i] = multiply_add(place[dy + 2 - tap / 3][dx + 2 - tap % 3], weight[c], sum[i]);
          }
        }
      }
      FUSEDCNN_UNROLL
      for (int i = 0; i < kSums; ++i) total[i] += sum[i], sum[i] = 0;
    }

    const Strides to = args.grad_input_strides;
    const int channel = walk.channel_block() * Tile::kChannels + split * kLaneChannels;
    const int w = walk.tile_w(sizes) * Tile::kTileW + patch_w;
    FUSEDCNN_UNROLL
    for (int dy = 0; dy < kH; ++dy) {
      const int h = walk.tile_h(sizes) * Tile::kTileH + patch_h + dy;
      if (h >= sizes.in_h || w >= sizes.in_w) continue;
      const auto value = [&](int dx, int c) { return total[(dy * kW + dx) * kLaneChannels + c]; };
      float* const pixel = static_cast<float*>(args.grad_input) + walk.n() * to.n + channel * to.c +
                           h * to.h + w * to.w;
      if (sizes.channel_packs) {
        FUSEDCNN_UNROLL
        for (int dx = 0; dx < kW; ++dx) {
          if (w + dx >= sizes.in_w || channel >= sizes.channels) continue;
          Pack<kLaneChannels, float> pack;
          FUSEDCNN_UNROLL
          for (int c = 0; c < kLaneChannels; ++c) pack.values[c] = value(dx, c);
          store_pack(pixel + dx * to.w, pack);
        }
        continue;
      }
      FUSEDCNN_UNROLL
      for (int c = 0; c < kLaneChannels; ++c) {
        if (channel + c >= sizes.channels) continue;
        float* const at = pixel + c * to.c;
        if (sizes.pixel_packs) {
          store_pack(at, Pack<2, float>{{value(0, c), value(1, c)}});
        } else {
          at[0] = value(0, c);
          if (w + 1 < sizes.in_w) at[to.w] = value(1, c);
        }
      }
    }
  }
}

// ---- host ---------------------------------------------------------------------------------------

template <typename Tile>
void launch_grad_input_cuda_cores_3x3(const BackwardArgs& args, const Execution& execution) {
  launch_input_tiles<Tile>(
      "grad_input_cuda_cores_3x3", grad_input_cuda_cores_3x3_kernel<Tile>, args,
      input_tile_sizes<float, Tile>(args, Tile::kPatchW, Tile::kLaneChannels), execution);
}

}  // namespace

void grad_input_cuda_cores_3x3(const BackwardArgs& args, const Execution& execution) {
  const int64_t channels = args.geometry.in_channels;
  if (channels <= 4) return launch_grad_input_cuda_cores_3x3<CoresTile<2, 2>>(args, execution);
  if (channels <= 8) return launch_grad_input_cuda_cores_3x3<CoresTile<4, 2>>(args, execution);
  if (channels <= 16) return launch_grad_input_cuda_cores_3x3<CoresTile<4, 4>>(args, execution);
  launch_grad_input_cuda_cores_3x3<CoresTile<4, 8>>(args, execution);
}

}  // namespace fusedcnn::cuda
