// A convolution as products of tiles, without an im2col: the image's copy has the channels of a
// pixel side by side, padded to 1, 2, 4, 8, 16 or a multiple of 32 of them, and a row of A is the
// 64 bytes from some pixel on. With 16 channels those are two neighbouring taps of a row of taps,
// with 4 eight of them. The next row of the tile is the next convolution output's. Weights are zero
// where a tile's element is no tap or no channel.
//
// Such elements may be pixels of the image, and zero times infinity is NaN. So callers look for
// pixels that are not finite (all_finite in tile_image.h), and then ask for `masked` rows: the same
// products in the same order, from a copy of each row of A with zeros for what is no tap.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/tile_machine.h"
#include "cpu/kernels/transpose.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Elements of a pixel of the image's copy.
FUSEDCNN_INLINE int64_t tile_channels(int64_t channels) {
  if (channels > 16) return round_up(channels, kTileDepth);
  int64_t padded = 1;
  while (padded < channels) padded *= 2;
  return padded;
}

// A short row, for which calling memcpy would cost more.
FUSEDCNN_INLINE void copy_row(const uint16_t* from, uint16_t* to, int64_t width) {
  for (int64_t x = 0; x < width; x += 32) {
    const int64_t count = smaller<int64_t>(32, width - x);
    const __mmask32 some = static_cast<__mmask32>(~uint32_t{0} >> (32 - count));
    _mm512_mask_storeu_epi16(to + x, some, _mm512_maskz_loadu_epi16(some, from + x));
  }
}

// The weights as the convolution at hand sees them: grad_input's swaps the channels and runs
// backwards over the taps.
struct TileWeights {
  const void* data;  // of bfloat16
  Strides strides;   // of out channel, in channel, kh, kw
  bool backwards;

  // Those of `count` output channels from `first` on: [count][taps][in_channels].
  void gather(int64_t first, int64_t count, int64_t in_channels, int64_t kernel_h, int64_t kernel_w,
              uint16_t* to) const {
    const uint16_t* const from = static_cast<const uint16_t*>(data) + first * strides.n;
    const int64_t taps = kernel_h * kernel_w, size = taps * in_channels;
    const bool taps_follow = strides.w == 1 && strides.h == kernel_w;
    if (taps_follow && strides.n == taps) {
      return transpose_matrix(from, strides.c, to, in_channels, in_channels, count * taps);
    }
    for (int64_t oc = 0; taps_follow && oc < count; ++oc) {
      transpose_matrix(from + oc * strides.n, strides.c, to + oc * size, in_channels, in_channels,
                       taps);
    }
    for (int64_t tap = 0; !taps_follow && tap < taps; ++tap) {
      const uint16_t* source = from + tap / kernel_w * strides.h + tap % kernel_w * strides.w;
      uint16_t* target = to + tap * in_channels;
      if (strides.n == 1) {
        transpose_matrix(source, strides.c, target, size, in_channels, count);
        continue;
      }
      for (int64_t oc = 0; oc < count; ++oc) {
        for (int64_t c = 0; c < in_channels; ++c) {
          target[oc * size + c] = source[oc * strides.n + c * strides.c];
        }
      }
    }
  }
};

struct TileConvolution {
  int64_t in_channels, out_channels;
  int64_t kernel_h, kernel_w, dilation_h, dilation_w, stride_h, stride_w;
  int64_t width;   // convolution outputs of a row
  int64_t pixel;   // elements
  int64_t packed;  // neighbouring outputs that one row of A serves: 1 or 2
  int64_t cols;    // pixels of a row of the image's copy
  int64_t tiles;   // of weights for each chunk
  int64_t chunks;  // of products
  int64_t across;  // tiles of C to a row of outputs
  int64_t begun;   // pixels at which a chunk begins, of each row of taps
  int depth;       // elements of a chunk that some weight may meet, if fewer than 32
  // [chunks]: where a chunk's elements begin in the image's copy.
  int64_t* offsets = nullptr;
  // [blocks of two tiles][chunks][1 or 2][kTileB]
  uint16_t* weights = nullptr;
  // [tiles][16]
  float* bias = nullptr;

  TileConvolution(int64_t in_channels, int64_t out_channels, const Axis& h, const Axis& w,
                  int64_t width)
      : in_channels(in_channels),
        out_channels(out_channels),
        kernel_h(h.kernel),
        kernel_w(w.kernel),
        dilation_h(h.dilation),
        dilation_w(w.dilation),
        stride_h(h.stride),
        stride_w(w.stride),
        width(width),
        pixel(tile_channels(in_channels)) {
    // A tile load costs 8 cycles, and about 2 more for each row that crosses a cache line: with
    // small pixels all do, and one tile of weights is too little work for it. Where two outputs
    // share the row, there are two.
    const bool narrow = out_channels <= kTileLanes && pixel <= 8 && stride_w == 1;
    packed = narrow && width > kTileRows && (w.extent() + 1) * pixel <= kTileDepth ? 2 : 1;
    cols = (width - 1) * stride_w + w.extent();
    tiles = packed * ((out_channels + kTileLanes - 1) / kTileLanes);
    across = (width + kTileRows * packed - 1) / (kTileRows * packed);
    begun = 0;
    for (int64_t s = 0; s < w.extent(); s = next(s)) ++begun;
    chunks = kernel_h * begun * deep();
    const int64_t needed = begun > 1 ? kTileDepth : (w.extent() + packed - 1) * pixel;
    depth = static_cast<int>(smaller<int64_t>(kTileDepth, round_up(needed, 2)));
  }

  // Chunks side by side within a pixel, and pixels within a chunk.
  int64_t deep() const { return larger<int64_t>(1, pixel / kTileDepth); }
  int64_t pixels() const { return larger<int64_t>(1, kTileDepth / pixel); }
  // The first tap, in pixels, past a chunk that begins at pixel s.
  int64_t next(int64_t s) const { return round_up(s + pixels(), dilation_w); }
  // Whether some element of a tile is a channel of the image but no tap.
  bool mixed() const { return packed > 1 || begun * pixels() != kernel_w; }
  // Output channels of a block of tiles, and blocks.
  int64_t wide(int64_t block) const { return smaller<int64_t>(2, tiles - 2 * block); }
  int64_t blocks() const { return (tiles + 1) / 2; }
  int64_t lanes(int64_t block) const { return wide(block) / packed * kTileLanes; }
  // Elements of a copy of `rows` rows: tiles reach past its end.
  int64_t size(int64_t rows) const {
    return rows * cols * pixel + kTileRows * packed * stride_w * pixel + kTileDepth;
  }
  // Floats of a row of outputs of a block: whole tiles.
  int64_t row_size(int64_t block) const { return across * kTileRows * packed * lanes(block); }
  const uint16_t* block_weights(int64_t block) const {
    return weights + block * 2 * chunks * kTileB;
  }

  // Fills offsets, weights and bias, in this thread's scratch. from_bias: null for none.
  void prepare(const ThreadPool& pool, const TileWeights& from, const void* from_bias = nullptr,
               int64_t bias_stride = 0) {
    const int64_t bytes = tiles * chunks * kTileB * int64_t{sizeof(uint16_t)};
    const int64_t bias_bytes = tiles * kTileLanes * int64_t{sizeof(float)};
    char* memory = static_cast<char*>(
        scratch(Slot::kTransformed, bytes + bias_bytes + chunks * int64_t{sizeof(int64_t)}));
    weights = reinterpret_cast<uint16_t*>(memory);
    bias = reinterpret_cast<float*>(memory + bytes);
    offsets = reinterpret_cast<int64_t*>(memory + bytes + bias_bytes);
    for (int64_t i = 0; i < tiles * kTileLanes; ++i) {
      const int64_t oc = packed > 1 ? i % kTileLanes : i;
      const bool given = from_bias && oc < out_channels;
      bias[i] = given ? widen(static_cast<const BFloat16*>(from_bias)[oc * bias_stride]) : 0;
    }
    int64_t chunk = 0;
    for (int64_t kh = 0; kh < kernel_h; ++kh) {
      for (int64_t b = 0, s = 0; b < begun; ++b, s = next(s)) {
        for (int64_t d = 0; d < deep(); ++d, ++chunk) {
          offsets[chunk] = (kh * dilation_h * cols + s) * pixel + d * kTileDepth;
        }
      }
    }
    parallel_tasks(pool, tiles, [&](int64_t tile) { pack(from, tile); });
  }

  // One tile of lanes of every chunk: of each lane 32 elements as A's rows have them, which are 16
  // pairs, and then pairs and lanes change places.
  void pack(const TileWeights& from, int64_t tile) const {
    const int64_t block = tile / 2, step = wide(block) * kTileB;
    uint16_t* to = weights + block * 2 * chunks * kTileB + tile % 2 * kTileB;
    const int64_t first = packed > 1 ? 0 : tile * kTileLanes, shift = packed > 1 ? tile : 0;
    const int64_t count = smaller<int64_t>(kTileLanes, out_channels - first);
    const int64_t taps = kernel_h * kernel_w;
    uint16_t* gathered =
        static_cast<uint16_t*>(scratch(Slot::kPlanes, count * taps * in_channels * 2));
    from.gather(first, count, in_channels, kernel_h, kernel_w, gathered);
    alignas(64) uint16_t rows[kTileLanes * kTileDepth];
    for (int64_t kh = 0; kh < kernel_h; ++kh) {
      for (int64_t b = 0, s = 0; b < begun; ++b, s = next(s)) {
        for (int64_t d = 0; d < deep(); ++d, to += step) {
          memset(rows, 0, sizeof rows);
          const int64_t channels = smaller<int64_t>(in_channels - d * kTileDepth, kTileDepth);
          for (int64_t u = 0; u < pixels(); ++u) {
            const int64_t place = s + u - shift, kw = place / dilation_w;
            if (place < 0 || place % dilation_w || kw >= kernel_w) continue;
            const int64_t tap = kh * kernel_w + kw;
            const uint16_t* source =
                gathered + (from.backwards ? taps - 1 - tap : tap) * in_channels + d * kTileDepth;
            for (int64_t oc = 0; oc < count; ++oc, source += taps * in_channels) {
              copy_row(source, rows + oc * kTileDepth + u * pixel, channels);
            }
          }
          transpose_matrix(reinterpret_cast<const float*>(rows), kTileLanes,
                           reinterpret_cast<float*>(to), kTileLanes, kTileLanes, kTileLanes);
        }
      }
    }
  }

  // Which elements of a chunk that begins at pixel s are taps for outputs `shift` pixels on.
  uint32_t taps(int64_t s, int64_t shift) const {
    uint32_t mask = 0;
    for (int64_t e = 0; e < kTileDepth; ++e) {
      const int64_t place = s + (pixel < kTileDepth ? e / pixel : 0) - shift;
      const bool tap = place >= 0 && place % dilation_w == 0 && place / dilation_w < kernel_w;
      mask |= uint32_t{tap} << e;
    }
    return mask;
  }

  // One tile of C for one tile of weights. The copy: [chunks][16][32].
  void masked_tile(TileProduct product, const uint16_t* a, int64_t shift, float* c) const {
    uint16_t* const copy =
        static_cast<uint16_t*>(scratch(Slot::kPartials, chunks * kTileA * int64_t{2} + chunks * 8));
    int64_t* const at = reinterpret_cast<int64_t*>(copy + chunks * kTileA);
    int64_t chunk = 0;
    for (int64_t kh = 0; kh < kernel_h; ++kh) {
      for (int64_t b = 0, s = 0; b < begun; ++b, s = next(s)) {
        const __mmask32 mask = taps(s, shift);
        for (int64_t d = 0; d < deep(); ++d, ++chunk) {
          at[chunk] = chunk * kTileA;
          for (int64_t i = 0; i < kTileRows; ++i) {
            const uint16_t* row = a + product.offsets[chunk] + i * product.a_pitch;
            _mm512_storeu_si512(copy + at[chunk] + i * kTileDepth,
                                _mm512_maskz_loadu_epi16(mask, row));
          }
        }
      }
    }
    product.offsets = at;
    product.a_pitch = kTileDepth;
    const uint16_t* const from = copy;
    TileMachine::multiply<1, 1>(product, &from, &c);
  }

  // Convolution rows [begin, end) of one block of tiles. image: the copy, from the padded row of
  // tap 0 of convolution row `first` on. Row y goes to ring + y % ring_rows * row_size(block), as
  // [outputs][lanes].
  void rows(const uint16_t* image, int64_t first, int64_t begin, int64_t end, int64_t block,
            bool masked, float* ring, int64_t ring_rows) const {
    const int64_t n = wide(block), size = row_size(block);
    const TileProduct product{depth,
                              packed * stride_w * pixel,
                              offsets,
                              chunks,
                              block_weights(block),
                              n * kTileB,
                              n * kTileLanes,
                              kTileLanes,
                              bias + block * 2 * kTileLanes};
    const int64_t total = (end - begin) * across;
    int64_t y = begin, x = 0;
    for (int64_t i = 0; i < total; i += 2) {
      const uint16_t* a[2];
      float* c[2];
      const int64_t m = smaller<int64_t>(2, total - i);
      for (int64_t j = 0; j < m; ++j) {
        a[j] = image + ((y - first) * stride_h * cols + x * kTileRows * packed * stride_w) * pixel;
        c[j] = ring + y % ring_rows * size + x * kTileRows * n * kTileLanes;
        if (++x == across) x = 0, ++y;
      }
      if (!masked) {
        multiply_tiles(m, n, product, a, c);
        continue;
      }
      for (int64_t t = 0; t < m * n; ++t) {
        TileProduct one = product;
        one.b += t % n * kTileB;
        one.start += t % n * kTileLanes;
        masked_tile(one, a[t / n], packed > 1 ? t % n : 0, c[t / n] + t % n * kTileLanes);
      }
    }
  }
};

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
