// The register tile of the dense grad_weight kernel.
#pragma once

#include "cpu/kernels/simd.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// A tile's sums: vectors of output channels x input channels x taps. A pixel of an input channel is
// loaded once for all vectors and taps, a vector of gradients once for all channels and taps, since
// neighbouring taps see it at neighbouring pixels: 24 multiply-adds for 6 loads. Besides 24 sums,
// registers hold the gradients of as many pixels as there are taps, 6, and a pixel's broadcast;
// with 16 registers, 9 sums, 3 and one.
constexpr int kDenseVectors = kRegisters == 32 ? 2 : 1;
constexpr int kDenseChannels = kRegisters == 32 ? 4 : 3;
constexpr int kDenseTaps = 3;

// What a tile runs over: some rows of convolution outputs. Place u of a row of the input is that of
// tap 0 at output u, of tap 1 at output u - 1, and so on; places outside [begin, end) are padding.
template <typename T>
struct DenseRows {
  const T* input;  // of the first row and channel, place `begin`
  int64_t input_row, input_channel, input_place;
  int64_t begin, end;
  const T* gradient;  // of the first row and channel, output 0
  int64_t gradient_row, gradient_pixel;
  int64_t rows, width;
};

// Adds to sums[channel][tap][vector], with strides of channels and taps, the products of all
// outputs with pixels of the input; with padding there are none, not even zeros.
template <typename T, int V, int J, int K>
FUSEDCNN_NOINLINE void add_dense_rows(const DenseRows<T>& of, T* sums, int64_t sum_channel,
                                      int64_t sum_tap) {
  constexpr int kN = kLanes<T>;
  Vector<T> sum[J * K * V];
  FUSEDCNN_UNROLL
  for (int i = 0; i < J * K * V; ++i) sum[i] = Vector<T>{};
  const int64_t pixel = of.gradient_pixel, place = of.input_place, channel = of.input_channel;
  // Where all taps have an output.
  const int64_t inner = larger<int64_t>(of.begin, K - 1), inner_end = smaller(of.end, of.width);
  for (int64_t row = 0; row < of.rows; ++row) {
    const T* x = of.input + row * of.input_row;
    const T* g = of.gradient + row * of.gradient_row + of.begin * pixel;
    for (int64_t u = of.begin; u < of.end; ++u, x += place, g += pixel) {
      if (u == inner && u + K <= inner_end) {
        Vector<T> ring[K * V];  // the gradient of output u + i is in place i % K
        FUSEDCNN_UNROLL
        for (int i = V; i < K * V; ++i) ring[i] = load(g - (K - i / V) * pixel + i % V * kN);
        do {
          FUSEDCNN_UNROLL
          for (int i = 0; i < K; ++i, x += place, g += pixel) {
            FUSEDCNN_UNROLL
            for (int v = 0; v < V; ++v) {
              ring[i * V + v] = load(g + v * kN);
              keep(ring[i * V + v]);
            }
            FUSEDCNN_UNROLL
            for (int j = 0; j < J; ++j) {
              Vector<T> value = broadcast(x[j * channel]);
              keep(value);
              FUSEDCNN_UNROLL
              for (int t = 0; t < K; ++t) {
                FUSEDCNN_UNROLL
                for (int v = 0; v < V; ++v) {
                  sum[(j * K + t) * V + v] += ring[(i - t + K) % K * V + v] * value;
                }
              }
            }
          }
          u += K;
        } while (u + K <= inner_end);
        if (u == of.end) break;
      }
      FUSEDCNN_UNROLL
      for (int t = 0; t < K; ++t) {
        if (u < t || u - t >= of.width) continue;
        FUSEDCNN_UNROLL
        for (int v = 0; v < V; ++v) {
          Vector<T> value = load(g - t * pixel + v * kN);
          keep(value);
          FUSEDCNN_UNROLL
          for (int j = 0; j < J; ++j) sum[(j * K + t) * V + v] += value * broadcast(x[j * channel]);
        }
      }
    }
  }
  FUSEDCNN_UNROLL
  for (int i = 0; i < J * K * V; ++i) {
    T* to = sums + i / V / K * sum_channel + i / V % K * sum_tap + i % V * kN;
    store(to, load(to) + sum[i]);
  }
}

// body.template operator()<n>(), for n from 1 to N.
template <int N, typename Body>
FUSEDCNN_INLINE void with_constant(int64_t n, const Body& body) {
  if constexpr (N > 1) {
    if (n < N) return with_constant<N - 1>(n, body);
  }
  body.template operator()<N>();
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
