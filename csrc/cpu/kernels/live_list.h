// The pooled outputs of one output channel through which a gradient flows.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/transpose.h"
#include "cpu/plan.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Output channels that are brought into order at a time, where memory interleaves them.
constexpr int64_t kChannelsAtOnce = 16;

template <typename T>
struct LiveList {
  const T* gradient;  // [outputs] the gradient of every pooled output
  uint32_t* place;    // [outputs] where its patch begins in the padded image; of dead ones anything
  uint64_t* live;     // [words] one bit for each output, set where a gradient flows
  int64_t words;      // of 64 outputs
  Vector<T> total;    // sum of the live gradients, the bias's share, spread over the lanes

  // Working memory is this thread's scratch: one list at a time per thread.
  explicit LiveList(const BackwardArgs& args) : outputs_(args.geometry.outputs()) {
    words = (outputs_ + 63) / 64;
    const int64_t channels = smaller(kChannelsAtOnce, args.geometry.out_channels);
    live = static_cast<uint64_t*>(
        scratch(Slot::kLists, words * (8 + 64 * int64_t{sizeof(uint32_t)}) +
                                  channels * outputs_ * (sizeof(T) + sizeof(int32_t))));
    dense_ = reinterpret_cast<T*>(live + words);
    place = reinterpret_cast<uint32_t*>(dense_ + channels * outputs_);
    codes_ = place + 64 * words;
  }

  // Lists output channel `oc` of image n. C: the code's type.
  template <typename S, typename C>
  void build(const BackwardPlan& plan, const BackwardArgs& args, int64_t n, int64_t oc) {
    const bool fresh = n != image_ || oc < first_ || oc >= first_ + kChannelsAtOnce;
    if (fresh) image_ = n, first_ = oc;
    gradient = in_order(args, static_cast<const S*>(args.grad_output), args.grad_output_strides, n,
                        oc, dense_, fresh);
    const C* codes = in_order(args, static_cast<const C*>(args.code), args.code_strides, n, oc,
                              reinterpret_cast<C*>(codes_), fresh);
    total = Vector<T>{};
    for (int64_t w = 0; w < words; ++w) {
      list_word(plan, codes, args.geometry.window(), w, smaller<int64_t>(64, outputs_ - 64 * w));
    }
  }

 private:
  int64_t outputs_;
  int64_t image_ = -1, first_ = -1;  // what dense_ and codes_ hold: kChannelsAtOnce from first_ on
  T* dense_;         // [channels][outputs] gradients in order, where they are not so already
  uint32_t* codes_;  // and the codes

  // Outputs [64 * w, 64 * w + count).
  template <typename C>
  FUSEDCNN_INLINE void list_word(const BackwardPlan& plan, const C* codes, int64_t window,
                                 int64_t w, int64_t count) {
    const uint32_t* base = plan.base.get() + 64 * w;
    const uint32_t* offset = plan.code_offset.get();
    codes += 64 * w;
    uint32_t* to = place + 64 * w;
    const T* grads = gradient + 64 * w;
    uint64_t mask = 0;
#if defined(__AVX512BW__)
    if constexpr (sizeof(T) == 4 && sizeof(C) == 1) {
      const __mmask64 some = ~uint64_t{0} >> (64 - count);
      mask = _mm512_mask_cmpneq_epi8_mask(some, _mm512_maskz_loadu_epi8(some, codes),
                                          _mm512_set1_epi8(-1));
      live[w] = mask;
      const __m512i table = _mm512_loadu_si512(offset);
      for (int64_t q = 0; q < count; q += 16) {
        const __mmask16 in_range = static_cast<__mmask16>(some >> q);
        const __m512i code = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(in_range, codes + q));
        // Gathering costs more than all the rest; common windows fit a register.
        const __m512i from = window <= 16
                                 ? _mm512_permutexvar_epi32(code, table)
                                 : _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), in_range,
                                                               code, offset, sizeof(uint32_t));
        const __m512i start = _mm512_maskz_loadu_epi32(in_range, base + q);
        _mm512_storeu_si512(to + q, _mm512_add_epi32(start, from));
        total += (Vector<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> q), grads + q);
      }
      return;
    }
#endif
    (void)window;
    for (int64_t q = 0; q < count; ++q) {
      const bool alive = codes[q] != kOff<C>;
      to[q] = base[q] + offset[alive ? codes[q] : 0];
      mask |= uint64_t{alive} << q;
      reinterpret_cast<T*>(&total)[q % kLanes<T>] += alive ? grads[q] : T(0);
    }
    live[w] = mask;
  }

  // One channel's pooled outputs as one run of `To`: where they are, or copied into `buffer`
  // ([kChannelsAtOnce][outputs]; `fresh`: it holds other channels).
  template <typename From, typename To>
  const To* in_order(const BackwardArgs& args, const From* data, Strides strides, int64_t n,
                     int64_t oc, To* buffer, bool fresh) {
    const Geometry& g = args.geometry;
    const bool rows_follow = strides.h == strides.w * g.w.out;
    const From* from = data + n * strides.n + oc * strides.c;
    if (strides.w == 1 && rows_follow) {
      if constexpr (std::is_same_v<From, To>) return from;
      convert_run(from, buffer, outputs_);
      return buffer;
    }
    if (strides.c == 1 && rows_follow) {
      if (fresh) {
        const int64_t channels = smaller(kChannelsAtOnce, g.out_channels - oc);
        transpose_matrix(from, strides.w, buffer, outputs_, outputs_, channels);
      }
      return buffer + (oc - first_) * outputs_;
    }
    for (int64_t h = 0; h < g.h.out; ++h) {
      for (int64_t w = 0; w < g.w.out; ++w) {
        buffer[h * g.w.out + w] = convert<To>(from[h * strides.h + w * strides.w]);
      }
    }
    return buffer;
  }
};

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
