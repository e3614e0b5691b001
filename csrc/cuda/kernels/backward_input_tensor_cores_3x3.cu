// grad_input on tensor cores: 3x3 convolution of stride 1 under a 2x2 pool of stride 2, in
// bfloat16, float16, or float32 rounded to tf32; sums in float.
//
// An implicit matrix product, pixels of the input (M) x input channels (N), over taps x output
// channels (K). Its left operand is the gradient of the convolution's outputs, which exists in
// shared memory only: a pooled gradient and its code are fetched once per tile, and expanded into
// four places of which the code names the one that gets it; the others get zeros.
//
// A warp owns 16 patches of 2 x 4 pixels, for 8 * NTiles input channels. Pixel (dy, j) of the
// patches is tile (dy, j) of M, whose row is the patch: so a thread owns all of its two patches g
// and g + 8, and the gradients that their nine taps meet are 4 rows of 6, of which each is loaded
// once for all taps, rather than once for each. A product's four columns 2t, 2t + 1 are
// neighbouring channels, and its rows four neighbouring pixels: either is one access to memory.
//
// Shared memory holds words of 32 bits: a tf32 number, or the halves of two output channels, in
// planes [k][row][col], one for each row of K in a product. Which channels these are is free to
// choose: rows t and t + 4 hold 4 (tf32: 2) neighbours, so that these are fetched at once where
// channels come last. Lanes g are 8 patches, 4 columns apart and 2 rows 16 (or 24) banks, lanes t
// planes that are 9: a load meets all 32. Weights lie as fragments, those of all output channels
// where there is room.
//
// The gradients of the next slice of output channels, or the next tile, are on their way to
// registers while the products of this one are taken; only those of windows around a tile, where a
// map has several, are waited for.
//
// 16 -> 32 channels at 16x16, per image and in bfloat16 (tf32): 2 (4) slices x 2 warps.
//   products: 144 a warp and slice, 576 (1,152) in all: 3.7 (7.3) ns on 132 multiprocessors at
//     1.98 GHz, if they reach 60 % of the peak
//   shared memory: 96 wavefronts of gradients, 36 of weights, 32 to expand: 656 (1,312) cycles, 2.5
//     (5.0) ns
//   memory: 14 (26) KiB, 3.3 (6.2) ns at 4.3 TB/s
//   instructions, as compiled for sm_90 and with gradients in planes: 350 (250) to fetch, 240 (150)
//     to expand, 280 for products and loads, and 250 a warp to write: 4,000 (5,900) on four
//     schedulers, 3.8 (5.6) ns
// None stands out; if they overlapped perfectly, products would bound it. With 12 warps to a
// multiprocessor they will not quite: between 4 (8) and 8 (14) ns. 3 -> 16 at 32x32, one (two)
// slices of 8 warps with half of the products each, for 5 of 8 columns in vain: 576 (1,152)
// products again, where memory takes 4.2 (7.6) ns for 18 (32) KiB. Maps of 8 rows or fewer leave
// half of a tile empty. These are counts; an H200 took 25 (40) ns an image of 16 -> 32 and 35
// (51) of 3 -> 16, at 1,024 images.
//
// All taps and output channels make one chain per pixel and channel, of 9 OC / 16 (tf32: 8) matrix
// instructions, each of which rounds or truncates once: for 512 output channels 288 (576) times
// 2^-23 of the sum of magnitudes at worst, 2^-15 (2^-14). Rounding to tf32 errs by up to 2^-11 of
// each operand, and rounding a result by 2^-11 or 2^-8 of it, in float16 and bfloat16. So chains
// are not cut.
//
// The product is dense: an infinite or NaN weight makes NaN of every pixel of its channel that lies
// in a tile, and so of at least those that it spoils in the stock layers' products. Gradients,
// infinite or NaN, spread to their own nine pixels only.

#include "cuda/kernels/backward_input_3x3_tile.h"

namespace fusedcnn::cuda {
namespace {

// 16 x TileW pixels, 8 * NTiles * Split input channels: Split warps share a warp's pixels.
template <int TileW, int NTiles, int Split>
struct MmaTile : InputWindows<16, TileW, TileW / 8 * Split * kWarp> {
  using Windows = InputWindows<16, TileW, TileW / 8 * Split * kWarp>;
  static constexpr bool kTf32 = true;
  static constexpr int kNTiles = NTiles, kSplit = Split, kPixelWarps = TileW / 8;
  static constexpr int kChannels = 8 * NTiles * Split;
  static constexpr int kPatches = TileW / 4;  // next to each other
  // Lanes g of a load reach over 8 patches, lanes t over four planes: 32 banks.
  static constexpr int kPitch = kPatches == 4 ? 24 : 12;
  static constexpr int kPlane = (2 * Windows::kWindowsH * kPitch + 31) / 32 * 32 + 9;
  static_assert(kPitch >= 2 * Windows::kWindowsW && (kPatches == 4 || kPatches == 2));
  static constexpr int kGradients = 8 * kPlane;  // words
  static constexpr int kTap = Split * kWarp * 2 * NTiles, kSlice = 9 * kTap;

  // Of a thread's number, by which it flips (see expand) where gradients lie in planes.
  static constexpr int kFlipBit = 4;
  // Bytes of weights that a block keeps: two blocks fit into a multiprocessor of sm_90, one into
  // any of sm_80 and later.
  static constexpr int64_t kMostWeights = 80 * 1024;
  // Blocks to a multiprocessor: 128 registers of a thread for 32 accumulators, 168 for 64, and some
  // more where a thread fetches most.
  static constexpr int kResident =
      ((NTiles == 1 ? 512 : 384) - (TileW == 8 && Split == 1 ? 128 : 0)) / Windows::kThreads;
};

// Column `col` of tile `tile` of N, as one of a warp's channels: columns 2t and 2t + 1 of all tiles
// are neighbours.
template <int NTiles>
FUSEDCNN_DEVICE int channel_of(int tile, int col) {
  return (col / 2 * NTiles + tile) * 2 + col % 2;
}

// Weights of `count` slices from `first` on, as fragments: [slice][tap][warp of Split][lane]
// [tile of N][register]. Zeros behind the last channel and output channel.
template <typename S, typename Tile>
FUSEDCNN_DEVICE void fetch_input_fragments(const BackwardArgs& args, const InputTileSizes& sizes,
                                           int channel_block, int first, int count,
                                           Shared<uint32_t> to) {
  constexpr int kLaneWords = 2 * Tile::kNTiles;
  const Strides strides = args.weight_strides;
  // Words of one tap, of all slices: each takes nine, all on their way at once.
  FUSEDCNN_NO_UNROLL
  for (int i = thread_index(); i < count * Tile::kTap; i += Tile::kThreads) {
    const int part = i % 2, tile = i % kLaneWords / 2, lane = i / kLaneWords % kWarp;
    const int split = i / kLaneWords / kWarp % Tile::kSplit, slice = i / Tile::kTap;
    const int c = channel_block * Tile::kChannels + split * 8 * Tile::kNTiles +
                  channel_of<Tile::kNTiles>(tile, lane / 4);
    const int oc = (((first + slice) * 4 + lane % 4) * 2 + part) * kPerWord<S>;
    const S* const from = static_cast<const S*>(args.weight) + oc * strides.n + c * strides.c;
    FUSEDCNN_UNROLL
    for (int kh = 0; kh < 3; ++kh) {
      S taps[kPerWord<S>][3]{};
      FUSEDCNN_UNROLL
      for (int half = 0; half < kPerWord<S>; ++half) {
        if (c >= sizes.channels || oc + half >= sizes.out_channels) continue;
        FUSEDCNN_UNROLL
        for (int kw = 0; kw < 3; ++kw) {
          taps[half][kw] = load_constant(from + half * strides.n + kh * strides.h + kw * strides.w);
        }
      }
      FUSEDCNN_UNROLL
      for (int kw = 0; kw < 3; ++kw) {
        const Shared<uint32_t> word =
            to + (slice * Tile::kSlice + (3 * kh + kw) * Tile::kTap + i % Tile::kTap);
        if constexpr (sizeof(S) == 4) {
          *word = to_tf32(taps[0][kw]);
        } else {
          *word = two_halves(taps[0][kw], taps[1][kw]);
        }
      }
    }
  }
}

// Products of a row of four pixels with a row of taps: place `j + 2 - kw` meets tap kw.
template <typename S, int NTiles>
FUSEDCNN_DEVICE void multiply_row(float (&acc)[4][NTiles][4], const uint32_t (&places)[6][4],
                                  const uint32_t (&taps)[3][2 * NTiles]) {
  FUSEDCNN_UNROLL
  for (int kw = 0; kw < 3; ++kw) {
    FUSEDCNN_UNROLL
    for (int j = 0; j < 4; ++j) {
      FUSEDCNN_UNROLL
      for (int tile = 0; tile < NTiles; ++tile) {
        const uint32_t b[2] = {taps[kw][2 * tile], taps[kw][2 * tile + 1]};
        multiply(S{}, acc[j][tile], places[j + 2 - kw], b);
      }
    }
  }
}

// args: grad_output and code [N, OC, OH, OW], weight [OC, C, 3, 3], grad_input [N, C, H, W].
template <typename S, typename Tile>
FUSEDCNN_KERNEL_RESIDENT(Tile::kThreads, Tile::kResident)
grad_input_tensor_cores_3x3_kernel(BackwardArgs args, InputTileSizes sizes) {
  constexpr int kNTiles = Tile::kNTiles;
  SharedMemory memory;
  const Shared<uint32_t> gradients = memory.array<uint32_t>(Tile::kGradients);
  const Shared<uint32_t> fragments = memory.array<uint32_t>(sizes.kept_slices * Tile::kSlice);
  const int lane = thread_index() % kWarp, g = lane / 4, t = lane % 4;
  const int warp = thread_index() / kWarp, split = warp / Tile::kPixelWarps;
  const int patch = warp % Tile::kPixelWarps * 16 + g;  // and the one 8 on
  const auto patch_row = [](int p) { return p / Tile::kPatches * 2; };
  const auto patch_col = [](int p) { return p % Tile::kPatches * 4; };
  // Places of windows begin at an even coordinate, those that pixel 0 meets at any.
  const Shared<uint32_t> patch_gradients =
      gradients + (t * Tile::kPlane + (patch_row(patch) + sizes.padding_h % 2) * Tile::kPitch +
                   patch_col(patch) + sizes.padding_w % 2);
  const Shared<uint32_t> lane_fragments = fragments + (split * kWarp + lane) * 2 * kNTiles;

  GradientStage<S, Tile> stage(sizes);
  stage.clear(sizes, gradients);
  stage.fetch(args, sizes);

  int weights_of = -1;  // channel block whose weights, all of them, are in shared memory
  for (InputWalk walk(sizes); !walk.done(); walk.advance(sizes)) {
    float acc[2][4][kNTiles][4];  // [dy][j][tile of N][register]
    FUSEDCNN_UNROLL
    for (int i = 0; i < 32 * kNTiles; ++i) {
      acc[i / kNTiles / 16][i / kNTiles / 4 % 4][i / 4 % kNTiles][i % 4] = 0;
    }

    for (int slice = 0; slice < sizes.slices; ++slice) {
      stage.write(args, sizes, walk, slice, gradients);
      const bool kept = sizes.kept_slices == sizes.slices;
      if (!kept || weights_of != walk.channel_block()) {
        fetch_input_fragments<S, Tile>(args, sizes, walk.channel_block(), kept ? 0 : slice,
                                       sizes.kept_slices, fragments);
        weights_of = walk.channel_block();
      }
      sync_threads();
      stage.fetch(args, sizes);

      // Row r of the gradients meets tap kh in row dy of pixels where r = dy + 2 - kh. A row at a
      // time: more would be loaded ahead than there are registers.
      const Shared<uint32_t> taps = lane_fragments + (kept ? slice : 0) * Tile::kSlice;
      uint32_t b[3][2 * kNTiles];
      FUSEDCNN_NO_UNROLL
      for (int r = 0; r < 4; ++r) {
        uint32_t places[6][4];  // rows g, g + 8 of M, at rows t and t + 4 of K
        FUSEDCNN_UNROLL
        for (int i = 0; i < 24; ++i) {
          const int plane = i % 4 / 2 * 4, row = r + i % 2 * patch_row(8);
          places[i / 4][i % 4] = patch_gradients[plane * Tile::kPlane + row * Tile::kPitch + i / 4];
        }
        if (r > 0) multiply_row<S, kNTiles>(acc[1], places, b);
        if (r == 3) continue;
        FUSEDCNN_UNROLL
        for (int kw = 0; kw < 3; ++kw) {
          load_row(taps + (3 * (2 - r) + kw) * Tile::kTap, b[kw]);
        }
        multiply_row<S, kNTiles>(acc[0], places, b);
      }
    }

    const Strides to = args.grad_input_strides;
    const int channel = walk.channel_block() * Tile::kChannels + split * 8 * kNTiles +
                        channel_of<kNTiles>(0, 2 * t);
    S* const image = static_cast<S*>(args.grad_input) + walk.n() * to.n + channel * to.c;
    FUSEDCNN_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int dy = i % 2, half = i / 2;
      const int h = walk.tile_h(sizes) * Tile::kTileH + patch_row(patch + 8 * half) + dy;
      const int w = walk.tile_w(sizes) * Tile::kTileW + patch_col(patch);
      if (h >= sizes.in_h || w >= sizes.in_w || channel >= sizes.channels) continue;
      S* const pixel = image + h * to.h + w * to.w;
      const auto value = [&](int j, int c) {
        return narrow<S>(acc[dy][j][c / 2][2 * half + c % 2]);
      };
      if (sizes.channel_packs) {
        FUSEDCNN_UNROLL
        for (int j = 0; j < 4; ++j) {
          if (w + j >= sizes.in_w) continue;
          Pack<2 * kNTiles, S> pack;
          FUSEDCNN_UNROLL
          for (int c = 0; c < 2 * kNTiles; ++c) pack.values[c] = value(j, c);
          store_pack(pixel + j * to.w, pack);
        }
        continue;
      }
      FUSEDCNN_UNROLL
      for (int c = 0; c < 2 * kNTiles; ++c) {
        if (channel + c >= sizes.channels) continue;
        Pack<4, S> pack;
        FUSEDCNN_UNROLL
        for (int j = 0; j < 4; ++j) pack.values[j] = value(j, c);
        if (sizes.pixel_packs) {
          store_pack(pixel + c * to.c, pack);
          continue;
        }
        FUSEDCNN_UNROLL
        for (int j = 0; j < 4; ++j) {
          if (w + j < sizes.in_w) pixel[c * to.c + j * to.w] = pack.values[j];
        }
      }
    }
  }
}

// ---- host ---------------------------------------------------------------------------------------

template <typename S, typename Tile>
void launch_grad_input_tensor_cores_3x3(const BackwardArgs& args, const Execution& execution) {
  launch_input_tiles<Tile>("grad_input_tensor_cores_3x3",
                           grad_input_tensor_cores_3x3_kernel<S, Tile>, args,
                           input_tile_sizes<S, Tile>(args, 4, 2 * Tile::kNTiles), execution);
}

template <typename S, int TileW>
void grad_input_tensor_cores_3x3_wide(const BackwardArgs& args, const Execution& execution) {
  if (args.geometry.in_channels <= 8) {
    launch_grad_input_tensor_cores_3x3<S, MmaTile<TileW, 1, 1>>(args, execution);
  } else if (args.geometry.in_channels <= 16) {
    launch_grad_input_tensor_cores_3x3<S, MmaTile<TileW, 2, 1>>(args, execution);
  } else {
    launch_grad_input_tensor_cores_3x3<S, MmaTile<TileW, 2, 2>>(args, execution);
  }
}

template <typename S>
void grad_input_tensor_cores_3x3_typed(const BackwardArgs& args, const Execution& execution) {
  // 16 x 16 pixels unless 16 x 8 leave less of their tiles empty.
  const int64_t width = args.geometry.w.in;
  (width + 15) / 16 * 2 <= (width + 7) / 8
      ? grad_input_tensor_cores_3x3_wide<S, 16>(args, execution)
      : grad_input_tensor_cores_3x3_wide<S, 8>(args, execution);
}

}  // namespace

void grad_input_tensor_cores_3x3(const BackwardArgs& args, const Execution& execution) {
  for_block_storage(args.type, [&](auto storage) {
    grad_input_tensor_cores_3x3_typed<decltype(storage)>(args, execution);
  });
}

}  // namespace fusedcnn::cuda
