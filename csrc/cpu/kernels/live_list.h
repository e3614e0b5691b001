// The list of pooled outputs of one output channel through which a gradient flows.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/simd.h"
#include "cpu/plan.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

template <typename T>
struct LiveList {
  uint32_t* place;  // where each live output's patch begins in the padded image
  T* gradient;      // its gradient
  int64_t entries = 0;

  // Room for `outputs` entries, in this thread's scratch: one list at a time per thread.
  explicit LiveList(int64_t outputs) {
    // Vectors are stored whole, so the lists run over by up to one; so may reads of the copies.
    const int64_t room = round_up(outputs, 64) + 64;
    gradient = static_cast<T*>(
        scratch(Slot::kLists, room * (2 * sizeof(T) + sizeof(uint32_t) + sizeof(int32_t))));
    dense_ = gradient + room;
    place = reinterpret_cast<uint32_t*>(dense_ + room);
    codes_ = place + room;
  }

  // Lists output channel `oc` of image n. C: the code's type.
  template <typename S, typename C>
  void build(const BackwardPlan& plan, const BackwardArgs& args, int64_t n, int64_t oc) {
    const Geometry& g = args.geometry;
    const Strides gs = args.grad_output_strides, cs = args.code_strides;
    const S* grads = static_cast<const S*>(args.grad_output) + n * gs.n + oc * gs.c;
    const C* codes = static_cast<const C*>(args.code) + n * cs.n + oc * cs.c;
    const bool packed = gs.w == 1 && gs.h == g.w.out && cs.w == 1 && cs.h == g.w.out;
    if constexpr (sizeof(S) == sizeof(T)) {
      if (packed) return compress(plan, codes, reinterpret_cast<const T*>(grads), g.outputs());
    }
    // Other layouts and the half types are copied into order first.
    C* ordered = reinterpret_cast<C*>(codes_);
    for (int64_t h = 0; h < g.h.out; ++h) {
      for (int64_t w = 0; w < g.w.out; ++w) {
        dense_[h * g.w.out + w] = widen(grads[h * gs.h + w * gs.w]);
        ordered[h * g.w.out + w] = codes[h * cs.h + w * cs.w];
      }
    }
    compress(plan, ordered, dense_, g.outputs());
  }

  // Sum of the listed gradients: the bias's share. In double, since it runs over a whole map.
  T total() const {
    double sums[4] = {};
    int64_t i = 0;
    for (; i + 4 <= entries; i += 4) {
      for (int u = 0; u < 4; ++u) sums[u] += gradient[i + u];
    }
    for (; i < entries; ++i) sums[0] += gradient[i];
    return static_cast<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }

 private:
  T* dense_;         // this channel's gradients in order, where they are not so already
  uint32_t* codes_;  // and its codes

  template <typename C>
  void compress(const BackwardPlan& plan, const C* codes, const T* grads, int64_t outputs) {
    const uint32_t* base = plan.base.get();
    const uint32_t* offset = plan.code_offset.get();
    int64_t count = 0, q = 0;
#if defined(__AVX512F__)
    // Sixteen outputs at a time, the live ones moved together in a register.
    if constexpr (sizeof(T) == 4 && sizeof(C) == 1) {
      for (; q + 16 <= outputs; q += 16) {
        const __m512i code =
            _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + q)));
        const __mmask16 live = _mm512_cmpneq_epi32_mask(code, _mm512_set1_epi32(kOff<C>));
        const __m512i from = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), live, code, offset,
                                                         sizeof(uint32_t));
        const __m512i at = _mm512_add_epi32(_mm512_loadu_si512(base + q), from);
        _mm512_storeu_si512(place + count, _mm512_maskz_compress_epi32(live, at));
        _mm512_storeu_ps(gradient + count,
                         _mm512_maskz_compress_ps(live, _mm512_loadu_ps(grads + q)));
        count += __builtin_popcount(live);
      }
    }
#endif
    // Branch-free: a dead output's entry is overwritten by the next.
    for (; q < outputs; ++q) {
      const C code = codes[q];
      const bool live = code != kOff<C>;
      place[count] = base[q] + offset[live ? code : 0];
      gradient[count] = grads[q];
      count += live;
    }
    entries = count;
  }
};

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
