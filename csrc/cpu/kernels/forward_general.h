// The general forward kernel: any kernel size, stride, padding, dilation, groups and pool.
//
// A task owns a band of pooled rows of one image. For each group it lays the band's input out in
// phase planes (plan.h), where every tap is a contiguous run over pooled outputs; then a few output
// channels at a time it computes the convolution outputs of every pool phase, and pools them.
//
// Large windows make many phases of few places each; forward_general_large.h is for them.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/ahead.h"
#include "cpu/kernels/conv_tiles.h"
#include "cpu/kernels/forward_general_large.h"
#include "cpu/kernels/phase_planes.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/window_range.h"
#include "cpu/plan.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Convolution outputs that do not exist (the pool's padding) must lose every comparison.
// conv: [conv phases][conv_size] of one output channel.
template <typename T>
void mask_outside(const ForwardPlan& plan, const Geometry& g, int64_t first_out, int64_t rows,
                  T* conv) {
  const T lowest = -static_cast<T>(__builtin_inff());
  for (int64_t jh = 0; jh < plan.h.conv_phases; ++jh) {
    for (int64_t jw = 0; jw < plan.w.conv_phases; ++jw, conv += plan.conv_size) {
      const int64_t cols = g.w.out + plan.w.conv_extra[jw];
      for (int64_t i = 0; i < rows + plan.h.conv_extra[jh]; ++i) {
        const int64_t y =
            (first_out + i) * g.h.pool_stride + plan.h.conv_phase[jh] - g.h.pool_padding;
        const bool outside = y < 0 || y >= g.h.conv;
        T* row = conv + i * plan.pitch;
        for (int64_t k = 0; k < cols; ++k) {
          const int64_t x = k * g.w.pool_stride + plan.w.conv_phase[jw] - g.w.pool_padding;
          if (outside || x < 0 || x >= g.w.conv) row[k] = lowest;
        }
      }
    }
  }
}

// Pools one row of one output channel: max, ReLU and code of kLanes places at a time.
// conv: the channel's scratch at the row's first place; output, code: the row in the output
// tensors (code may be null), `stride` elements between pixels. first: the codes of windows in
// which all is minus infinity, in whole vectors; null for zeros.
template <bool kReLU, typename S, typename C>
void pool_row(const ForwardPlan& plan, const Geometry& g, const Accumulator<S>* conv, S* output,
              C* code, int64_t stride, const Int<Accumulator<S>>* first) {
  using T = Accumulator<S>;
  constexpr int kN = kLanes<T>;
  typedef C CodeVector __attribute__((vector_size(kN * sizeof(C))));
  typedef C CodeUnaligned __attribute__((vector_size(kN * sizeof(C)), aligned(1), may_alias));
  const int64_t window = g.window();
  const bool direct = stride == 1 && sizeof(S) == sizeof(T);
  for (int64_t k = 0; k < g.w.out; k += kN) {
    Vector<T> best = broadcast(-static_cast<T>(__builtin_inff()));
    Vector<Int<T>> winner = {};
    if (first) winner = load(first + k);
    for (int64_t e = 0; e < window; ++e) {
      const Vector<T> value = load(conv + plan.pool_offset[e] + k);
      // The first maximum wins; NaN beats everything, a later NaN too, as in torch.
      const auto wins = (value > best) | (value != value);
      best = wins ? value : best;
      winner = wins ? broadcast(static_cast<Int<T>>(e)) : winner;
    }
    if constexpr (kReLU) {
      const auto off = best <= Vector<T>{};  // false for NaN, which ReLU lets through
      best = off ? Vector<T>{} : best;
      winner = off ? broadcast(static_cast<Int<T>>(kOff<C>)) : winner;
    }
    const CodeVector codes = __builtin_convertvector(winner, CodeVector);
    if (direct && k + kN <= g.w.out) {
      store(reinterpret_cast<T*>(output) + k, best);
      if (code) *reinterpret_cast<CodeUnaligned*>(code + k) = codes;
      continue;
    }
    T values[kN];
    C bytes[kN];
    memcpy(values, &best, sizeof best);
    memcpy(bytes, &codes, sizeof codes);
    const int64_t count = smaller<int64_t>(kN, g.w.out - k);
    if (stride == 1) {
      convert_run(values, output + k, count);
    } else {
      for (int64_t i = 0; i < count; ++i) output[(k + i) * stride] = narrow<S>(values[i]);
    }
    if (!code) continue;
    for (int64_t i = 0; i < count; ++i) code[(k + i) * stride] = bytes[i];
  }
}

// For pool_row, the first elements of `rows` rows of windows that lie in the plane: [rows][pitch].
template <typename C, typename T>
const Int<T>* first_elements(const Geometry& g, int64_t first_out, int64_t rows, int64_t pitch) {
  Int<T>* const first =
      static_cast<Int<T>*>(scratch(Slot::kLists, rows * pitch * int64_t{sizeof(Int<T>)}));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < pitch; ++k) {
      const int64_t element = first_element(g, first_out + i, smaller(k, g.w.out - 1));
      first[i * pitch + k] = static_cast<Int<T>>(element < 0 ? kOff<C> : element);
    }
  }
  return first;
}

template <typename S, typename C>
void forward_band(const ForwardArgs& args, const ForwardShared<Accumulator<S>>& shared, int64_t n,
                  int64_t first_out) {
  using T = Accumulator<S>;
  const Geometry& g = args.geometry;
  const ForwardPlan& plan = shared.plan;
  const int64_t channels = g.in_channels_per_group(), out_channels = g.out_channels_per_group();
  const int64_t rows = smaller(plan.band, g.h.out - first_out);
  BandScratch<T> band(plan, channels);
  const bool masked = plan.h.masked || plan.w.masked;
  const int64_t pitch = round_up(g.w.out, kLanes<T>);
  const Int<T>* const first =
      masked && !args.relu ? first_elements<C, T>(g, first_out, rows, pitch) : nullptr;
  Ahead ahead = Ahead::of(static_cast<const S*>(args.input), args.input_strides, g.in_channels,
                          g.h.in, g.w.in, n, g.batch, g.groups * shared.blocks);

  for (int64_t group = 0; group < g.groups; ++group) {
    band.template pack<S>(plan, args, g, n, group, first_out);
    for (int64_t block = 0; block < shared.blocks; ++block) {
      const int64_t in_block =
          smaller<int64_t>(kTileChannels, out_channels - block * kTileChannels);
      ahead.step();
      band.convolve(shared, g, group * shared.blocks + block, in_block, rows);
      for (int64_t r = 0; r < in_block; ++r) {
        T* channel = band.conv + r * band.conv_channel;
        if (masked) mask_outside(plan, g, first_out, rows, channel);
        const int64_t oc = group * out_channels + block * kTileChannels + r;
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t at = n * args.output_strides.n + oc * args.output_strides.c +
                             (first_out + i) * args.output_strides.h;
          S* output = static_cast<S*>(args.output) + at;
          C* code = args.code ? static_cast<C*>(args.code) + at : nullptr;
          const T* const row = channel + i * plan.pitch;
          const int64_t stride = args.output_strides.w;
          if (!args.relu) {
            pool_row<false>(plan, g, row, output, code, stride, first ? first + i * pitch : first);
            continue;
          }
          pool_row<true>(plan, g, row, output, code, stride, first);
          if (!masked) continue;
          const bool empty_row = empty_window(g.h, first_out + i);
          for (int64_t k = 0; k < g.w.out; ++k) {
            if (empty_row || empty_window(g.w, k)) {
              output[k * args.output_strides.w] = narrow<S>(-static_cast<T>(__builtin_inff()));
            }
          }
        }
      }
    }
  }
}

// `only`, where given, picks the images to compute: [batch], nonzero for yes.
template <typename S, typename C>
void forward_general_bands(const ForwardArgs& args, const ThreadPool& pool,
                           const uint8_t* only = nullptr) {
  using T = Accumulator<S>;
  const Geometry& g = args.geometry;
  const ForwardPlan plan(g, sizeof(T), kLanes<T>);
  const ForwardShared<T> shared = share_weights<S>(args, pool, plan);
  const int64_t bands = plan.bands(g);
  parallel_tasks(pool, g.batch * bands, [&](int64_t task) {
    if (only && !only[task / bands]) return;
    forward_band<S, C>(args, shared, task / bands, task % bands * plan.band);
  });
}

const char* why_not_forward_general(const Problem&) { return nullptr; }

void forward_general(const ForwardArgs& given, const ThreadPool& pool) {
  const ForwardArgs args = laid_down(given);
  for_storage(args.type, [&]<typename S>(S) {
    if (many_phases<Accumulator<S>>(args.geometry)) {
      return args.wide_code ? forward_general_large<S, int32_t>(args, pool)
                            : forward_general_large<S, uint8_t>(args, pool);
    }
    args.wide_code ? forward_general_bands<S, int32_t>(args, pool)
                   : forward_general_bands<S, uint8_t>(args, pool);
  });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
