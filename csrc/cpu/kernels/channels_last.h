// Images from channel-major to pixel-major memory: what the library kernel's caller needs where the
// stock convolution's layout is not its own.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/transpose.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Pixels that a task takes: few enough that their lines stay in L1 while channels pass by.
constexpr int64_t kPixels = 64;

template <typename E>
void to_channels_last(const TransposeArgs& args, const ThreadPool& pool) {
  const int64_t bands = (args.pixels + kPixels - 1) / kPixels;
  parallel_tasks(pool, args.images * bands, [&](int64_t task) {
    const int64_t n = task / bands, first = task % bands * kPixels;
    const int64_t count = smaller(kPixels, args.pixels - first);
    const E* from = static_cast<const E*>(args.from) + n * args.channels * args.pixels;
    E* to = static_cast<E*>(args.to) + n * args.channels * args.pixels;
    transpose_matrix(from + first, args.pixels, to + first * args.channels, args.channels,
                     args.channels, count);
  });
}

// Bits are moved, never computed with, so integers of the element's size stand for it.
void to_channels_last(const TransposeArgs& args, const ThreadPool& pool) {
  if (args.element_bytes == 2) {
    to_channels_last<int16_t>(args, pool);
  } else {
    to_channels_last<int32_t>(args, pool);
  }
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
