// Fetching the next image while this one is computed.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/simd.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// One image of a tensor larger than the caches is 10 to 100 KB: too short for the hardware's
// prefetchers, which restart at every 4 KB page, and read in bursts between long computations. So
// each image's computation asks for the next image, a few cache lines at a time, lest the requests
// crowd out its own loads.
struct Ahead {
  // Of larger images, the part that fits L2 beside this image's own data.
  static constexpr int64_t kMostLines = 1024;

  const char* at = nullptr;
  int64_t lines = 0;  // left
  int64_t per_step = 0;

  // [batch, channels, h, w] with strides; image n is being computed, in about `steps` steps.
  template <typename S>
  static Ahead of(const S* data, Strides s, int64_t channels, int64_t h, int64_t w, int64_t n,
                  int64_t batch, int64_t steps) {
    Ahead ahead;
    const int64_t size = channels * h * w;
    const bool dense = s.n == size && (s.c == 1 || s.w == 1);
    if (!dense || n + 1 >= batch) return ahead;
    ahead.at = reinterpret_cast<const char*>(data + (n + 1) * s.n);
    ahead.lines = smaller<int64_t>((size * int64_t{sizeof(S)} + 63) / 64, kMostLines);
    ahead.per_step = (ahead.lines + steps - 1) / steps;
    return ahead;
  }

  FUSEDCNN_INLINE void step() {
    const int64_t count = smaller(per_step, lines);
    for (int64_t i = 0; i < count; ++i, at += 64) __builtin_prefetch(at, 0, 2);
    lines -= count;
  }
};

// The same for what a backward kernel reads of every image; `input`: whether it reads the input.
struct BackwardAhead {
  Ahead grads, codes, image;

  template <typename S, typename C>
  static BackwardAhead of(const BackwardArgs& args, int64_t n, bool input, int64_t steps) {
    const Geometry& g = args.geometry;
    BackwardAhead ahead;
    ahead.grads = Ahead::of(static_cast<const S*>(args.grad_output), args.grad_output_strides,
                            g.out_channels, g.h.out, g.w.out, n, g.batch, steps);
    ahead.codes = Ahead::of(static_cast<const C*>(args.code), args.code_strides, g.out_channels,
                            g.h.out, g.w.out, n, g.batch, steps);
    if (input) {
      ahead.image = Ahead::of(static_cast<const S*>(args.input), args.input_strides, g.in_channels,
                              g.h.in, g.w.in, n, g.batch, steps);
    }
    return ahead;
  }

  FUSEDCNN_INLINE void step() {
    grads.step();
    codes.step();
    image.step();
  }
};

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
