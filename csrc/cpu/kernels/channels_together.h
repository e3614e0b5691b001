// One image of pooled outputs, codes or gradients, with the channels of a pixel side by side.
#pragma once

#include <type_traits>

#include "core/geometry.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/transpose.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// [pooled pixels][out channels], `stride` elements apart: where it is, or converted into `buffer`.
template <typename From, typename To>
const To* channels_together(const Geometry& g, const From* from, Strides strides, To* buffer,
                            int64_t& stride) {
  const bool rows_follow = strides.h == strides.w * g.w.out;
  if constexpr (std::is_same_v<From, To>) {
    if (strides.c == 1 && rows_follow) {
      stride = strides.w;
      return from;
    }
  }
  stride = g.out_channels;
  if (strides.w == 1 && rows_follow) {
    transpose_matrix(from, strides.c, buffer, stride, g.out_channels, g.outputs());
    return buffer;
  }
  To* to = buffer;
  for (int64_t h = 0; h < g.h.out; ++h) {
    for (int64_t w = 0; w < g.w.out; ++w, to += stride) {
      const From* pixel = from + h * strides.h + w * strides.w;
      if (strides.c == 1) {
        convert_run(pixel, to, g.out_channels);
      } else {
        for (int64_t c = 0; c < g.out_channels; ++c) to[c] = convert<To>(pixel[c * strides.c]);
      }
    }
  }
  return buffer;
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
