// grad_weight and grad_bias of a 3x3 convolution of stride 1 under a 2x2 pool, for many input
// channels: a vector holds a block of them at one pixel.
//
// The nine taps of one output channel and one block of input channels stay in registers while the
// output channel's live windows pass by: each adds its gradient times the 3x3 pixels under the
// element that it chose. A band of rows is laid out block by block, so that the pixels of a block
// stay in L1 from one output channel to the next, and the lists of live windows are made once for
// all blocks.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/ahead.h"
#include "cpu/kernels/block_3x3.h"
#include "cpu/kernels/partials.h"
#include "cpu/kernels/patches.h"
#include "cpu/kernels/simd.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Input channels of a block.
constexpr int kInputLanes = kLanes<float>;
// One block's pixels of a band: most of a small L1, beside which lists and sums stream.
constexpr int64_t kBandBytes = int64_t{24} << 10;
// Images whose windows share a list, where several fit.
constexpr int64_t kMostTogether = 8;

// Output channels of a task, where there are too few images for all threads: each task lays out the
// input anew.
constexpr int64_t kSharedOutputs = 16;

// One call owns 9 taps x one block of input channels of one output channel:
//   sums[dy * 3 + dx][lane] += sum over i of gradient[i] * pixel[dy][dx][lane] from place[i] on
// pixels: one block's, [rows][pitch / kInputLanes][kInputLanes].
// A live window is 9 FMAs with a load each, and two more loads: 5.5 cycles on two load ports. Xeons
// sustain only three such FMAs in two cycles (with operands in registers, four), which makes 6.
FUSEDCNN_NOINLINE void add_live(const float* pixels, int64_t pitch, const uint32_t* place,
                                const float* gradient, int64_t entries, float* sums) {
  Vector<float> sum[9];
  FUSEDCNN_UNROLL
  for (int t = 0; t < 9; ++t) sum[t] = Vector<float>{};
  for (int64_t i = 0; i < entries; ++i) {
    const float* row = pixels + place[i];
    const Vector<float> g = broadcast(gradient[i]);
    FUSEDCNN_UNROLL
    for (int t = 0; t < 9; ++t) {
      if (t % 3 == 0) keep_address(row);
      sum[t] += g * load(row + t % 3 * kInputLanes);
      if (t % 3 == 2) row += pitch;
    }
  }
  FUSEDCNN_UNROLL
  for (int t = 0; t < 9; ++t) {
    float* to = sums + t * kInputLanes;
    store(to, load(to) + sum[t]);
  }
}

// Some pooled rows of one image, each output channel's windows side by side.
template <typename T>
struct WindowRows {
  const T* data;
  int64_t stride;  // from one output channel to the next

  const T* of(int64_t oc) const { return data + oc * stride; }
};

// `rows` pooled rows of `channels` output channels: where they are, or converted into `buffer`.
template <typename From, typename To>
WindowRows<To> windows_together(const Geometry& g, const From* from, Strides strides, int64_t rows,
                                int64_t channels, To* buffer) {
  const bool rows_follow = rows == 1 || strides.h == strides.w * g.w.out;
  if constexpr (std::is_same_v<From, To>) {
    if (strides.w == 1 && rows_follow) return {from, strides.c};
  }
  const int64_t windows = rows * g.w.out;
  if (strides.c == 1 && rows_follow) {
    transpose_matrix(from, strides.w, buffer, windows, windows, channels);
    return {buffer, windows};
  }
  To* to = buffer;
  for (int64_t oc = 0; oc < channels; ++oc) {
    for (int64_t h = 0; h < rows; ++h, to += g.w.out) {
      const From* row = from + oc * strides.c + h * strides.h;
      if (strides.w == 1) {
        convert_run(row, to, g.w.out);
      } else {
        for (int64_t w = 0; w < g.w.out; ++w) to[w] = convert<To>(row[w * strides.w]);
      }
    }
  }
  return {buffer, windows};
}

#if !defined(__AVX512F__)
// [mask of live lanes]: those lanes, moved together.
struct LiveLanes {
  uint8_t lanes[256][8] = {};
  constexpr LiveLanes() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int lane = 0, count = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) lanes[mask][count++] = static_cast<uint8_t>(lane);
      }
    }
  }
};
constexpr LiveLanes kLiveLanes;
#endif

// Lists the live ones of `windows` windows of one output channel and returns how many there are;
// writes up to a vector more. base: [windows], the places of the windows' patches; from_code: what
// the element adds to it, once in each 4 lanes. total: receives the sum of the gradients as well.
FUSEDCNN_NOINLINE int64_t list_live(const uint8_t* codes, const float* grads, int64_t windows,
                                    const uint32_t* base, Vector<int32_t> from_code,
                                    uint32_t* place, float* gradient, float* total) {
  Vector<float> sum = load(total);
  int64_t count = 0, q = 0;
  for (; q + kInputLanes <= windows; q += kInputLanes) {
#if defined(__AVX512F__)
    const __m512i code =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + q)));
    const __mmask16 live = _mm512_cmpneq_epi32_mask(code, _mm512_set1_epi32(kOff<uint8_t>));
    const __m512i added =
        _mm512_castps_si512(_mm512_permutevar_ps(_mm512_castsi512_ps((__m512i)from_code), code));
    const __m512i at = _mm512_add_epi32(_mm512_loadu_si512(base + q), added);
    const __m512 g = _mm512_maskz_loadu_ps(live, grads + q);
    _mm512_storeu_si512(place + count, _mm512_maskz_compress_epi32(live, at));
    _mm512_storeu_ps(gradient + count, _mm512_maskz_compress_ps(live, g));
    sum += (Vector<float>)g;
    count += __builtin_popcount(live);
#else
    const __m256i code =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + q)));
    const __m256i dead = _mm256_cmpeq_epi32(code, _mm256_set1_epi32(kOff<uint8_t>));
    const int live = ~_mm256_movemask_ps(_mm256_castsi256_ps(dead)) & 0xff;
    const __m256i added =
        _mm256_castps_si256(_mm256_permutevar_ps(_mm256_castsi256_ps((__m256i)from_code), code));
    const __m256i at = (__m256i)((Vector<int32_t>)added + (Vector<int32_t>)load(base + q));
    const __m256 g = _mm256_andnot_ps(_mm256_castsi256_ps(dead), load(grads + q));
    const __m256i lanes = _mm256_cvtepu8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLiveLanes.lanes[live])));
    store(place + count, (Vector<uint32_t>)_mm256_permutevar8x32_epi32(at, lanes));
    store(gradient + count, (Vector<float>)_mm256_permutevar8x32_ps(g, lanes));
    sum += (Vector<float>)g;
    count += __builtin_popcount(static_cast<unsigned>(live));
#endif
  }
  float rest = 0;
  for (; q < windows; ++q) {
    const uint8_t code = codes[q];
    if (code == kOff<uint8_t>) continue;
    place[count] = base[q] + static_cast<uint32_t>(from_code[code]);
    gradient[count++] = grads[q];
    rest += grads[q];
  }
  sum[0] += rest;
  store(total, sum);
  return count;
}

// Lays out a band of image n, [blocks][rows][cols][kInputLanes], from row `first` of the padded
// image on, zeros around it; blocks are `block_stride` apart.
template <typename S>
void read_blocks(const BackwardArgs& args, int64_t n, int64_t first, int64_t rows, int64_t cols,
                 float* pixels, int64_t block_stride) {
  const Geometry& g = args.geometry;
  const Strides strides = args.input_strides;
  const int64_t pitch = cols * kInputLanes;
  const int64_t left = smaller(g.w.padding, cols), width = smaller(g.w.in, cols - left);
  for (int64_t c = 0; c < g.in_channels; c += kInputLanes, pixels += block_stride) {
    float* to = pixels;
    const int64_t channels = smaller<int64_t>(kInputLanes, g.in_channels - c);
    const S* image = static_cast<const S*>(args.input) + n * strides.n + c * strides.c;
    for (int64_t y = first; y < first + rows; ++y, to += pitch) {
      const int64_t h = y - g.h.padding;
      const bool empty = h < 0 || h >= g.h.in || width < 1;
      if (empty || channels < kInputLanes) memset(to, 0, pitch * sizeof(float));
      if (empty) continue;
      const S* from = image + h * strides.h;
      float* inner = to + left * kInputLanes;
      // No call of a library: the padding is a pixel or two.
      for (int64_t x = 0; x < left; ++x) store(to + x * kInputLanes, Vector<float>{});
      if (strides.c == 1 && channels == kInputLanes) {
        for (int64_t x = 0; x < width; ++x) {
          store(inner + x * kInputLanes, widen_vector(from + x * strides.w));
        }
      } else {
        read_pixels(from, strides, inner, kInputLanes, width, channels);
      }
      for (int64_t x = width; x < cols - left; ++x) {
        store(inner + x * kInputLanes, Vector<float>{});
      }
    }
  }
}

template <typename S>
void grad_weight_winners_3x3_many_channels(const BackwardArgs& args, const ThreadPool& pool) {
  const Geometry& g = args.geometry;
  const int64_t blocks = args.grad_weight ? (g.in_channels + kInputLanes - 1) / kInputLanes : 0;
  // Sums of one output channel: [9][kInputLanes] for each block, and the bias's, spread over lanes.
  constexpr int64_t kTaps = 9 * kInputLanes;
  const int64_t bias_at = blocks * g.out_channels * kTaps;
  const int64_t size = bias_at + g.out_channels * kInputLanes;
  const Partials partials(g.batch, size * sizeof(float));

  const int64_t cols = 2 * g.w.out + 2, pitch = cols * kInputLanes;
  const int64_t fitting = (kBandBytes / (pitch * int64_t{sizeof(float)}) - 2) / 2;
  const int64_t bands = (g.h.out + larger<int64_t>(1, fitting) - 1) / larger<int64_t>(1, fitting);
  const int64_t band = (g.h.out + bands - 1) / bands;  // of equal height
  const int64_t windows = band * g.w.out, band_size = (2 * band + 2) * pitch;
  // Small images share lists, so that a call has more to do than to load and store sums.
  const int64_t together =
      bands > 1 ? 1
                : larger<int64_t>(1, smaller(smaller(partials.images, kMostTogether),
                                             kBandBytes / (band_size * int64_t{sizeof(float)})));

  // Output channels of a task: all, or those of a fixed share where there are few images.
  const int64_t share =
      g.batch < kSmallBatch ? smaller<int64_t>(kSharedOutputs, g.out_channels) : g.out_channels;
  const int64_t splits = (g.out_channels + share - 1) / share;

  float* sums =
      static_cast<float*>(scratch(Slot::kPartials, partials.count * size * sizeof(float)));
  parallel_tasks(pool, partials.count * splits, [&](int64_t task) {
    const int64_t partial = task / splits;
    const int64_t begin = task % splits * share, end = smaller(begin + share, g.out_channels);
    const int64_t channels = end - begin;
    float* own = sums + partial * size;
    for (int64_t b = 0; b < blocks; ++b) {
      memset(own + (b * g.out_channels + begin) * kTaps, 0, channels * kTaps * sizeof(float));
    }
    float* bias = own + bias_at + begin * kInputLanes;
    memset(bias, 0, channels * kInputLanes * sizeof(float));

    const int64_t block_size = together * band_size;
    float* pixels =
        static_cast<float*>(scratch(Slot::kPlanes, blocks * block_size * sizeof(float)));
    // The lists of all output channels follow each other: that of `r` begins at list[r].
    int64_t* list =
        static_cast<int64_t*>(scratch(Slot::kTransformed, (channels + 1) * sizeof(int64_t)));
    const int64_t room =
        together * channels * windows + kInputLanes;  // the last list's vectors run over
    float* gradient =
        static_cast<float*>(scratch(Slot::kLists, room * (sizeof(float) + sizeof(uint32_t))));
    uint32_t* place = reinterpret_cast<uint32_t*>(gradient + room);
    const int64_t dense_size = channels * windows;
    float* dense_grads = static_cast<float*>(
        scratch(Slot::kGradient, together * dense_size * (sizeof(float) + sizeof(uint8_t))));
    uint8_t* dense_codes = reinterpret_cast<uint8_t*>(dense_grads + together * dense_size);
    uint32_t* base = static_cast<uint32_t*>(scratch(Slot::kPatch, windows * sizeof(uint32_t)));
    for (int64_t q = 0; q < windows; ++q) {
      base[q] = static_cast<uint32_t>(q / g.w.out * 2 * pitch + q % g.w.out * 2 * kInputLanes);
    }
    Vector<int32_t> from_code;
    for (int l = 0; l < kInputLanes; ++l) {
      from_code[l] = static_cast<int32_t>(l / 2 % 2 * pitch + l % 2 * kInputLanes);
    }

    const int64_t last = partials.begin(partial + 1);
    for (int64_t n = partials.begin(partial); n < last; n += together) {
      const int64_t images = smaller(together, last - n);
      auto ahead =
          BackwardAhead::of<S, uint8_t>(args, n + images - 1, blocks > 0, bands * channels);
      for (int64_t first = 0; first < g.h.out; first += band) {
        const int64_t rows = smaller(band, g.h.out - first);
        WindowRows<float> grads[kMostTogether];
        WindowRows<uint8_t> codes[kMostTogether];
        for (int64_t i = 0; i < images; ++i) {
          const auto from = [&](const auto* data, Strides s) {
            return data + (n + i) * s.n + begin * s.c + first * s.h;
          };
          grads[i] = windows_together(
              g, from(static_cast<const S*>(args.grad_output), args.grad_output_strides),
              args.grad_output_strides, rows, channels, dense_grads + i * dense_size);
          codes[i] =
              windows_together(g, from(static_cast<const uint8_t*>(args.code), args.code_strides),
                               args.code_strides, rows, channels, dense_codes + i * dense_size);
          if (blocks) {
            read_blocks<S>(args, n + i, 2 * first, 2 * rows + 2, cols, pixels + i * band_size,
                           block_size);
          }
        }
        int64_t entries = 0;
        for (int64_t r = 0; r < channels; ++r) {
          list[r] = entries;
          for (int64_t i = 0; i < images; ++i) {
            entries += list_live(codes[i].of(r), grads[i].of(r), rows * g.w.out, base,
                                 from_code + static_cast<int32_t>(i * band_size), place + entries,
                                 gradient + entries, bias + r * kInputLanes);
          }
        }
        list[channels] = entries;
        for (int64_t b = 0; b < blocks; ++b) {
          for (int64_t r = 0; r < channels; ++r) {
            if (b == 0) ahead.step();
            add_live(pixels + b * block_size, pitch, place + list[r], gradient + list[r],
                     list[r + 1] - list[r], own + (b * g.out_channels + begin + r) * kTaps);
          }
        }
      }
    }
  });

  partials.add_up(pool, sums, size);
  parallel_tasks(pool, g.out_channels, [&](int64_t oc) {
    double bias = 0;  // the lanes may cancel
    for (int l = 0; l < kInputLanes; ++l) bias += sums[bias_at + oc * kInputLanes + l];
    if (args.grad_bias) {
      static_cast<S*>(args.grad_bias)[oc] = narrow<S>(static_cast<float>(bias));
    }
    const Strides to = args.grad_weight_strides;
    S* weight = static_cast<S*>(args.grad_weight) + oc * to.n;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t channels = smaller<int64_t>(kInputLanes, g.in_channels - b * kInputLanes);
      const float* from = sums + (b * g.out_channels + oc) * kTaps;
      S* block = weight + b * kInputLanes * to.c;
      if (taps_together(to)) {
        transpose_matrix(from, kInputLanes, block, to.c, 9, channels);
        continue;
      }
      for (int64_t c = 0; c < channels; ++c) {
        for (int t = 0; t < 9; ++t) {
          block[c * to.c + t / 3 * to.h + t % 3 * to.w] = narrow<S>(from[t * kInputLanes + c]);
        }
      }
    }
  });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
