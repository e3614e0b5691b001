// The machine's own limit: how fast one core multiplies and adds in this ISA.
#pragma once

#include <time.h>

#include "cpu/kernels/simd.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

FUSEDCNN_INLINE double seconds_now() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Billions of float32 operations a second in a loop of independent multiply-adds on registers; the
// best of several short runs, so that an interruption does not lower the limit.
double multiply_add_rate(double seconds) {
  // 2 ports x 4 cycles of latency need 8 chains; 12 fit into 16 registers with both factors.
  constexpr int kChains = 12;
  constexpr int64_t kRounds = 20000;
  const Vector<float> factor = broadcast(0.5f), term = broadcast(1.0f);
  double best = 0;
  const double end = seconds_now() + seconds;
  do {
    Vector<float> sum[kChains];
    FUSEDCNN_UNROLL
    for (int i = 0; i < kChains; ++i) sum[i] = broadcast(static_cast<float>(i));
    const double start = seconds_now();
    for (int64_t round = 0; round < kRounds; ++round) {
      FUSEDCNN_UNROLL
      for (int i = 0; i < kChains; ++i) sum[i] = sum[i] * factor + term;
    }
    Vector<float> total = sum[0];
    FUSEDCNN_UNROLL
    for (int i = 1; i < kChains; ++i) total += sum[i];
    asm volatile("" : : "m"(total));  // the sums are wanted, or the loop would be removed
    const double operations = 2.0 * kRounds * kChains * kLanes<float>;
    best = larger(best, operations / (seconds_now() - start) * 1e-9);
  } while (seconds_now() < end);
  return best;
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
