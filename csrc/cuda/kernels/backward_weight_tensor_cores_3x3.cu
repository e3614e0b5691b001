// grad_weight and grad_bias on tensor cores: 3x3 convolution of stride 1 under a 2x2 pool of stride
// 2, in bfloat16, float16, or float32 rounded to tf32; sums in float.
//
// A matrix product, output channels (M) x input channels and taps (N), over pixels (K). A warp owns
// 16 output channels and CTiles tiles of N = 8 input channels for each of the nine taps; it takes
// quads of 16 windows, four neighbours for each t. Which pixel is which row of K is free to choose:
//   16 bits  step j of 4: rows 2t, 2t + 1 are the upper pixels of window 4t + j, rows 2t + 8 and
//            2t + 9 the lower ones
//   tf32     step 2j + dx of 8: row t is the upper pixel dx of window 4t + j, row t + 4 the lower
// So all of a lane's A are its own four windows in output channels g and g + 8: it reads their
// gradients and codes from memory, four at a time, and puts zeros where the code says so. And B's
// second half is its first half a row of pixels further down: four rows serve the three taps of a
// column, and the next step needs only two (tf32: one) new columns.
//
// Shared memory holds a tile's pixels with a halo, eight channels of one pixel together, so that
// ldmatrix, transposed, finds 8 pixels x 8 channels wherever a tap puts them. After every eight
// pixels two places (tf32: one) stay free, and rows are as long as lets all 32 lanes meet 32 banks
// (tf32, less than five windows wide: two lanes a bank). Staging goes through registers, since
// channels become neighbours on the way; while one block waits for it, others compute.
//
// Estimates per image, an SM's issue slots from the compiled code (four a cycle), wavefronts of
// shared memory, tensor cores at 60 % of their peak, and memory at 4.3 TB/s; 132 SMs, 1.98 GHz:
//                      instructions            issue  shared  tensor  memory
//   16 -> 32 at 16x16  8 quads of 390 + 3,200  6.0    2.9     3.7     3.3 ns   16 bits
//                      8 quads of 620 + 3,400  8.0    5.4     7.3     6.2 ns   tf32
//   3 -> 16 at 32x32   16 of 320 + 2,900       7.6    3.4     3.7     4.2 ns   16 bits
//                      16 of 430 + 4,700       11     7.5     7.3     7.6 ns   tf32
// Issue bounds it: of a quad's instructions, 36 CTiles (tf32: 72 CTiles) are products, and 140
// fetch. Five of eight channels are zeros where there are 3. A quad with windows or pixels that
// there are not costs 70 % more. These are counts; an H200 took 43 ns (tf32: 47) an image of 16 ->
// 32 and 38 (43) of 3 -> 16, at 1,024 images, when a quad had 15 % more of them and a tile's pixels
// were waited for one after the other.
//
// A block sums a slab of the images' tiles in registers; its warps' sums are added in order, and
// the second stage adds up the slabs. How many there are depends on the geometry alone. For 16 ->
// 32 channels a slab's sums are 18 KiB, as much as an image and its gradients: at batches below
// some 1,000 these sums, which stay in the L2 cache, cost about as much as all else. A register
// takes at most kMmaChain products of an instruction (K = 16, tf32: 8, of which a quarter is not
// zero), unless the slabs' sums would take more than kMostPartialBytes. Should each addition
// truncate, that is kMmaChain / 2^24 = 2^-16 at most of the magnitudes added up: beside 2^-9 and
// 2^-12 for rounding the result and 2^-11 for rounding tf32's operands, nothing. The bias, which is
// not rounded to tf32, has chains of 4 gradients, and of 64 such sums.
//
// Products with gradients of zero are computed, as in stock layers and unlike in the kernels that
// follow the codes: a pixel that is not finite makes NaN of every weight that it meets. No farther:
// pixels at places that no window of the convolution's output covers are kept out.

#include <type_traits>

#include "cuda/kernels/backward_weight_tensor_cores_3x3_tile.h"

namespace fusedcnn::cuda {
namespace {

constexpr int kMmaWarps = kMmaThreads / kWarp;
constexpr int kQuad = 16;         // windows that a warp takes at a time
constexpr int kTileSums = 9 * 4;  // of a lane, for a tile's nine taps
constexpr int kSumPitch = kMmaThreads + 1;
// Products that a register adds up at most, but for the tile that is begun then.
constexpr int kMmaChain = 256;

// Blocks to a multiprocessor.
template <int CTiles>
constexpr int kMmaResident = CTiles == 1 ? 4 : 3;
// Steps of K in a quad, and pixels of a row that each takes of four neighbouring windows.
template <typename S>
constexpr int kQuadSteps = sizeof(S) == 4 ? 8 : 4;
template <typename S>
constexpr int kStepPixels = 8 / kQuadSteps<S>;

// The fragment of a step: the gradients where their codes say, zeros at the other pixels.
template <typename S>
FUSEDCNN_DEVICE void expand(const Gradients<S>& from, int step, uint32_t (&a)[4]) {
  const int window = step * kStepPixels<S> / 2;
  FUSEDCNN_UNROLL
  for (int row = 0; row < 2; ++row) {
    const uint32_t code = from.codes[row] >> 8 * window & 0xff;
    const S value = gradient_of(from, row, window);
    if constexpr (sizeof(S) == 4) {
      const uint32_t bits = to_tf32(value), dx = step % 2;
      a[row] = code == dx ? bits : 0;
      a[row + 2] = code == 2 + dx ? bits : 0;
    } else {
      const uint32_t bits = code % 2 ? static_cast<uint32_t>(value.bits) << 16 : value.bits;
      a[row] = code < 2 ? bits : 0;
      a[row + 2] = code / 2 == 1 ? bits : 0;
    }
  }
}

// Four rows of pixels, `column` columns right of `at`, as fragments: register r is row r.
template <typename S>
FUSEDCNN_DEVICE void load_column(Shared<Pixel<S>> at, int pitch, int column, int odd,
                                 uint32_t (&to)[4]) {
  if constexpr (sizeof(S) == 4) {
    const Shared<Pixel<S>> first = at + (column + column / 8 * kSkew<S>)*kNTile;
    FUSEDCNN_UNROLL
    for (int row = 0; row < 4; ++row) to[row] = first[row * pitch * kNTile];
  } else {
    // This lane's row of its matrix is a pixel to the right where `odd`.
    const int skew = column == 7 ? odd * kSkew<S> : column / 8 * kSkew<S>;
    load_matrices_transposed(to, at + (column + skew) * kNTile);
  }
}

// Adds a quad's products. `at`: of the quad's pixels, what this lane loads; `plane`: elements to
// the next tile of channels. `valid`: of this lane's four windows, which of the upper eight and
// lower eight pixels exist, where Masked; otherwise all do.
template <bool Masked, typename S, int CTiles>
FUSEDCNN_DEVICE void multiply_quad(const Gradients<S>& gradients, Shared<Pixel<S>> at, int plane,
                                   int pitch, int odd, uint32_t valid, float (&acc)[CTiles][9][4]) {
  constexpr int kNew = kStepPixels<S>;  // columns; the others are those of the step before
  uint32_t columns[CTiles][3][4];
  FUSEDCNN_UNROLL
  for (int step = 0; step < kQuadSteps<S>; ++step) {
    uint32_t a[4];
    expand(gradients, step, a);
    uint32_t masks[2] = {~0u, ~0u};
    if constexpr (Masked) {
      FUSEDCNN_UNROLL
      for (int i = 0; i < 2; ++i) {
        const uint32_t bits = valid >> (8 * i + kNew * step);
        masks[i] = sizeof(S) == 4 ? (bits & 1 ? ~0u : 0u)
                                  : (bits & 1 ? 0xffffu : 0u) | (bits & 2 ? 0xffff0000u : 0u);
      }
    }
    FUSEDCNN_UNROLL
    for (int tile = 0; tile < CTiles; ++tile) {
      FUSEDCNN_UNROLL
      for (int kw = 0; kw < 3; ++kw) {
        if (step > 0 && kw + kNew < 3) {
          FUSEDCNN_UNROLL
          for (int r = 0; r < 4; ++r) columns[tile][kw][r] = columns[tile][kw + kNew][r];
        } else {
          load_column<S>(at + tile * plane, pitch, kNew * step + kw, odd, columns[tile][kw]);
        }
        FUSEDCNN_UNROLL
        for (int kh = 0; kh < 3; ++kh) {
          uint32_t b[2];
          FUSEDCNN_UNROLL
          for (int i = 0; i < 2; ++i) {
            b[i] = columns[tile][kw][kh + i];
            if constexpr (Masked) b[i] &= masks[i];
          }
          multiply(S{}, acc[tile][3 * kh + kw], a, b);
        }
      }
    }
  }
}

// args: grad_output and code [N, OC, OH, OW], input [N, C, H, W] or null where only grad_bias is
// wanted. partial: [slabs][OC][9 C + 1]. Loaded: of a tile's channels those that there may be.
template <typename S, int CTiles, int Loaded>
FUSEDCNN_KERNEL_RESIDENT(kMmaThreads, kMmaResident<CTiles>)
grad_weight_tensor_cores_3x3_kernel(BackwardArgs args, WeightMmaSizes sizes, float* partial) {
  const bool want_weight = args.grad_weight != nullptr;
  SharedMemory memory;
  const Shared<float> biases = memory.array<float>(kMmaWarps * 16);
  const Shared<float> sums = memory.array<float>(want_weight ? kTileSums * kSumPitch : 0);
  const Shared<Pixel<S>> pixels = memory.array<Pixel<S>>(want_weight ? CTiles * sizes.plane : 0);

  const int lane = thread_index() % kWarp;
  // Where this lane's four neighbouring windows lie in a quad. Asked for where it is needed: less
  // to keep in registers.
  const auto window_h = [&] { return 4 * (fresh_thread_index() % 4) >> sizes.tile_w_bits; };
  const auto window_w = [&] { return 4 * (fresh_thread_index() % 4) & (sizes.tile_w - 1); };
  // What this lane loads of a quad's pixels: channel g of its windows; or, for ldmatrix, all
  // channels of pixel lane % 8, of the row that is matrix lane / 8.
  const int odd = sizeof(S) == 4 ? 0 : lane % 2;
  const int loaded = sizeof(S) == 4 ? lane % 4 * 4 : lane % 8 / 2 * 4;
  const int loaded_h = loaded / sizes.tile_w * 2 + (sizeof(S) == 4 ? 0 : lane / 8);
  const int loaded_w = loaded % sizes.tile_w;
  const Shared<Pixel<S>> lane_pixels =
      pixels + ((loaded_h * sizes.pitch + 2 * loaded_w + loaded_w / 4 * kSkew<S> + odd) * kNTile +
                (sizeof(S) == 4 ? lane / 4 : 0));
  const PairWalk pairs(sizes);

  const int slices = want_weight ? sizes.slices : 1;
  const int tasks = static_cast<int>(sizes.slabs) * slices * sizes.channel_blocks;
  for (int task = static_cast<int>(block_index()); task < tasks;
       task += static_cast<int>(grid_blocks())) {
    const int first = task % slices * kNTile * CTiles;
    const int block_oc = task / slices % sizes.channel_blocks * sizes.m_warps * 16;
    const int slab = task / slices / sizes.channel_blocks;
    const auto first_oc = [&] {
      const int thread = fresh_thread_index(), m_warp = thread / kWarp & (sizes.m_warps - 1);
      return block_oc + m_warp * 16 + thread % kWarp / 4;
    };

    float acc[CTiles][9][4], bias[2] = {0, 0};
    FUSEDCNN_UNROLL
    for (int i = 0; i < CTiles * kTileSums; ++i) acc[i / kTileSums][i / 4 % 9][i % 4] = 0;

    const int64_t begin = slab * sizes.units / sizes.slabs;
    int left = static_cast<int>((slab + 1) * sizes.units / sizes.slabs - begin);
    const int tiles = sizes.tiles_h * sizes.tiles_w;
    int n = static_cast<int>(begin / tiles);
    int tile_y = static_cast<int>(begin % tiles) / sizes.tiles_w;
    int tile_x = static_cast<int>(begin % tiles) % sizes.tiles_w;
    for (; left > 0; --left) {
      const int first_h = tile_y * sizes.tile_h, first_w = tile_x * sizes.tile_w;
      // Of the tile's first quad, what this lane fetches.
      const Strides &at = args.code_strides, &from = args.grad_output_strides;
      const S* const values = static_cast<const S*>(args.grad_output) + n * from.n +
                              (first_h + window_h()) * from.h + (first_w + window_w()) * from.w +
                              first_oc() * from.c;
      const uint8_t* const codes = static_cast<const uint8_t*>(args.code) + n * at.n +
                                   (first_h + window_h()) * at.h + (first_w + window_w()) * at.w +
                                   first_oc() * at.c;
      const auto fetch = [&](int quad) {
        return fetch_gradients<S>(
            args, sizes, values + quad * sizes.value_step, codes + quad * sizes.code_step,
            first_h + quad * sizes.quad_h + window_h(), first_w + window_w(), first_oc());
      };
      // Under way while the pixels are.
      Gradients<S> next{};
      const int share = fresh_thread_index() / kWarp >> sizes.m_warp_bits;
      if (share < sizes.quads) next = fetch(share);
      if (want_weight) {
        stage_pixels<S, CTiles, Loaded>(args, sizes, pairs, n, first, 2 * first_h - sizes.padding_h,
                                        2 * first_w - sizes.padding_w, pixels);
        sync_threads();
      }
      FUSEDCNN_NO_UNROLL
      for (int quad = share; quad < sizes.quads; quad += sizes.shares) {
        const Gradients<S> gradients = next;
        if (quad + sizes.shares < sizes.quads) next = fetch(quad + sizes.shares);
        FUSEDCNN_UNROLL
        for (int row = 0; row < 2; ++row) {
          float sum = 0;
          FUSEDCNN_UNROLL
          for (int i = 0; i < 4; ++i) {
            // Where ReLU is off nothing flows, whatever stands there.
            const bool live = (gradients.codes[row] >> 8 * i & 0xff) < 4;
            if (live) sum += widen(gradient_of(gradients, row, i));
          }
          bias[row] += sum;
        }
        if (!want_weight) continue;
        // Pixels of this lane's windows, upper and lower, that are the convolution's. Zero times
        // what others find in the image would be NaN where that is infinite.
        uint32_t valid = 0xffff;
        if (2 * (first_w + sizes.tile_w) > sizes.cover_w ||
            2 * (first_h + sizes.tile_h) > sizes.cover_h) {
          const int cols = sizes.cover_w - 2 * (first_w + window_w());
          const int rows = sizes.cover_h - 2 * (first_h + quad * sizes.quad_h + window_h());
          const uint32_t upper = cols >= 8 ? 0xffu : cols > 0 ? (1u << cols) - 1 : 0u;
          valid = (rows > 0 ? upper : 0u) | (rows > 1 ? upper << 8 : 0u);
        }
        const Shared<Pixel<S>> at = lane_pixels + quad * sizes.quad_h * 2 * sizes.pitch * kNTile;
        if (ballot(valid == 0xffffu) == ~0u) {
          multiply_quad<false, S, CTiles>(gradients, at, sizes.plane, sizes.pitch, odd, valid, acc);
        } else {
          multiply_quad<true, S, CTiles>(gradients, at, sizes.plane, sizes.pitch, odd, valid, acc);
        }
      }
      if (want_weight) sync_threads();  // the next tile overwrites this one
      if (++tile_x == sizes.tiles_w) tile_x = 0, ++tile_y;
      if (tile_y == sizes.tiles_h) tile_y = 0, ++n;
    }

    // The slab's sums are those of the warps, in the order of their shares.
    const int thread = fresh_thread_index();
    const int64_t row_sums = sizes.sums.row;  // 64 rows may be 2^31 or more
    float* const to =
        partial + (static_cast<int64_t>(slab) * sizes.out_channels + block_oc) * row_sums;
    FUSEDCNN_UNROLL
    for (int row = 0; row < 2; ++row) {
      bias[row] += shuffle_xor(bias[row], 1);
      bias[row] += shuffle_xor(bias[row], 2);
      if (thread % 4 == 0) biases[thread / kWarp * 16 + 8 * row + thread % kWarp / 4] = bias[row];
    }
    FUSEDCNN_UNROLL
    for (int tile = 0; tile < CTiles; ++tile) {
      if (want_weight) {
        FUSEDCNN_UNROLL
        for (int i = 0; i < kTileSums; ++i) {
          sums[i * kSumPitch + thread] = acc[tile][i / 4][i % 4];
        }
      }
      sync_threads();
      const int channels = sizes.m_warps * 16;
      FUSEDCNN_NO_UNROLL
      for (int e = thread; want_weight && e < channels * 9 * kNTile; e += kMmaThreads) {
        const int oc = e / (9 * kNTile), k = e % (9 * kNTile);
        const int c = k / 9, tap = k % 9;
        if (block_oc + oc >= sizes.out_channels || first + tile * kNTile + c >= sizes.channels) {
          continue;
        }
        // Where the fragment has row oc and column c.
        const int slot =
            (tap * 4 + oc % 16 / 8 * 2 + c % 2) * kSumPitch + oc / 16 * kWarp + oc % 8 * 4 + c / 2;
        float sum = 0;
        for (int i = 0; i < sizes.shares; ++i) sum += sums[slot + i * sizes.m_warps * kWarp];
        to[oc * row_sums + (first + tile * kNTile) * 9 + k] = sum;
      }
      if (tile == 0 && first == 0 && thread < channels && block_oc + thread < sizes.out_channels) {
        float sum = 0;
        for (int i = 0; i < sizes.shares; ++i) sum += biases[i * channels + thread];
        to[(thread + 1) * row_sums - 1] = sum;
      }
      sync_threads();  // the next sums overwrite these
    }
  }
}

// ---- host ---------------------------------------------------------------------------------------

template <typename S, int CTiles>
WeightMmaSizes weight_mma_sizes(const Geometry& g) {
  const int out_h = static_cast<int>(g.h.out), out_w = static_cast<int>(g.w.out);
  // A row of a quad, half or a quarter of one, whichever leaves less of it empty.
  const bool wide = parts(out_w, 16) * 16 <= parts(out_w, 8) * 8;
  const int tile_w = out_w <= 4 ? 4 : wide ? 16 : 8, quad_h = kQuad / tile_w;
  // Quads for every warp, in as much shared memory as lets kMmaResident blocks in.
  constexpr int kMostRows = CTiles == 1 && sizeof(S) == 2 ? 16 : 8;
  const int tile_h = parts(parts(out_h, parts(out_h, kMostRows)), quad_h) * quad_h;
  const int m_warps = g.out_channels <= 16 ? 1 : g.out_channels <= 32 ? 2 : 4;
  WeightMmaSizes s{};
  static_cast<WeightTileSizes&>(s) = weight_tile_sizes(g, tile_h, tile_w, 16 * m_warps);
  const auto covered = [](const Axis& axis) {
    return static_cast<int>(axis.conv < 2 * axis.out ? axis.conv : 2 * axis.out);
  };
  s.tile_w_bits = tile_w == 4 ? 2 : tile_w == 8 ? 3 : 4;
  s.cover_h = covered(g.h), s.cover_w = covered(g.w);
  s.quad_h = quad_h;
  s.quads = s.tile_h / s.quad_h;
  s.rows = 2 * s.tile_h + 2;
  s.pairs = s.tile_w + 2;
  s.step_line = kMmaThreads / s.pairs, s.step_pair = kMmaThreads % s.pairs;
  const int last = 2 * s.tile_w + 1;  // column
  s.pitch = last + last / 8 * kSkew<S> + 1;
  // Lanes that look at different rows of windows find different banks.
  if (s.tile_w == 4) s.pitch |= 1;
  if (s.tile_w == 8 && sizeof(S) == 4) s.pitch |= 1;
  if (s.tile_w == 8 && sizeof(S) == 2) s.pitch += (2 - s.pitch % 4 + 4) % 4;
  s.plane = s.rows * s.pitch * kNTile;
  s.slices = parts(s.channels, kNTile * CTiles);
  s.m_warps = m_warps, s.m_warp_bits = m_warps / 2;  // of 1, 2 and 4
  s.shares = kMmaWarps / s.m_warps;
  // As many blocks as 132 multiprocessors hold.
  const int64_t wanted =
      132 * kMmaResident<CTiles> / (static_cast<int64_t>(s.slices) * s.channel_blocks);
  const int64_t products = s.units * parts(s.quads, s.shares) * kQuadSteps<S>;
  const int64_t chains = (products + kMmaChain - 1) / kMmaChain;
  set_slabs(&s, wanted < chains ? chains : wanted);
  return s;
}

// Bytes of shared memory of a block: 62 KiB at most, where sm_80 and later have 99 or more.
template <typename S, int CTiles>
int64_t weight_mma_shared(const WeightMmaSizes& sizes, bool want_weight) {
  return shared_bytes<float>(kMmaWarps * 16) +
         shared_bytes<float>(want_weight ? kTileSums * kSumPitch : 0) +
         shared_bytes<Pixel<S>>(want_weight ? CTiles * sizes.plane : 0);
}

template <typename S, int CTiles>
void launch_grad_weight_tensor_cores_3x3(const BackwardArgs& args, const Execution& execution) {
  constexpr int64_t kBytes = sizeof(S);
  WeightMmaSizes sizes = weight_mma_sizes<S, CTiles>(args.geometry);
  const Geometry& g = args.geometry;
  const Strides &in = args.input_strides, &out = args.grad_output_strides,
                &code = args.code_strides;
  sizes.input_pairs = in.w == 1 && g.w.padding == 1 && g.w.in % 2 == 0 &&
                      aligned(args.input, kBytes, 2 * kBytes, {in.n, in.c, in.h});
  sizes.input_channels = in.c == 1 && g.in_channels % kNTile == 0 &&
                         aligned(args.input, kBytes, 16, {in.n, in.h, in.w});
  sizes.value_step = sizes.quad_h * out.h, sizes.code_step = sizes.quad_h * code.h;
  sizes.window_fours = out.w == 1 && code.w == 1 && g.w.out % 4 == 0 &&
                       aligned(args.grad_output, kBytes, 4 * kBytes, {out.n, out.c, out.h}) &&
                       aligned(args.code, 1, 4, {code.n, code.c, code.h});
  float* const partial = static_cast<float*>(execution.workspace);
  const bool want_weight = args.grad_weight != nullptr;
  const int64_t tasks = sizes.slabs * (want_weight ? sizes.slices : 1) * sizes.channel_blocks;
  auto* kernel = grad_weight_tensor_cores_3x3_kernel<S, CTiles, kNTile>;
  // In float32, CUDA cores are as quick: see slower.cu.
  if constexpr (sizeof(S) == 2 && CTiles == 1) {
    if (g.in_channels <= 4) kernel = grad_weight_tensor_cores_3x3_kernel<S, CTiles, 4>;
  }
  launch("grad_weight_tensor_cores_3x3", kernel, blocks_for(tasks), kMmaThreads,
         weight_mma_shared<S, CTiles>(sizes, want_weight), execution, args, sizes, partial);
  launch_grad_weight_finish<S>(args, sizes.sums, partial, execution);
}

// Calls body(S{}, integral constant of the tiles of channels) for the problem.
template <typename Body>
int64_t for_weight_mma(const Problem& problem, const Body& body) {
  int64_t result = 0;
  for_block_storage(problem.type, [&](auto storage) {
    if (problem.geometry.in_channels <= kNTile) {
      result = body(storage, std::integral_constant<int, 1>{});
    } else {
      result = body(storage, std::integral_constant<int, 2>{});
    }
  });
  return result;
}

}  // namespace

int64_t grad_weight_tensor_cores_3x3_workspace(const Problem& problem) {
  return for_weight_mma(problem, [&](auto storage, auto tiles) {
    const auto sizes = weight_mma_sizes<decltype(storage), tiles>(problem.geometry);
    return sizes.slabs * slab_bytes(sizes);
  });
}

void grad_weight_tensor_cores_3x3(const BackwardArgs& args, const Execution& execution) {
  for_weight_mma({args.geometry, args.type, args.wide_code}, [&](auto storage, auto tiles) {
    launch_grad_weight_tensor_cores_3x3<decltype(storage), tiles>(args, execution);
    return int64_t{0};
  });
}

}  // namespace fusedcnn::cuda
