// What a block with batch normalisation needs of vectors of channels and of weights.
#pragma once

#include "cpu/batch_norm_passes.h"
#include "cpu/kernels/simd.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

void norm_load(DataType type, const void* from, int64_t stride, int64_t count, double* to) {
  for_storage(type, [&]<typename S>(S) {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(static_cast<const S*>(from)[i * stride]);
  });
}

void norm_store(DataType type, const double* from, int64_t count, void* to) {
  for_storage(type, [&]<typename S>(S) {
    for (int64_t i = 0; i < count; ++i) {
      static_cast<S*>(to)[i] = narrow<S>(static_cast<Accumulator<S>>(from[i]));
    }
  });
}

void norm_add(DataType type, const void* values, int64_t count, void* sums) {
  for_storage(type, [&]<typename S>(S) {
    const S* from = static_cast<const S*>(values);
    auto* to = static_cast<Accumulator<S>*>(sums);
    for (int64_t i = 0; i < count; ++i) to[i] += widen(from[i]);
  });
}

void norm_weight(const NormShape& shape, const NormWeightArgs& args) {
  const Geometry& g = shape.geometry;
  const int64_t channels = g.in_channels_per_group(), size = channels * g.taps();
  for_storage(shape.type, [&]<typename S>(S) {
    using T = Accumulator<S>;
    for (int64_t oc = args.out_channel_begin; oc < args.out_channel_end; ++oc) {
      T* from = static_cast<T*>(args.sums) + oc * size;
      for (int64_t i = 1; i < args.count; ++i) {
        const T* const other = from + i * g.out_channels * size;
        for (int64_t k = 0; k < size; ++k) from[k] += other[k];
      }
      S* const to = static_cast<S*>(args.grad_weight) + oc * args.strides.n;
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t h = 0; h < g.h.kernel; ++h) {
          for (int64_t w = 0; w < g.w.kernel; ++w, ++from) {
            to[c * args.strides.c + h * args.strides.h + w * args.strides.w] = narrow<S>(*from);
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
