// What forward kernels with a lane for each output channel share: the weights on their way in,
// pooled pixels on their way out.
#pragma once

#include "cpu/derived_weights.h"
#include "cpu/kernel.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/transpose.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Stores a code for every lane, each a byte.
template <typename Code>
FUSEDCNN_INLINE void store_codes(Code code, uint8_t* to) {
#if defined(__AVX512F__)
  constexpr bool kPacks = false;  // in one instruction
#elif defined(__x86_64__)
  constexpr bool kPacks = sizeof(code[0]) == 4;
#else
  constexpr bool kPacks = false;
#endif
  if constexpr (kPacks) {  // GCC would take the lanes one by one
#if defined(__x86_64__)
    constexpr int kCount = sizeof(Code) / 4;
    __m128i halves[2];
    memcpy(halves, &code, sizeof code);
    if (kCount == 4) halves[1] = halves[0];
    const __m128i words = _mm_packs_epi32(halves[0], halves[1]);
    const __m128i bytes = _mm_packus_epi16(words, words);
    memcpy(to, &bytes, kCount);
#endif
  } else {
    typedef uint8_t Bytes __attribute__((vector_size(sizeof(Code) / sizeof(code[0]))));
    const Bytes bytes = __builtin_convertvector(code, Bytes);
    memcpy(to, &bytes, sizeof bytes);
  }
}

// The pool of one window, and then perhaps ReLU, for every lane.
template <typename T>
struct FirstMaximum {
  Vector<T> best = broadcast(-static_cast<T>(__builtin_inff()));
  Vector<Int<T>> winner = {};  // where all is minus infinity

  // The first maximum wins; NaN beats everything, a later NaN too, as in torch.
  FUSEDCNN_INLINE void see(Vector<T> value, int64_t element) {
    const auto wins = (value > best) | (value != value);
    best = wins ? value : best;
    winner = wins ? broadcast(static_cast<Int<T>>(element)) : winner;
  }

  // values, codes: [lanes].
  template <bool kReLU = true>
  FUSEDCNN_INLINE void finish(T* values, uint8_t* codes) const {
    Vector<T> value = best;
    Vector<Int<T>> code = winner;
    if constexpr (kReLU) {
      const auto off = best <= Vector<T>{};  // false for NaN, which ReLU lets through
      value = off ? Vector<T>{} : best;
      code = off ? broadcast(static_cast<Int<T>>(kOff<uint8_t>)) : winner;
    }
    store(values, value);
    store_codes(code, codes);
  }
};

// Whether the convolution's outputs are wanted as they are. All codes are 0 then.
inline bool is_plane(const Geometry& g, bool relu) {
  const auto single = [](const Axis& axis) {
    return axis.pool_kernel == 1 && axis.pool_stride == 1 && axis.pool_padding == 0;
  };
  return !relu && single(g.h) && single(g.w);
}

// The codes of `rows` rows of such outputs, from `first` on, in bytes.
inline void clear_codes(const ForwardArgs& args, int64_t n, int64_t first, int64_t rows) {
  if (!args.code) return;
  const Geometry& g = args.geometry;
  const Strides s = args.output_strides;
  uint8_t* code = static_cast<uint8_t*>(args.code) + n * s.n + first * s.h;
  if (s.c == 1) {
    memset(code, 0, rows * g.w.out * g.out_channels);
    return;
  }
  for (int64_t oc = 0; oc < g.out_channels; ++oc) memset(code + oc * s.c, 0, rows * g.w.out);
}

// Pooled rows of a task, given how many fit the caches: for batches too small to occupy several
// threads, fewer, so that one large image makes several tasks. Neighbouring bands read some rows
// twice, which bands of `least` rows can afford. Depends on sizes alone, never on threads.
inline int64_t band_rows(const Geometry& g, int64_t fitting, int64_t least) {
  constexpr int64_t kBands = 4;
  constexpr double kLargeImage = 4e6;  // multiply-adds; a fraction of a millisecond
  const double multiply_adds =
      double(g.out_channels) * g.h.conv * g.w.conv * g.in_channels_per_group() * g.taps();
  int64_t rows = larger(fitting, least);
  if (g.batch < kSmallBatch && !g.undivided && multiply_adds >= kLargeImage) {
    rows = smaller(rows, larger(least, (g.h.out + kBands - 1) / kBands));
  }
  const int64_t bands = (g.h.out + rows - 1) / rows;
  return (g.h.out + bands - 1) / bands;  // of equal height, rather than a thin last one
}

// The key of derived weights, and the size of the weight's memory: 0 where it has gaps, which
// would have to be compared too.
inline DerivedKey derived_key(const ForwardArgs& args, const void* kernel, int64_t& bytes) {
  const Geometry& g = args.geometry;
  const Strides s = args.weight_strides;
  const int64_t span = 1 + (g.out_channels - 1) * s.n + (g.in_channels_per_group() - 1) * s.c +
                       (g.h.kernel - 1) * s.h + (g.w.kernel - 1) * s.w;
  const int64_t count = g.out_channels * g.in_channels_per_group() * g.taps();
  bytes = span == count ? count * element_size(args.type) : 0;
  return {kernel, args.weight, s, args.type, g.out_channels, g.in_channels, g.h.kernel, g.w.kernel};
}

// The weights of one vector of output channels as [C][taps][lanes], zeros past the last channel.
template <typename S, typename T>
void weights_by_tap(const ForwardArgs& args, const S* weight, int64_t first, T* to) {
  constexpr int kN = kLanes<T>;
  const Geometry& g = args.geometry;
  const Strides s = args.weight_strides;
  const int64_t count = smaller<int64_t>(kN, g.out_channels - first);
  weight += first * s.n;
  if (count < kN) memset(to, 0, g.in_channels * g.taps() * kN * sizeof(T));
  if (s.w == 1 && s.h == g.w.kernel && s.c == g.taps()) {
    return transpose_matrix(weight, s.n, to, kN, count, g.in_channels * g.taps());
  }
  for (int64_t c = 0; c < g.in_channels; ++c) {
    for (int64_t t = 0; t < g.taps(); ++t, to += kN) {
      const S* from = weight + c * s.c + t / g.w.kernel * s.h + t % g.w.kernel * s.w;
      for (int64_t oc = 0; oc < count; ++oc) to[oc] = widen(from[oc * s.n]);
    }
  }
}

// Writes [count][padded channels] into `count` pooled pixels, numbered row by row, from `to` on.
template <typename From, typename To>
void write_strip(const From* from, int64_t padded, int64_t count, int64_t channels, To* to,
                 Strides strides) {
  if (strides.w == 1) {
    transpose_matrix(from, padded, to, strides.c, count, channels);
  } else {  // channels_last: a row's pixels follow the last row's
    for (int64_t p = 0; p < count; ++p) {
      convert_run(from + p * padded, to + p * strides.w, channels);
    }
  }
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
