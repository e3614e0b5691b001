// The general forward under large windows (large_windows.h): a lane is a place along a row.
//
// The convolution is that of the general kernel under a pool of single outputs: phase planes of the
// convolution's stride alone, a band of rows at a time. Maxima are [out channels][conv cols] of a
// pooled row: of every column, over the rows of its windows. Windows are taken across them at the
// end. Working memory is that of ForwardPlan for such a pool (plan.h), and does not depend on the
// window.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/conv_tiles.h"
#include "cpu/kernels/large_windows.h"
#include "cpu/kernels/window_range.h"
#include "cpu/plan.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Whether the general kernel's phase planes would be many and hold few places each: their vectors
// against those of the convolution's rows, a quarter of the latter being worth what pooling by
// itself costs.
template <typename T>
bool many_phases(const Geometry& g) {
  constexpr int64_t kLargeWindow = 64;
  constexpr int64_t kSmallWindow = 16;
  if (g.window() >= kLargeWindow || g.window() < kSmallWindow) return g.window() >= kLargeWindow;
  constexpr int64_t kN = kLanes<T>;
  const auto phases = [](const Axis& axis) { return smaller(axis.pool_stride, axis.pool_kernel); };
  const auto vectors = [](int64_t rows, int64_t cols, const Axis& w) {
    return (rows * (cols + (w.kernel - 1) * w.dilation / w.stride) + kN - 1) / kN;
  };
  return phases(g.h) * phases(g.w) * vectors(g.h.out, g.w.out, g.w) >
         vectors(g.h.conv, g.w.conv, g.w) * 5 / 4;
}

// The convolution alone, of `rows` rows: a pool of single outputs.
inline Geometry without_pool(const Geometry& g, int64_t rows) {
  Geometry conv = g;
  for (Axis* axis : {&conv.h, &conv.w}) {
    axis->pool_kernel = axis->pool_stride = axis->pool_dilation = 1;
    axis->pool_padding = 0;
    axis->out = axis->conv;
  }
  conv.h.out = rows;
  conv.ceil_mode = false;
  return conv;
}

// Takes one channel's convolution rows [begin, end) into the maxima of its columns. from: the rows,
// `pitch` apart; maxima: from pooled row `first` on, the channel's, `row_size` from row to row.
template <typename T>
FUSEDCNN_NOINLINE void take_channel(const Axis& h, const T* from, int64_t pitch, int64_t begin,
                                    int64_t end, const Maxima<T>& maxima, int64_t width,
                                    int64_t row_size, int64_t first) {
  constexpr int kN = kLanes<T>;
  int64_t oh, last, top, bottom;
  for (pooled_range(h, begin, end, oh, last); oh < last; ++oh) {
    window_range(h, oh, begin, end, top, bottom);
    const T* row = from + (oh * h.pool_stride - h.pool_padding - begin) * pitch;
    const Maxima<T> at = maxima.at((oh - first) * row_size);
    for (int64_t x = 0; x < width; x += kN) {
      Vector<T> best = load(at.best + x);
      Vector<Int<T>> winner = load(at.winner + x);
      for (int64_t p = top; p < bottom; ++p) {
        take<T>(load(row + p * h.pool_dilation * pitch + x), broadcast(static_cast<Int<T>>(p)),
                best, winner);
      }
      store(at.best + x, best);
      store(at.winner + x, winner);
    }
  }
}

// One column's maximum against the best so far, out of their order: of equals the first element of
// the window wins, of NaNs the last. Vectors or single values.
template <typename T, typename I>
FUSEDCNN_INLINE auto beats(T value, I element, T best, I winner) {
  const auto nan = value != value;
  return (value > best) | ((value == best) & (element < winner)) |
         (nan & ((best == best) | (element > winner)));
}

// The maximum of `count` columns, `step` apart, and its element of the window: row x pool_kernel_w
// + column, of which the first is `column`.
template <typename T>
FUSEDCNN_NOINLINE void across_columns(const T* best, const Int<T>* row, int64_t step, int64_t count,
                                      int64_t pool_kernel_w, int64_t column, T& value,
                                      Int<T>& element) {
  constexpr int kN = kLanes<T>;
  const auto width = static_cast<Int<T>>(pool_kernel_w);
  auto first = static_cast<Int<T>>(column);
  value = -static_cast<T>(__builtin_inff());
  element = 0;
  T values[kN];
  Int<T> elements[kN];
  if (step == 1 && count >= 2 * kN) {
    Vector<T> most = load(best);
    Vector<Int<T>> lane, winner;
    for (int l = 0; l < kN; ++l) lane[l] = l + first;
    winner = load(row) * width + lane;
    for (int64_t k = kN; k < count; k += kN) {
      const int64_t at = smaller(k, count - kN);  // the last vector overlaps the one before
      const Vector<T> next = load(best + at);
      const Vector<Int<T>> next_element = load(row + at) * width + (lane + static_cast<Int<T>>(at));
      const auto wins = beats(next, next_element, most, winner);
      most = wins ? next : most;
      winner = wins ? next_element : winner;
    }
    store(values, most);
    store(elements, winner);
    for (int l = 0; l < kN; ++l) {
      if (!beats(values[l], elements[l], value, element)) continue;
      value = values[l];
      element = elements[l];
    }
    return;
  }
  for (int64_t k = 0; k < count; ++k, ++first, best += step, row += step) {
    const Int<T> next = *row * width + first;
    if (!beats(*best, next, value, element)) continue;
    value = *best;
    element = next;
  }
}

// The same for a vector of windows, a column apart: of `count` columns each, all of its window.
template <typename T>
FUSEDCNN_NOINLINE void across_windows(const T* best, const Int<T>* row, int64_t step, int64_t count,
                                      T* values, Int<T>* elements) {
  Vector<T> most = load(best);
  Vector<Int<T>> winner = load(row) * static_cast<Int<T>>(count);
  for (int64_t k = 1; k < count; ++k) {
    const Vector<T> next = load(best + k * step);
    const Vector<Int<T>> element =
        load(row + k * step) * static_cast<Int<T>>(count) + static_cast<Int<T>>(k);
    const auto wins = beats(next, element, most, winner);
    most = wins ? next : most;
    winner = wins ? element : winner;
  }
  store(values, most);
  store(elements, winner);
}

template <typename S, typename C>
struct GeneralLarge {
  using T = Accumulator<S>;
  static constexpr int kN = kLanes<T>;

  const ForwardArgs& args;
  const Geometry& conv;  // args.geometry without its pool
  const ForwardShared<T>& shared;
  const Slices& slices;
  int64_t width;  // of a channel's maxima
  int64_t row_size, rows;

  GeneralLarge(const ForwardArgs& args, const Geometry& conv, const ForwardShared<T>& shared,
               const Slices& slices)
      : args(args), conv(conv), shared(shared), slices(slices) {
    width = round_up(conv.w.conv, kN);
    row_size = conv.out_channels * width;
    rows = shared.plan.band;
  }

  FUSEDCNN_NOINLINE void take_rows(int64_t n, int64_t, int64_t part, int64_t begin, int64_t end,
                                   const MaximaOf<T>& maxima_of, int64_t first) const {
    const int64_t out_channels = conv.out_channels_per_group();
    const Maxima<T> maxima = maxima_of[n];
    BandScratch<T> band(shared.plan, conv.in_channels_per_group());
    const int64_t blocks = conv.groups * shared.blocks;
    const int64_t in_part = (blocks + slices.parts - 1) / slices.parts;
    int64_t packed = -1;
    for (int64_t i = part * in_part; i < smaller(blocks, (part + 1) * in_part); ++i) {
      const int64_t group = i / shared.blocks, block = i % shared.blocks;
      if (group != packed) band.template pack<S>(shared.plan, args, conv, n, group, begin);
      packed = group;
      const int64_t in_block =
          smaller<int64_t>(kTileChannels, out_channels - block * kTileChannels);
      band.convolve(shared, conv, i, in_block, end - begin);
      for (int64_t r = 0; r < in_block; ++r) {
        const int64_t oc = group * out_channels + block * kTileChannels + r;
        take_channel(args.geometry.h, band.conv + r * band.conv_channel, shared.plan.pitch, begin,
                     end, maxima.at(oc * width), width, row_size, first);
      }
    }
  }

  FUSEDCNN_NOINLINE void finish_row(int64_t n, int64_t oh, const Maxima<T>& maxima) const {
    const Geometry& g = args.geometry;
    const Strides s = args.output_strides;
    const bool empty_row = empty_window(g.h, oh);
    for (int64_t oc = 0; oc < g.out_channels; ++oc) {
      const Maxima<T> columns = maxima.at(oc * width);
      const int64_t at = n * s.n + oc * s.c + oh * s.h;
      const auto write = [&](int64_t ow, T value, Int<T> element, bool empty) {
        if (!args.relu) {
          // Where nothing won, all is minus infinity.
          const bool none = value == -static_cast<T>(__builtin_inff());
          const int64_t winner = none ? first_element(g, oh, ow) : element;
          static_cast<S*>(args.output)[at + ow * s.w] = narrow<S>(value);
          if (args.code) static_cast<C*>(args.code)[at + ow * s.w] = static_cast<C>(winner);
          return;
        }
        const bool off = value <= 0;  // false for NaN, which ReLU lets through
        static_cast<S*>(args.output)[at + ow * s.w] = narrow<S>(off && !empty ? T(0) : value);
        if (!args.code) return;
        static_cast<C*>(args.code)[at + ow * s.w] = off ? kOff<C> : static_cast<C>(element);
      };
      for (int64_t ow = 0; ow < g.w.out;) {
        int64_t left, right;
        window_range(g.w, ow, 0, g.w.conv, left, right);
        const int64_t x = ow * g.w.pool_stride - g.w.pool_padding + left * g.w.pool_dilation;
        T values[kN];
        Int<T> elements[kN];
        // A vector of windows that lie side by side, all of them whole.
        const int64_t beyond = x + kN - 1 + (g.w.pool_kernel - 1) * g.w.pool_dilation;
        if (g.w.pool_stride == 1 && left == 0 && ow + kN <= g.w.out && beyond < g.w.conv) {
          across_windows(columns.best + x, columns.winner + x, g.w.pool_dilation, g.w.pool_kernel,
                         values, elements);
          for (int l = 0; l < kN; ++l) write(ow + l, values[l], elements[l], empty_row);
          ow += kN;
          continue;
        }
        across_columns(columns.best + x, columns.winner + x, g.w.pool_dilation, right - left,
                       g.w.pool_kernel, left, values[0], elements[0]);
        write(ow++, values[0], elements[0], empty_row || right <= left);
      }
    }
  }
};

template <typename S, typename C>
void forward_general_large(const ForwardArgs& args, const ThreadPool& pool) {
  using T = Accumulator<S>;
  const Geometry& g = args.geometry;
  const int64_t blocks =
      g.groups * ((g.out_channels_per_group() + kTileChannels - 1) / kTileChannels);
  const Slices slices(g, 1, blocks);
  const Geometry conv = without_pool(g, slices.rows);
  const ForwardPlan plan(conv, sizeof(T), kLanes<T>);
  const ForwardShared<T> shared = share_weights<S>(args, pool, plan);
  run_large_windows<T>(g, slices, pool, GeneralLarge<S, C>(args, conv, shared, slices));
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
