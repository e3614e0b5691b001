// A fully connected layer on rows of features: output = input weight^T + bias, and ReLU if wanted.
//
// Lanes run along the features, where both operands lie in memory as they come: nothing is packed,
// so that one row costs no more than reading the weight once. An output is one vector of sums over
// every kLanes-th feature and one tree of additions over its lanes, whatever tile it is computed
// in: its bits depend neither on the other rows nor on the other outputs.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/simd.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Lane i of the result is the sum of acc[i]'s lanes, for i < N; other lanes hold anything. Each
// step adds neighbours, so that the order of additions is the same for any N.
template <int N, int Width = 1>
FUSEDCNN_INLINE Vector<float> lane_sums(const Vector<float> (&acc)[N]) {
  static_assert(N <= kLanes<float>);
  if constexpr (Width == kLanes<float>) {
    return acc[0];
  } else {
    Vector<float> sums[(N + 1) / 2];
    FUSEDCNN_UNROLL
    for (int i = 0; i < (N + 1) / 2; ++i) {
      const Vector<float> a = acc[2 * i], b = acc[2 * i + 1 < N ? 2 * i + 1 : 2 * i];
      sums[i] = shuffle(a, b, kEven) + shuffle(a, b, kOdd);
    }
    return lane_sums<(N + 1) / 2, 2 * Width>(sums);
  }
}

// The `count` features from `from` on, and zeros.
FUSEDCNN_INLINE Vector<float> load_some(const float* from, int64_t count) {
  float lanes[kLanes<float>] = {};
  for (int64_t l = 0; l < count; ++l) lanes[l] = from[l];
  return load(lanes);
}

// Adds R rows x N outputs of one vector of features.
template <bool kWhole, int R, int N>
FUSEDCNN_INLINE void add_products(const float* input, int64_t input_stride, const float* weight,
                                  int64_t weight_stride, int64_t count,
                                  Vector<float> (&acc)[R][N]) {
  Vector<float> x[R];
  FUSEDCNN_UNROLL
  for (int r = 0; r < R; ++r) {
    const float* from = input + r * input_stride;
    x[r] = kWhole ? load(from) : load_some(from, count);
    keep(x[r]);
  }
  FUSEDCNN_UNROLL
  for (int o = 0; o < N; ++o) {
    const float* from = weight + o * weight_stride;
    Vector<float> w = kWhole ? load(from) : load_some(from, count);
    keep(w);
    FUSEDCNN_UNROLL
    for (int r = 0; r < R; ++r) acc[r][o] += x[r] * w;
  }
}

// One call owns R rows x N outputs. A step costs R + N loads for R N FMAs.
// input: R rows, input_stride apart. weight: N rows of `features`. output: at the first of both.
template <int R, int N>
FUSEDCNN_NOINLINE void linear_tile(const LinearArgs& args, const float* input, const float* weight,
                                   const float* bias, float* output) {
  constexpr int kN = kLanes<float>;
  const int64_t features = args.in_features, stride = args.input_stride;
  Vector<float> acc[R][N];
  FUSEDCNN_UNROLL
  for (int i = 0; i < R * N; ++i) acc[i / N][i % N] = Vector<float>{};
  int64_t k = 0;
  for (; k + kN <= features; k += kN) {
    add_products<true>(input + k, stride, weight + k, features, kN, acc);
  }
  if (k < features) {
    add_products<false>(input + k, stride, weight + k, features, features - k, acc);
  }
  constexpr int kSums = N < kN ? N : kN;
  static_assert(N % kSums == 0);
  FUSEDCNN_UNROLL
  for (int i = 0; i < R * N; i += kSums) {
    const int r = i / N, first = i % N;
    Vector<float> group[kSums];
    FUSEDCNN_UNROLL
    for (int o = 0; o < kSums; ++o) group[o] = acc[r][first + o];
    float sums[kN];
    store(sums, lane_sums(group));
    for (int o = 0; o < kSums; ++o) {
      const float value = sums[o] + bias[first + o];
      output[r * args.output_stride + first + o] = args.relu && value < 0 ? 0.0f : value;
    }
  }
}

// Output channels of a tile of R rows: enough chains of additions to hide an FMA's latency, and as
// few loads for an FMA as the registers allow.
constexpr int tile_outputs(int rows) {
  return kRegisters >= 32 ? (rows <= 2 ? 8 : 4) : (rows == 1 ? 8 : rows == 2 ? 4 : 2);
}
constexpr int kTileRows = 4;

// Outputs first to first + count of R rows from `row` on.
template <int R>
void linear_rows(const LinearArgs& args, int64_t row, int64_t first, int64_t count) {
  constexpr int kOutputs = tile_outputs(R);
  const float* input = args.input + row * args.input_stride;
  float* output = args.output + row * args.output_stride;
  int64_t o = first;
  const auto tile = [&]<int N>() {
    linear_tile<R, N>(args, input, args.weight + o * args.in_features, args.bias + o, output + o);
    o += N;
  };
  while (o + kOutputs <= first + count) tile.template operator()<kOutputs>();
  while (o + 2 <= first + count) tile.template operator()<2>();
  if (o < first + count) tile.template operator()<1>();
}

// A task owns some outputs of all rows: a weight is read from memory once.
void linear(const LinearArgs& args, const ThreadPool& pool) {
  constexpr int64_t kTaskOutputs = 8;
  const int64_t tasks = (args.out_features + kTaskOutputs - 1) / kTaskOutputs;
  parallel_tasks(pool, tasks, [&](int64_t task) {
    const int64_t first = task * kTaskOutputs;
    const int64_t count = smaller(kTaskOutputs, args.out_features - first);
    int64_t row = 0;
    for (; row + kTileRows <= args.rows; row += kTileRows) {
      linear_rows<kTileRows>(args, row, first, count);
    }
    switch (args.rows - row) {
      case 3: return linear_rows<3>(args, row, first, count);
      case 2: return linear_rows<2>(args, row, first, count);
      case 1: return linear_rows<1>(args, row, first, count);
    }
  });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
