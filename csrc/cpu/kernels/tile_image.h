// The image's copy that tiles are loaded from: [rows][cols][pixel], zeros around it.
#pragma once

#include "cpu/kernels/patches.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/tile_convolution.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Bytes of a band's copy of the image: a small part of L2, beside the weights.
constexpr int64_t kTileBandBytes = int64_t{256} << 10;

// Of images with longer rows not even a few fit.
inline const char* why_not_tile_rows(int64_t channels, const Axis& w, int64_t width) {
  constexpr double kRowBytes = 1 << 20;
  const double cols = double(width - 1) * w.stride + w.extent();
  return cols * tile_channels(channels) * 2 > kRowBytes ? "rows too long to be copied" : nullptr;
}

// The speeds behind these are those of a Xeon with AMX, beside its other kernels and the stock
// convolution. VDPBF16PS multiplies no faster there than float32 FMAs do.
inline const char* why_tiles_are_slower() {
#if defined(__AMX_BF16__)
  return nullptr;
#else
  return "without AMX not measured to be faster";
#endif
}

// `width` pixels of 2 to 4 planes side by side: two pixels are one 32-bit element of a vector, or
// half of two. to: [width][4], or [2] where there are two planes.
FUSEDCNN_INLINE void interleave_planes(const uint16_t* from, int64_t plane, int64_t planes,
                                       int64_t width, uint16_t* to) {
  const auto read = [&](int64_t c, int64_t x, __mmask16 some) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from + c * plane + x));
  };
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t x = 0; x < width; x += 16) {
    const int64_t count = smaller<int64_t>(16, width - x);
    const __mmask16 some = static_cast<__mmask16>((1u << count) - 1);
    const __m512i first =
        _mm512_or_si512(read(0, x, some), _mm512_slli_epi32(read(1, x, some), 16));
    if (planes == 2) {
      _mm512_mask_storeu_epi32(to + x * 2, some, first);
      continue;
    }
    __m512i second = read(2, x, some);
    if (planes == 4) second = _mm512_or_si512(second, _mm512_slli_epi32(read(3, x, some), 16));
    const __mmask8 left = static_cast<__mmask8>(some), right = static_cast<__mmask8>(some >> 8);
    _mm512_mask_storeu_epi64(to + x * 4, left, _mm512_permutex2var_epi32(first, low, second));
    _mm512_mask_storeu_epi64(to + x * 4 + 32, right,
                             _mm512_permutex2var_epi32(first, high, second));
  }
}

// `width` pixels of 2 to 4 channels to planes.
FUSEDCNN_INLINE void split_pixels(const uint16_t* from, int64_t width, int64_t channels,
                                  uint16_t* to, int64_t plane) {
  const __m512i count = _mm512_set1_epi16(static_cast<short>(channels));
  const __m512i first = _mm512_mullo_epi16(
      count,
      _mm512_cvtepu8_epi16(_mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0,
                                            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)));
  for (int64_t x = 0; x < width; x += 16, from += 16 * channels) {
    const int64_t pixels = smaller<int64_t>(16, width - x);
    const uint64_t some = ~uint64_t{0} >> (64 - pixels * channels);
    const __m512i low = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(some), from);
    const __m512i high = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(some >> 32), from + 32);
    for (int64_t c = 0; c < channels; ++c) {
      const __m512i place = _mm512_add_epi16(first, _mm512_set1_epi16(static_cast<short>(c)));
      _mm256_mask_storeu_epi16(to + c * plane + x, static_cast<__mmask16>((1u << pixels) - 1),
                               _mm512_castsi512_si256(_mm512_permutex2var_epi16(low, place, high)));
    }
  }
}

// `width` pixels of 3 channels to pixels of 4, the last one zero.
FUSEDCNN_INLINE void widen_pixels_of_3(const uint16_t* from, int64_t width, uint16_t* to) {
  const __m512i place = _mm512_set_epi16(0, 23, 22, 21, 0, 20, 19, 18, 0, 17, 16, 15, 0, 14, 13, 12,
                                         0, 11, 10, 9, 0, 8, 7, 6, 0, 5, 4, 3, 0, 2, 1, 0);
  for (int64_t x = 0; x < width; x += 8, from += 24, to += 32) {
    const int64_t count = smaller<int64_t>(8, width - x);
    const __mmask32 some = (__mmask32{1} << 3 * count) - 1;
    const __mmask8 pixels = static_cast<__mmask8>((1u << count) - 1);
    const __m512i read = _mm512_maskz_loadu_epi16(some, from);
    _mm512_mask_storeu_epi64(to, pixels, _mm512_maskz_permutexvar_epi16(0x77777777, place, read));
  }
}

// Rows [begin, begin + rows) of the padded image; row 0 is `padding` rows above the first real one.
// image: of one image, [C, h, w] by `strides`.
inline void copy_image(const TileConvolution& conv, const uint16_t* image, Strides strides,
                       const Axis& h, const Axis& w, int64_t begin, int64_t rows, uint16_t* to) {
  const int64_t pitch = conv.cols * conv.pixel, channels = conv.in_channels;
  const int64_t left = smaller(w.padding, conv.cols);
  const int64_t width = larger<int64_t>(0, smaller(w.in, conv.cols - left));
  for (int64_t y = begin; y < begin + rows; ++y, to += pitch) {
    const int64_t source = y - h.padding;
    const bool inside = source >= 0 && source < h.in && width > 0;
    uint16_t* pixels = to + left * conv.pixel;
    if (!inside || conv.pixel != channels) {
      memset(to, 0, pitch * sizeof(uint16_t));
      if (!inside) continue;
    } else {
      memset(to, 0, left * conv.pixel * sizeof(uint16_t));
      memset(pixels + width * conv.pixel, 0,
             (conv.cols - left - width) * conv.pixel * sizeof(uint16_t));
    }
    const uint16_t* from = image + source * strides.h;
    if (strides.w == 1 && channels > 1 && channels <= 4) {
      interleave_planes(from, strides.c, channels, width, pixels);
    } else if (strides.c == 1 && strides.w == 3 && channels == 3) {
      widen_pixels_of_3(from, width, pixels);
    } else {
      read_pixels(from, strides, pixels, conv.pixel, width, channels);
    }
  }
  memset(to, 0, (conv.size(rows) - rows * pitch) * sizeof(uint16_t));
}

// Whether all of `count` bfloat16 numbers are finite.
inline bool all_finite(const uint16_t* numbers, int64_t count) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 found = 0;
  const auto look = [&](__m512i bits) {
    found |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(bits, exponent), exponent);
  };
  const int64_t whole = count / 32 * 32;
  for (int64_t i = 0; i < whole; i += 32) look(_mm512_loadu_si512(numbers + i));
  look(_mm512_maskz_loadu_epi16((__mmask32{1} << (count - whole)) - 1, numbers + whole));
  return !found;
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
