// The matrix instructions of csrc/cuda/device.h, from the fragment layouts that the PTX manual
// gives (sections "Matrix Fragments for mma.m16n8k4", "k8", "k16" and "ldmatrix").
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_on_cpu/machine.h"

namespace fusedcnn::cuda {

// The hardware ignores the low 13 bits of a tf32 operand: forgetting to round shows as truncation.
inline float tf32_operand(uint32_t bits) { return float_of(bits & 0xffffe000); }

// What a lane hands in, and gets back.
template <int A, int B>
struct MmaOperands {
  uint32_t a[A];
  uint32_t b[B];
  float c[4];  // and d
};

// d = a b + c by the last lane to arrive. `Kind` says where a register's elements belong:
// Kind::kDepth and Kind::place(lane, operands, a, b), which fills a[16][kDepth] and b[kDepth][8].
template <typename Kind, int A, int B>
void mma_complete(unsigned char* values) {
  float a[16][Kind::kDepth], b[Kind::kDepth][8];
  MmaOperands<A, B> lanes[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    std::memcpy(&lanes[lane], values + lane * cuda_on_cpu::kLaneBytes, sizeof lanes[lane]);
    Kind::place(lane, lanes[lane], a, b);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? group : group + 8, col = in_group * 2 + (i & 1);
      float sum = lanes[lane].c[i];
      for (int k = 0; k < Kind::kDepth; ++k) sum += a[row][k] * b[k][col];
      lanes[lane].c[i] = sum;
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    std::memcpy(values + lane * cuda_on_cpu::kLaneBytes, &lanes[lane], sizeof lanes[lane]);
  }
}

template <typename Kind, int A, int B>
void mma(int operation, cuda_on_cpu::Site site, float (&d)[4], const uint32_t (&a)[A],
         const uint32_t (&b)[B], const float (&c)[4]) {
  MmaOperands<A, B> mine;
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  std::memcpy(mine.c, c, sizeof c);
  const unsigned char* const values =
      cuda_on_cpu::meet(operation, site, &mine, sizeof mine, mma_complete<Kind, A, B>);
  mine = lane_value<MmaOperands<A, B>>(values, cuda_on_cpu::current->lane);
  std::memcpy(d, mine.c, sizeof d);
}

struct Tf32K8 {
  static constexpr int kDepth = 8;
  static void place(int lane, const MmaOperands<4, 2>& in, float (&a)[16][8], float (&b)[8][8]) {
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = i == 0 || i == 2 ? group : group + 8;
      const int col = i < 2 ? in_group : in_group + 4;
      a[row][col] = tf32_operand(in.a[i]);
    }
    for (int i = 0; i < 2; ++i) b[i == 0 ? in_group : in_group + 4][group] = tf32_operand(in.b[i]);
  }
};
struct Tf32K4 {
  static constexpr int kDepth = 4;
  static void place(int lane, const MmaOperands<2, 1>& in, float (&a)[16][4], float (&b)[4][8]) {
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 2; ++i) a[i == 0 ? group : group + 8][in_group] = tf32_operand(in.a[i]);
    b[in_group][group] = tf32_operand(in.b[0]);
  }
};

// The 16-bit element `i` of a fragment, two to a register, the lower half first.
template <typename S, int N>
float half_operand(const uint32_t (&registers)[N], int i) {
  return widen(S{static_cast<uint16_t>(registers[i / 2] >> (i % 2 ? 16 : 0))});
}
template <typename S>
struct HalfK16 {
  static constexpr int kDepth = 16;
  static void place(int lane, const MmaOperands<4, 2>& in, float (&a)[16][16], float (&b)[16][8]) {
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = (i >= 0 && i < 2) || (i >= 4 && i < 6) ? group : group + 8;
      const int col = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      a[row][col] = half_operand<S>(in.a, i);
    }
    for (int i = 0; i < 4; ++i) {
      b[in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = half_operand<S>(in.b, i);
    }
  }
};
template <typename S>
struct HalfK8 {
  static constexpr int kDepth = 8;
  static void place(int lane, const MmaOperands<2, 1>& in, float (&a)[16][8], float (&b)[8][8]) {
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 4; ++i) {
      a[i < 2 ? group : group + 8][in_group * 2 + (i & 1)] = half_operand<S>(in.a, i);
    }
    for (int i = 0; i < 2; ++i) b[in_group * 2 + i][group] = half_operand<S>(in.b, i);
  }
};

inline void mma_tf32_k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                        const float (&c)[4], FUSEDCNN_SITE) {
  mma<Tf32K8>(10, {file, line}, d, a, b, c);
}
inline void mma_tf32_k4(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1],
                        const float (&c)[4], FUSEDCNN_SITE) {
  mma<Tf32K4>(11, {file, line}, d, a, b, c);
}
inline void mma_float16_k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                            const float (&c)[4], FUSEDCNN_SITE) {
  mma<HalfK16<Float16>>(12, {file, line}, d, a, b, c);
}
inline void mma_bfloat16_k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const float (&c)[4], FUSEDCNN_SITE) {
  mma<HalfK16<BFloat16>>(13, {file, line}, d, a, b, c);
}
inline void mma_float16_k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1],
                           const float (&c)[4], FUSEDCNN_SITE) {
  mma<HalfK8<Float16>>(14, {file, line}, d, a, b, c);
}
inline void mma_bfloat16_k8(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1],
                            const float (&c)[4], FUSEDCNN_SITE) {
  mma<HalfK8<BFloat16>>(15, {file, line}, d, a, b, c);
}

// Elements at (row, col) and (row2, col2) of matrix `number`, whose rows the lanes have named.
template <typename T>
uint32_t matrix_pair(const unsigned char* rows, int number, int row, int col, int row2, int col2) {
  const auto element = [&](int r, int c) {
    const Shared<T> at = lane_value<Shared<T>>(rows, 8 * number + r);
    const T* const data = at.checked(8, 16);
    cuda_on_cpu::note_read(*at.array(), at.at() + c);
    uint16_t bits;
    std::memcpy(&bits, data + c, sizeof bits);
    return static_cast<uint32_t>(bits);
  };
  return element(row, col) | element(row2, col2) << 16;
}
template <typename T>
void load_matrices(uint32_t (&r)[4], Shared<T> row, FUSEDCNN_SITE) {
  static_assert(sizeof(T) == 2);
  const unsigned char* const rows = cuda_on_cpu::meet(20, {file, line}, &row, sizeof row, nullptr);
  const int group = cuda_on_cpu::current->lane >> 2, in_group = cuda_on_cpu::current->lane % 4;
  for (int i = 0; i < 4; ++i) {
    r[i] = matrix_pair<T>(rows, i, group, 2 * in_group, group, 2 * in_group + 1);
  }
}
template <typename T>
void load_matrices_transposed(uint32_t (&r)[4], Shared<T> row, FUSEDCNN_SITE) {
  static_assert(sizeof(T) == 2);
  const unsigned char* const rows = cuda_on_cpu::meet(21, {file, line}, &row, sizeof row, nullptr);
  const int group = cuda_on_cpu::current->lane >> 2, in_group = cuda_on_cpu::current->lane % 4;
  for (int i = 0; i < 4; ++i) {
    r[i] = matrix_pair<T>(rows, i, 2 * in_group, group, 2 * in_group + 1, group);
  }
}

}  // namespace fusedcnn::cuda
