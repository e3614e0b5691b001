// The general backward kernels: gradients of weight, bias and input for every geometry.
//
// A pooled output passes its gradient to one convolution output, or to none where ReLU is off, so
// both kernels walk the list of live pooled outputs of one output channel. Each live entry is a
// gradient and the place of a patch (plan.h) in the padded image: grad_weight adds gradient x patch
// of the input to the channel's weights, grad_input adds gradient x weights to the patch. That is
// a quarter of the dense work for a 2x2 pool, and less where ReLU is off.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/ahead.h"
#include "cpu/kernels/live_list.h"
#include "cpu/kernels/partials.h"
#include "cpu/kernels/patches.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/window_range.h"
#include "cpu/plan.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// ---- micro-kernels: S runs x V vectors of a patch -----------------------------------------------
//
// Up to 12 vectors stay in registers. grad_weight needs 8 independent chains of FMAs to hide their
// latency (2 ports x 4 cycles), so narrow tiles take several entries at a time, each into
// accumulators of its own.

constexpr int kMaxRuns = 3;
constexpr int kMaxVectors = 4;

// acc[s][v] += sum over entries of gradient[i] * image[place[i] + s * run_stride + v]
// image: at the tile's first run; acc: [S][run], run elements apart.
template <typename T, int S, int V>
FUSEDCNN_NOINLINE void gather_patches(const T* image, int64_t run_stride, const uint32_t* place,
                                      const T* gradient, int64_t entries, T* acc, int64_t run) {
  constexpr int kAtOnce = S * V >= 8 ? 1 : S * V >= 4 ? 2 : S * V >= 2 ? 4 : 8;
  // Unrolled by hand: GCC otherwise keeps the array in memory and clears it with `rep stos`.
  Vector<T> sum[kAtOnce][S][V];
  FUSEDCNN_UNROLL
  for (int j = 0; j < kAtOnce * S * V; ++j) sum[j / (S * V)][j / V % S][j % V] = Vector<T>{};
  int64_t i = 0;
  for (; i + kAtOnce <= entries; i += kAtOnce) {
    FUSEDCNN_UNROLL
    for (int u = 0; u < kAtOnce; ++u) {
      const T* from = image + place[i + u];
      const Vector<T> g = broadcast(gradient[i + u]);
      FUSEDCNN_UNROLL
      for (int j = 0; j < S * V; ++j) {
        sum[u][j / V][j % V] += g * load(from + j / V * run_stride + j % V * kLanes<T>);
      }
    }
  }
  for (; kAtOnce > 1 && i < entries; ++i) {
    const T* from = image + place[i];
    const Vector<T> g = broadcast(gradient[i]);
    FUSEDCNN_UNROLL
    for (int j = 0; j < S * V; ++j) {
      sum[0][j / V][j % V] += g * load(from + j / V * run_stride + j % V * kLanes<T>);
    }
  }
  FUSEDCNN_UNROLL
  for (int j = 0; j < S * V; ++j) {
    Vector<T> total = sum[0][j / V][j % V];
    FUSEDCNN_UNROLL
    for (int u = 1; u < kAtOnce; ++u) total += sum[u][j / V][j % V];
    T* to = acc + j / V * run + j % V * kLanes<T>;
    store(to, load(to) + total);
  }
}

// image[place[i] + s * run_stride + v] += gradient[i] * weight[s][v]; of the last vector of each
// run only the lanes set in `tail` change. weight: [S][run], run elements apart.
template <typename T, int S, int V>
FUSEDCNN_NOINLINE void scatter_patches(T* image, int64_t run_stride, const uint32_t* place,
                                       const T* gradient, int64_t entries, const T* weight,
                                       int64_t run, Vector<Int<T>> tail) {
  Vector<T> w[S][V];
  for (int s = 0; s < S; ++s) {
    for (int v = 0; v < V; ++v) w[s][v] = load(weight + s * run + v * kLanes<T>);
  }
  for (int64_t i = 0; i < entries; ++i) {
    T* to = image + place[i];
    const Vector<T> g = broadcast(gradient[i]);
    for (int s = 0; s < S; ++s) {
      for (int v = 0; v < V; ++v) {
        T* at = to + s * run_stride + v * kLanes<T>;
        const Vector<T> old = load(at);
        const Vector<T> sum = old + g * w[s][v];
        store(at, v + 1 < V ? sum : tail ? sum : old);
      }
    }
  }
}

// Calls body.template operator()<S, V>(run, vector) for tiles that cover `runs` x `vectors`.
template <int S, typename Body>
FUSEDCNN_INLINE void for_vectors(int64_t first_run, int64_t vectors, const Body& body) {
  for (int64_t v = 0; v < vectors; v += kMaxVectors) {
    switch (smaller<int64_t>(kMaxVectors, vectors - v)) {
      case 1: body.template operator()<S, 1>(first_run, v); break;
      case 2: body.template operator()<S, 2>(first_run, v); break;
      case 3: body.template operator()<S, 3>(first_run, v); break;
      default: body.template operator()<S, 4>(first_run, v);
    }
  }
}

template <typename Body>
FUSEDCNN_INLINE void for_tiles(int64_t runs, int64_t vectors, const Body& body) {
  for (int64_t s = 0; s < runs; s += kMaxRuns) {
    switch (smaller<int64_t>(kMaxRuns, runs - s)) {
      case 1: for_vectors<1>(s, vectors, body); break;
      case 2: for_vectors<2>(s, vectors, body); break;
      default: for_vectors<3>(s, vectors, body);
    }
  }
}

// ---- grad_weight and grad_bias ------------------------------------------------------------------

// Tasks to aim at: enough for a small server's threads to share.
constexpr int64_t kTasks = Partials::kMost;

template <typename S, typename C>
void grad_weight_typed(const BackwardArgs& args, const ThreadPool& pool) {
  using T = Accumulator<S>;
  constexpr int kN = kLanes<T>;
  const Geometry& g = args.geometry;
  const BackwardPlan plan(g, 1);
  const int64_t run = plan.run(kN), patch = plan.patch(kN);
  const int64_t out_channels = g.out_channels_per_group();
  // The bias's sum stands behind the weights', spread over the lanes of one vector.
  const int64_t row = (args.grad_weight ? patch : 0) + kN;

  const Partials partials(g.batch, g.out_channels * row * sizeof(T));
  // Output channels are independent, so splitting them as well changes no result; but every task
  // packs its images, so each takes several.
  const int64_t wanted = larger<int64_t>(1, kTasks / (partials.count * g.groups));
  const int64_t split = round_up((out_channels + wanted - 1) / wanted, kChannelsAtOnce);
  const int64_t splits = (out_channels + split - 1) / split;

  T* sums =
      static_cast<T*>(scratch(Slot::kPartials, partials.count * g.out_channels * row * sizeof(T)));
  parallel_tasks(pool, partials.count * g.groups * splits, [&](int64_t task) {
    const int64_t partial = task / (g.groups * splits);
    const int64_t group = task / splits % g.groups;
    const int64_t first = task % splits * split, last = smaller(first + split, out_channels);
    T* rows = sums + (partial * g.out_channels + group * out_channels) * row;
    memset(rows + first * row, 0, (last - first) * row * sizeof(T));
    T* image = args.grad_weight ? patch_image<T>(plan) : nullptr;
    LiveList<T> list(args);
    for (int64_t n = partials.begin(partial); n < partials.begin(partial + 1); ++n) {
      if (args.grad_weight) pack_patches<S, T>(plan, args, n, group, image);
      auto ahead = BackwardAhead::of<S, C>(args, n, args.grad_weight, last - first);
      for (int64_t oc = first; oc < last; ++oc) {
        ahead.step();
        T* sum = rows + oc * row;
        list.template build<S, C>(plan, args, n, group * out_channels + oc);
        T* bias = sum + row - kN;
        store(bias, load(bias) + list.total());
        if (!args.grad_weight) continue;
        for (int64_t o = 0; o < plan.outer; ++o) {
          for_tiles(plan.segments, run / kN, [&]<int R, int V>(int64_t s, int64_t v) {
            gather_patches<T, R, V>(
                image + o * plan.outer_stride + s * plan.segment_stride + v * kN,
                plan.segment_stride, list.place, list.gradient, list.entries,
                sum + (o * plan.segments + s) * run + v * kN, run);
          });
        }
      }
    }
  });

  partials.add_up(pool, sums, g.out_channels * row);
  parallel_tasks(pool, g.out_channels, [&](int64_t oc) {
    const T* sum = sums + oc * row;
    double bias = 0;  // the lanes may cancel
    for (int lane = 0; lane < kN; ++lane) bias += sum[row - kN + lane];
    if (args.grad_bias) static_cast<S*>(args.grad_bias)[oc] = narrow<S>(static_cast<T>(bias));
    if (!args.grad_weight) return;
    const Strides to = args.grad_weight_strides;
    for (int64_t kh = 0; kh < g.h.kernel; ++kh) {
      for (int64_t kw = 0; kw < g.w.kernel; ++kw) {
        const T* from = sum + plan.tap(kh, kw, kN);
        S* tap = static_cast<S*>(args.grad_weight) + oc * to.n + kh * to.h + kw * to.w;
        for (int64_t c = 0; c < g.in_channels_per_group(); ++c) tap[c * to.c] = narrow<S>(from[c]);
      }
    }
  });
}

// ---- grad_input ---------------------------------------------------------------------------------

// Output channels whose patches are added to a pixel one by one. Longer sums are taken in runs of
// this length and added up: one long chain of additions would round more than the stock layers do.
constexpr int64_t kRunOfOutputs = 8;

template <typename S, typename C>
void grad_input_typed(const BackwardArgs& args, const ThreadPool& pool) {
  using T = Accumulator<S>;
  constexpr int kN = kLanes<T>;
  const Geometry& g = args.geometry;
  // Pixels of whole vectors keep every run aligned, so that a patch's stores feed the next patch's
  // loads directly; not worth it where most of a vector would be padding.
  const int64_t channels = g.in_channels_per_group(), out_channels = g.out_channels_per_group();
  const BackwardPlan plan(g, channels > kN / 2 ? kN : 1);
  const int64_t run = plan.run(kN), patch = plan.patch(kN);

  T* packed = static_cast<T*>(scratch(Slot::kWeights, g.out_channels * patch * sizeof(T)));
  parallel_tasks(pool, g.out_channels, [&](int64_t oc) {
    T* to = packed + oc * patch;
    memset(to, 0, patch * sizeof(T));
    const Strides from = args.weight_strides;
    const S* weight = static_cast<const S*>(args.weight) + oc * from.n;
    for (int64_t kh = 0; kh < g.h.kernel; ++kh) {
      for (int64_t kw = 0; kw < g.w.kernel; ++kw) {
        T* tap = to + plan.tap(kh, kw, kN);
        const S* source = weight + kh * from.h + kw * from.w;
        for (int64_t c = 0; c < channels; ++c) tap[c] = widen(source[c * from.c]);
      }
    }
  });

  Vector<Int<T>> tail;
  for (int i = 0; i < kN; ++i) tail[i] = i < plan.length - (run - kN) ? -1 : 0;
  parallel_tasks(pool, g.batch * g.groups, [&](int64_t task) {
    const int64_t n = task / g.groups, group = task % g.groups;
    T* image = patch_image<T>(plan);
    const int64_t size = round_up(plan.size, kN);  // within the image's slack
    memset(image, 0, size * sizeof(T));
    T* total = image;  // of the runs before
    if (out_channels > kRunOfOutputs) {
      total = static_cast<T*>(scratch(Slot::kGradient, size * sizeof(T)));
      memset(total, 0, size * sizeof(T));
    }
    LiveList<T> list(args);
    auto ahead = BackwardAhead::of<S, C>(args, n, false, out_channels);
    for (int64_t r = 0; r < out_channels; ++r) {
      ahead.step();
      const int64_t oc = group * out_channels + r;
      list.template build<S, C>(plan, args, n, oc);
      for (int64_t o = 0; o < plan.outer; ++o) {
        for_tiles(plan.segments, run / kN, [&]<int R, int V>(int64_t s, int64_t v) {
          const Vector<Int<T>> all = Vector<Int<T>>{} - 1;
          scatter_patches<T, R, V>(image + o * plan.outer_stride + s * plan.segment_stride + v * kN,
                                   plan.segment_stride, list.place, list.gradient, list.entries,
                                   packed + oc * patch + (o * plan.segments + s) * run + v * kN,
                                   run, (v + V) * kN == run ? tail : all);
        });
      }
      if (total == image || ((r + 1) % kRunOfOutputs && r + 1 < out_channels)) continue;
      for (int64_t k = 0; k < size; k += kN) {
        store(total + k, load(total + k) + load(image + k));
        store(image + k, Vector<T>{});
      }
    }
    unpack_patches<S, T>(plan, args, n, group, total);
  });
}

inline const char* why_not_backward_general(const Problem& problem) {
  return problem.geometry.places_fit_32_bits() ? nullptr
                                               : "a padded image has 2^32 elements or more";
}

// Calls body(S{}, C{}) with the storage type and the code type of the call.
template <typename Body>
void for_storage_and_code(const BackwardArgs& args, const Body& body) {
  for_storage(args.type, [&](auto storage) {
    args.wide_code ? body(storage, int32_t{}) : body(storage, uint8_t{});
  });
}

inline void grad_weight_general(const BackwardArgs& given, const ThreadPool& pool) {
  const BackwardArgs args = laid_down(given);
  for_storage_and_code(args,
                       [&]<typename S, typename C>(S, C) { grad_weight_typed<S, C>(args, pool); });
}

inline void grad_input_general(const BackwardArgs& given, const ThreadPool& pool) {
  const BackwardArgs args = laid_down(given);
  for_storage_and_code(args,
                       [&]<typename S, typename C>(S, C) { grad_input_typed<S, C>(args, pool); });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
