// The list of pooled outputs of one output channel through which a gradient flows.
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
  uint32_t* place;  // where each live output's patch begins in the padded image
  T* gradient;      // its gradient
  int64_t entries = 0;

  // Working memory is this thread's scratch: one list at a time per thread.
  explicit LiveList(const BackwardArgs& args) : outputs_(args.geometry.outputs()) {
    // Vectors are stored whole and zeros follow the list, so it runs over by up to two vectors.
    const int64_t room = round_up(outputs_, 64) + 64;
    const int64_t channels = smaller(kChannelsAtOnce, args.geometry.out_channels);
    gradient = static_cast<T*>(
        scratch(Slot::kLists, room * (sizeof(T) + sizeof(uint32_t)) +
                                  channels * outputs_ * (sizeof(T) + sizeof(int32_t))));
    dense_ = gradient + room;
    place = reinterpret_cast<uint32_t*>(dense_ + channels * outputs_);
    codes_ = place + room;
  }

  // Lists output channel `oc` of image n. C: the code's type.
  template <typename S, typename C>
  void build(const BackwardPlan& plan, const BackwardArgs& args, int64_t n, int64_t oc) {
    const bool fresh = n != image_ || oc < first_ || oc >= first_ + kChannelsAtOnce;
    if (fresh) image_ = n, first_ = oc;
    const T* grads = in_order(args, static_cast<const S*>(args.grad_output),
                              args.grad_output_strides, n, oc, dense_, fresh);
    const C* codes = in_order(args, static_cast<const C*>(args.code), args.code_strides, n, oc,
                              reinterpret_cast<C*>(codes_), fresh);
    compress(plan, codes, grads, args.geometry.window());
  }

  // Sum of the listed gradients, the bias's share, spread over the lanes.
  Vector<T> total() const {
    constexpr int kN = kLanes<T>;
    Vector<T> sums[2] = {};
    for (int64_t i = 0; i < entries; i += 2 * kN) {
      sums[0] += load(gradient + i);
      sums[1] += load(gradient + i + kN);
    }
    return sums[0] + sums[1];
  }

 private:
  int64_t outputs_;
  int64_t image_ = -1, first_ = -1;  // what dense_ and codes_ hold: kChannelsAtOnce from first_ on
  T* dense_;         // [channels][outputs] gradients in order, where they are not so already
  uint32_t* codes_;  // and the codes

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

  template <typename C>
  void compress(const BackwardPlan& plan, const C* codes, const T* grads, int64_t window) {
    const uint32_t* base = plan.base.get();
    const uint32_t* offset = plan.code_offset.get();
    int64_t count = 0, q = 0;
#if defined(__AVX512F__)
    // Sixteen outputs at a time, the live ones moved together in a register.
    if constexpr (sizeof(T) == 4 && sizeof(C) == 1) {
      const __m512i table = _mm512_loadu_si512(offset);
      for (; q + 16 <= outputs_; q += 16) {
        const __m512i code =
            _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + q)));
        const __mmask16 live = _mm512_cmpneq_epi32_mask(code, _mm512_set1_epi32(kOff<C>));
        // Gathering costs more than all the rest; common windows fit a register.
        const __m512i from = window <= 16
                                 ? _mm512_permutexvar_epi32(code, table)
                                 : _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), live, code,
                                                               offset, sizeof(uint32_t));
        const __m512i at = _mm512_add_epi32(_mm512_loadu_si512(base + q), from);
        _mm512_storeu_si512(place + count, _mm512_maskz_compress_epi32(live, at));
        _mm512_storeu_ps(gradient + count,
                         _mm512_maskz_compress_ps(live, _mm512_loadu_ps(grads + q)));
        count += __builtin_popcount(live);
      }
    }
#endif
    (void)window;
    // Branch-free: a dead output's entry is overwritten by the next.
    for (; q < outputs_; ++q) {
      const C code = codes[q];
      const bool live = code != kOff<C>;
      const auto element = static_cast<uint32_t>(live ? code : 0);
      place[count] = base[q] + (sizeof(C) == 1 ? offset[element] : plan.offset_of(element));
      gradient[count] = grads[q];
      count += live;
    }
    entries = count;
    store(gradient + count, Vector<T>{});
    store(gradient + count + kLanes<T>, Vector<T>{});
  }
};

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
