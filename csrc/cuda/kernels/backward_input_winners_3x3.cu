// grad_input on CUDA cores, sums in float: 3x3 convolution of stride 1 under a 2x2 pool of
// stride 2.
//
// Of a window's four convolution outputs at most one has a gradient, so a quarter of the arithmetic
// is left, and less where ReLU is off. A window meets a patch of 4x4 pixels, of which its code
// chooses the nine that get anything. A warp takes kWindows windows of a row and keeps sums of all
// their pixels in registers while it goes over the output channels: an output channel's weights are
// loaded once for all of the windows, and each window's code, the same for all lanes, says which
// sums they go to, by a branch that all lanes take together. A window that is off costs one branch.
//
// Lanes are input channels. Up to 16 of them: the lower half of a warp owns the left two columns of
// all patches, the upper half the right two; six multiply-adds in place of nine, of which three are
// one half's alone. Codes stay the same for all lanes.
//
// Patches overlap by two pixels. Their sums are added up in shared memory, one row of windows after
// the other in a fixed order, with barriers between: even rows, then odd ones. That memory holds a
// band of rows; the last two rows of pixels wait there for the next band. Larger maps are cut into
// tiles whose first row and column of windows are the last of the tile before, computed twice.
//
// 16 -> 32 channels at 16x16, half of the 2,048 pairs of window and output channel live, in warp
// instructions an image, of which nobody has seen the GPU's own:
//   to multiply and to branch: 1,024 x (6 + 9) + 1,024 x 4 = 19,500
//   to load for 8 windows and an output channel, and to loop: 256 x 13 = 3,300
//   to fetch gradients and codes: 64 x 25 = 1,600; to add patches up: 64 x 23 = 1,500
//   to write pixels and to clear their sums: 1,800
// 27,700 in all: 6,900 cycles of four issue slots, 26 ns on 132 multiprocessors at 1.98 GHz if no
// slot stays empty, which branches and 16 warps to a multiprocessor will not quite reach. Memory
// takes 6.2 ns. Shared memory is busy for 3,800 cycles. More live pairs cost 11 instructions each.
// 3 -> 16 at 32x32: the same for 3 channels as for 16, 58,000 instructions, 55 ns. With 32 channels
// a live pair does twice the work for three multiply-adds more, but only four windows share the
// loads. These are counts; an H200 took 137 ns and 311 ns, at 1,024 images in float32.
//
// A chain of additions has a product of each output channel of a slice, at most 64; slices and
// patches are then added up in shared memory, to round no more than the stock layers do. Only
// products of a gradient are taken: what is infinite or NaN goes to its own nine pixels.

#include <type_traits>

#include "cuda/kernels/block_3x3.h"

namespace fusedcnn::cuda {
namespace {

constexpr int kInputWinnersWarps = 8;  // of a block, at most
constexpr int kFetched = 32;           // output channels whose gradients a warp fetches at once
constexpr int kBand = 8;               // rows of windows that are summed up at a time, at most
// Windows of a tile along an axis: all, or as many as these, the first of them computed twice.
constexpr int kInputTileH = 4 * kBand, kInputTileW = 16;

// Lanes own Columns of a patch's four columns.
template <int Columns>
struct InputWindows {
  static constexpr int kLanes = Columns * 8;  // input channels of a warp
  static constexpr int kWindows = Columns == 4 ? 4 : 8;
  static constexpr int kSlice = Columns == 4 ? 32 : 64;  // output channels
  static_assert(Columns == 2 || Columns == 4);

  // Of weight (kh, kw), in rows of kLanes: what the two halves of a warp load at once comes first.
  static FUSEDCNN_DEVICE int weight_row(int kh, int kw) {
    return 3 * kh + (Columns == 4 ? kw : kw == 1 ? 2 : kw / 2);
  }
  // Sums of two neighbouring pixels, by channel. Two words more: 16 pixels of a row lie in
  // different banks, and those of the next row in the others.
  static constexpr int kPair = 2 * kLanes + 2;
};

struct InputWinnersSizes : MapSizes {
  int tiles_h, tiles_w, channel_blocks;
  int band;            // rows of windows
  int chunks;          // of a warp's windows, in a row of a tile
  int warps;           // of a block
  int slice;           // output channels whose weights are kept
  int staged;          // and whose gradients are, with room for what is fetched at once
  int row_words;       // of sums, 16 (mod 32)
  bool channels_last;  // grad_input's channels are neighbours in memory
  int64_t units;       // tiles of all images
};

// Fetches the weights of `slice` output channels from `oc0` on, and of `channels` input channels.
template <typename S, int Columns>
FUSEDCNN_DEVICE void fetch_weights(const BackwardArgs& args, int oc0, int slice, int first_channel,
                                   int channels, Shared<float> weights) {
  using Config = InputWindows<Columns>;
  constexpr int kLanes = Config::kLanes;
  const Strides& from = args.weight_strides;
  FUSEDCNN_NO_UNROLL
  for (int i = thread_index() / kLanes; i < 9 * slice; i += block_threads() / kLanes) {
    const int oc = i / 9, kh = i % 9 / 3, kw = i % 3, c = thread_index() % kLanes;
    float value = 0;
    if (c < channels) {
      value = widen(load_constant(static_cast<const S*>(args.weight) + (oc0 + oc) * from.n +
                                  (first_channel + c) * from.c + kh * from.h + kw * from.w));
    }
    weights[(9 * oc + Config::weight_row(kh, kw)) * kLanes + c] = value;
  }
}

// Fetches a window's gradients in `slice` output channels from `oc0` on, and its codes, four bits
// beside those of the warp's other windows. `real`: there is such a window, at (oh, ow).
template <typename S, int Columns>
FUSEDCNN_DEVICE void fetch_gradients(const BackwardArgs& args, int64_t n, int oh, int ow, bool real,
                                     int oc0, int slice, Shared<float> gradients,
                                     Shared<uint32_t> codes) {
  constexpr int kWindows = InputWindows<Columns>::kWindows;
  const int lane = thread_index() % kWarp;
  const Strides &at = args.code_strides, &from = args.grad_output_strides;
  const uint8_t* const code_at =
      static_cast<const uint8_t*>(args.code) + n * at.n + oh * at.h + ow * at.w;
  const S* const gradient_at =
      static_cast<const S*>(args.grad_output) + n * from.n + oh * from.h + ow * from.w;
  FUSEDCNN_NO_UNROLL
  for (int part = 0; part < slice; part += kFetched) {
    constexpr int kStep = kWarp / kWindows;  // output channels
    int code[kFetched / kStep];
    float gradient[kFetched / kStep];
    FUSEDCNN_UNROLL
    for (int i = 0; i < kFetched / kStep; ++i) {
      const int oc = part + i * kStep + lane / kWindows;
      code[i] = -1;
      gradient[i] = 0;
      if (real && oc < slice) {
        code[i] = load_code(code_at + (oc0 + oc) * at.c);
        gradient[i] = widen(load_constant(gradient_at + (oc0 + oc) * from.c));
      }
    }
    FUSEDCNN_UNROLL
    for (int i = 0; i < kFetched / kStep; ++i) {
      const int oc = part + i * kStep + lane / kWindows;
      uint32_t word = (code[i] < 0 ? 0u : 2u * code[i] + 1) << 4 * (lane % kWindows);
      FUSEDCNN_UNROLL
      for (int mask = 1; mask < kWindows; mask *= 2) word |= shuffle_xor(word, mask);
      gradients[oc * kWindows + lane % kWindows] = gradient[i];
      if (lane % kWindows == 0) codes[oc] = word;
    }
  }
}

// Adds gradient x weight of one output channel to the sums of a warp's windows. chosen: their
// codes; gradients: [kWindows]; weights: [9][kLanes].
template <int Columns>
FUSEDCNN_DEVICE void add_products(uint32_t chosen, Shared<float> gradients, Shared<float> weights,
                                  float (&acc)[InputWindows<Columns>::kWindows][4][Columns]) {
  using Config = InputWindows<Columns>;
  constexpr int kWindows = Config::kWindows, kLanes = Config::kLanes;
  const int lane = thread_index() % kWarp, channel = lane % kLanes;
  const bool left = lane < kLanes;
  float gradient[kWindows];
  load_row(gradients, gradient);
  // Two columns: the first weight of a row (left) or the last, and the one in the middle.
  constexpr int kWeights = Columns == 4 ? 3 : 2;
  float weight[3][kWeights];
  FUSEDCNN_UNROLL
  for (int kh = 0; kh < 3; ++kh) {
    FUSEDCNN_UNROLL
    for (int i = 0; i < kWeights; ++i) {
      weight[kh][i] = weights[3 * kh * kLanes + (Columns == 4 ? i * kLanes + lane
                                                 : i == 0     ? lane
                                                              : kWarp + channel)];
    }
  }
  FUSEDCNN_UNROLL
  for (int x = 0; x < kWindows; ++x) {
    const auto add = [&](int dy, int dx) {
      FUSEDCNN_UNROLL
      for (int kh = 0; kh < 3; ++kh) {
        float (&to)[Columns] = acc[x][dy + kh];
        if constexpr (Columns == 4) {
          FUSEDCNN_UNROLL
          for (int kw = 0; kw < 3; ++kw) {
            to[dx + kw] = multiply_add(gradient[x], weight[kh][kw], to[dx + kw]);
          }
        } else {
          to[dx] = multiply_add(gradient[x], weight[kh][0], to[dx]);
          // The other column of one half of the warp lies outside the nine pixels.
          if (left == (dx == 0)) {
            to[1 - dx] = multiply_add(gradient[x], weight[kh][1], to[1 - dx]);
          }
        }
      }
    };
    const auto bit = [&](int i) { return (chosen & 1u << (4 * x + i)) != 0; };
    if (bit(0)) {
      if (bit(2)) {
        bit(1) ? add(1, 1) : add(1, 0);
      } else {
        bit(1) ? add(0, 1) : add(0, 0);
      }
    }
  }
}

// Pixels [top, bottom) x [begin, end) of the sums are complete; they begin at (-base_h, -base_w) of
// the image. Those beyond summed_h or summed_w are reached by no window, and get zeros.
struct PixelArea {
  int top, bottom, begin, end, base_h, base_w, summed_h, summed_w;
};

template <typename S, int Columns>
FUSEDCNN_DEVICE void write_pixels(const BackwardArgs& args, const InputWinnersSizes& sizes,
                                  const PixelArea& area, int64_t n, int first_channel, int channels,
                                  Shared<float> sums) {
  using Config = InputWindows<Columns>;
  constexpr int kLanes = Config::kLanes, kPair = Config::kPair;
  if (area.top >= area.bottom || area.begin >= area.end) return;
  const Strides& to = args.grad_input_strides;
  const int wide = area.end - area.begin;
  const int pixel = sizes.channels_last ? thread_index() / kLanes : thread_index();
  const int pixels = sizes.channels_last ? block_threads() / kLanes : block_threads();
  const int c0 = sizes.channels_last ? thread_index() % kLanes : 0;
  const int channel_step = sizes.channels_last ? kLanes : 1;
  const int row_step = pixels / wide, col_step = pixels % wide;
  int row = area.top + pixel / wide, col = area.begin + pixel % wide;
  while (row < area.bottom) {
    const bool reached = row < area.summed_h && col < area.summed_w;
    const Shared<float> from =
        sums + (reached ? row * sizes.row_words + col / 2 * kPair + col % 2 : 0);
    S* at = static_cast<S*>(args.grad_input) + n * to.n + (first_channel + c0) * to.c +
            (row - area.base_h) * to.h + (col - area.base_w) * to.w;
    for (int c = c0; c < channels; c += channel_step) {
      *at = narrow<S>(reached ? from[2 * c] : 0.f);
      at += channel_step * to.c;
    }
    row += row_step;
    col += col_step;
    if (col >= area.end) col -= wide, ++row;
  }
}

// args: grad_output and code [N, OC, OH, OW], weight [OC, C, 3, 3], grad_input [N, C, H, W].
template <typename S, int Columns>
FUSEDCNN_KERNEL_RESIDENT(kInputWinnersWarps* kWarp, 2)
grad_input_winners_3x3_kernel(BackwardArgs args, InputWinnersSizes sizes) {
  using Config = InputWindows<Columns>;
  constexpr int kWindows = Config::kWindows, kLanes = Config::kLanes;
  constexpr int kPair = Config::kPair;
  SharedMemory memory;
  // [slice][weight_row][kLanes]; of each warp, an output channel's gradients of its windows, and
  // four bits for each: whether it is live, and the two of its code; sums [2 band + 2][pairs of
  // columns][kLanes][2].
  const Shared<float> weights = memory.array<float>(sizes.slice * 9 * kLanes);
  const Shared<float> gradients = memory.array<float>(sizes.warps * sizes.staged * kWindows);
  const Shared<uint32_t> codes = memory.array<uint32_t>(sizes.warps * sizes.staged);
  const int row_words = sizes.row_words;
  const Shared<float> sums = memory.array<float>((2 * sizes.band + 2) * row_words);

  const int threads = block_threads();
  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int channel = lane % kLanes;
  const bool left = lane < kLanes;  // or all of the columns
  const int first_channel = static_cast<int>(block_index() % sizes.channel_blocks) * kLanes;
  const int channels =
      sizes.channels - first_channel < kLanes ? sizes.channels - first_channel : kLanes;
  const bool resident = sizes.slice >= sizes.out_channels;
  bool fetched = false;

  // The barrier behind the first weights shows them to everyone.
  for (int i = thread_index(); i < (2 * sizes.band + 2) * row_words; i += threads) sums[i] = 0;

  const int64_t step = grid_blocks() / sizes.channel_blocks;
  for (int64_t unit = block_index() / sizes.channel_blocks; unit < sizes.units; unit += step) {
    const int64_t n = unit / (sizes.tiles_h * sizes.tiles_w);
    const int tile = static_cast<int>(unit % (sizes.tiles_h * sizes.tiles_w));
    const int tile_h = tile / sizes.tiles_w, tile_w = tile % sizes.tiles_w;
    const int first_h = tile_h * (kInputTileH - 1), first_w = tile_w * (kInputTileW - 1);
    const bool last_h = tile_h == sizes.tiles_h - 1, last_w = tile_w == sizes.tiles_w - 1;
    const int rows = last_h ? sizes.out_h - first_h : kInputTileH;
    const int cols = last_w ? sizes.out_w - first_w : kInputTileW;

    for (int band = 0; band < rows; band += sizes.band) {
      const int band_rows = rows - band < sizes.band ? rows - band : sizes.band;
      const int items = band_rows * sizes.chunks;
      for (int oc0 = 0; oc0 < sizes.out_channels; oc0 += sizes.slice) {
        const int slice =
            sizes.out_channels - oc0 < sizes.slice ? sizes.out_channels - oc0 : sizes.slice;
        if (!resident || !fetched) {
          // The slice before is no longer read: barriers followed.
          fetch_weights<S, Columns>(args, oc0, slice, first_channel, channels, weights);
          fetched = true;
          sync_threads();
        }

        for (int begin = 0; begin < items; begin += sizes.warps) {
          const int item = begin + warp;
          const int row = item / sizes.chunks, chunk = item % sizes.chunks;
          const int turn = item < items ? (row & 1) + 2 * (chunk & 1) : -1;
          const Shared<float> own_gradients = gradients + warp * sizes.staged * kWindows;
          const Shared<uint32_t> own_codes = codes + warp * sizes.staged;
          if (turn >= 0) {
            const int x = chunk * kWindows + lane % kWindows;
            fetch_gradients<S, Columns>(args, n, first_h + band + row, first_w + x, x < cols, oc0,
                                        slice, own_gradients, own_codes);
          }
          sync_warp();

          float acc[kWindows][4][Columns];
          FUSEDCNN_UNROLL
          for (int x = 0; x < kWindows; ++x) {
            FUSEDCNN_UNROLL
            for (int i = 0; i < 4 * Columns; ++i) acc[x][i / Columns][i % Columns] = 0;
          }

          if (turn >= 0) {
            FUSEDCNN_NO_UNROLL
            for (int oc = 0; oc < slice; ++oc) {
              const uint32_t chosen = own_codes[oc];
              if (!chosen) continue;
              add_products<Columns>(chosen, own_gradients + oc * kWindows,
                                    weights + oc * 9 * kLanes, acc);
            }
          }

          // Patches of rows, and of chunks, of the same parity do not overlap.
          const int turns = sizes.chunks > 1 ? 4 : 2;
          FUSEDCNN_NO_UNROLL
          for (int now = 0; now < turns; ++now) {
            if (turn == now) {
              FUSEDCNN_UNROLL
              for (int x = 0; x < kWindows; ++x) {
                if (chunk * kWindows + x < cols) {
                  const Shared<float> at =
                      sums + (2 * row * row_words +
                              (chunk * kWindows + x + (left ? 0 : 1)) * kPair + 2 * channel);
                  FUSEDCNN_UNROLL
                  for (int i = 0; i < 2 * Columns; ++i) {
                    const int y = i / (Columns / 2), pair = i % (Columns / 2);
                    const Shared<float> two = at + (y * row_words + pair * kPair);
                    Pack<2, float> sum = load_pack<2>(two);
                    sum.values[0] += acc[x][y][2 * pair];
                    sum.values[1] += acc[x][y][2 * pair + 1];
                    store_pack(two, sum);
                  }
                }
                sync_warp();  // the next window's left columns are this one's right ones
              }
            }
            sync_threads();  // the next turn's patches overlap with these
          }
        }
      }

      const int base_h = sizes.padding_h - 2 * (first_h + band);
      const int base_w = sizes.padding_w - 2 * first_w;
      const bool last_band = band + band_rows == rows;
      int top = first_h > 0 && band == 0 ? 2 : 0, begin = first_w > 0 ? 2 : 0;
      int bottom = sizes.in_h + base_h, end = sizes.in_w + base_w;
      if (top < base_h) top = base_h;
      if (begin < base_w) begin = base_w;
      if (!(last_h && last_band) && bottom > 2 * band_rows) bottom = 2 * band_rows;
      if (!last_w && end > 2 * cols) end = 2 * cols;
      write_pixels<S, Columns>(
          args, sizes, {top, bottom, begin, end, base_h, base_w, 2 * band_rows + 2, 2 * cols + 2},
          n, first_channel, channels, sums);
      sync_threads();
      // The band's last two rows are the next one's first; all others begin with zeros.
      for (int i = thread_index(); i < 2 * row_words; i += threads) {
        sums[i] = last_band ? 0.f : sums[2 * sizes.band * row_words + i];
        for (int y = 1; y <= sizes.band; ++y) sums[2 * y * row_words + i] = 0;
      }
      sync_threads();
    }
  }
}

// ---- host ---------------------------------------------------------------------------------------

template <int Columns>
InputWinnersSizes input_winners_sizes(const Geometry& g) {
  using Config = InputWindows<Columns>;
  const auto least = [](int a, int b) { return a < b ? a : b; };
  InputWinnersSizes s{};
  static_cast<MapSizes&>(s) = map_sizes(g);
  s.tiles_h = s.out_h > kInputTileH ? parts(s.out_h - 1, kInputTileH - 1) : 1;
  s.tiles_w = s.out_w > kInputTileW ? parts(s.out_w - 1, kInputTileW - 1) : 1;
  s.channel_blocks = parts(s.channels, Config::kLanes);
  s.band = least(s.out_h, kBand);
  s.chunks = parts(least(s.out_w, kInputTileW), Config::kWindows);
  s.warps = least(s.band * s.chunks, kInputWinnersWarps);
  s.slice = least(s.out_channels, Config::kSlice);
  s.staged = parts(s.slice, kFetched) * kFetched;
  s.row_words = (least(s.out_w, kInputTileW) + 1) * Config::kPair;
  s.row_words += (kWarp / 2 + kWarp - s.row_words % kWarp) % kWarp;
  s.units = g.batch * s.tiles_h * s.tiles_w;
  return s;
}

// Bytes of shared memory of a block.
template <int Columns>
int64_t input_winners_shared(const InputWinnersSizes& sizes) {
  using Config = InputWindows<Columns>;
  const int stage = sizes.warps * sizes.staged;
  return shared_bytes<float>(sizes.slice * 9 * Config::kLanes) +
         shared_bytes<float>(stage * Config::kWindows) + shared_bytes<uint32_t>(stage) +
         shared_bytes<float>((2 * sizes.band + 2) * sizes.row_words);
}

// Calls body(integral constant of the columns) for the problem's number of channels.
template <typename Body>
auto for_columns(const Geometry& g, const Body& body) {
  if (g.in_channels <= InputWindows<2>::kLanes) return body(std::integral_constant<int, 2>{});
  return body(std::integral_constant<int, 4>{});
}

template <typename S, int Columns>
void launch_grad_input_winners_3x3(const BackwardArgs& args, const Execution& execution) {
  InputWinnersSizes sizes = input_winners_sizes<Columns>(args.geometry);
  sizes.channels_last = args.grad_input_strides.c == 1;
  if (!sizes.units) return;
  // Each block several tiles of a large batch: 8 for each multiprocessor.
  const int64_t most = parts(8 * int64_t{execution.multiprocessors}, sizes.channel_blocks);
  const int64_t blocks = most < blocks_for(sizes.units) ? most : blocks_for(sizes.units);
  launch("grad_input_winners_3x3", grad_input_winners_3x3_kernel<S, Columns>,
         blocks * sizes.channel_blocks, sizes.warps * kWarp, input_winners_shared<Columns>(sizes),
         execution, args, sizes);
}

}  // namespace

const char* why_not_grad_input_winners_3x3(const Problem& problem, const Target& target) {
  // Too few lanes work.
  if (problem.geometry.in_channels < 3) return "fewer than 3 input channels";
  if (const char* reason = why_not_3x3_block(problem)) return reason;
  const int64_t shared = for_columns(problem.geometry, [&](auto columns) {
    return input_winners_shared<columns>(input_winners_sizes<columns>(problem.geometry));
  });
  return shared <= target.device.shared_bytes ? nullptr : kTooLittleShared;
}

void grad_input_winners_3x3(const BackwardArgs& args, const Execution& execution) {
  for_columns(args.geometry, [&](auto columns) {
    for_block_storage(args.type, [&](auto storage) {
      launch_grad_input_winners_3x3<decltype(storage), columns>(args, execution);
    });
  });
}

}  // namespace fusedcnn::cuda
