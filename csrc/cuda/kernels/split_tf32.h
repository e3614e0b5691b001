// float32 products on tensor cores by three tf32 products, for forward_tensor_cores.h.
//
// An operand x is split into hi, x rounded to tf32, and low = x - hi, which is exact. Of low, a
// product takes the leading eleven bits. Per step of K the three products low * hi, hi * low and
// hi * hi are chained in this order, the small ones first, from a sum of zero; the result is added
// to the accumulator in plain float. So no more than 24 products meet inside matrix instructions,
// where additions truncate, and an output's chain of float additions is an eighth as long as on
// CUDA cores: 9 for every eight channels (64 or fewer up to 56 channels).
//
// Errors, with x in [2^e, 2^(e + 1)): |low| <= 2^(e - 11) is a multiple of 2^(e - 23), so that its
// leading eleven bits miss 2^(e - 23) <= 2^-23 |x| at most; with the product of both lows, which is
// left out, each product of operands errs by at most 2^-22 + 2 * 2^-23 = 2^-21 of itself. On top
// come the matrix instructions' sums, whose rounding is not specified (on a CPU, truncating every
// term to 24 bits of the largest changed little), and 9 C / 8 float additions of relative error
// 2^-24. Parts under 2^-136 are lost: that adds 2^-136 (|x| + |w|) per product, 2^-86 at most. It
// supposes that the hardware keeps subnormal tf32 numbers, which only a GPU can show.
//
// What could differ from float's result is not computed so: inf - inf, inf * 0 where a part is
// zero, rounding to tf32 beyond the largest float, and hi * hi beyond it where x * w is not. All
// need an operand that is not finite or of 2^49 or more. (Two smaller ones make products under
// 2^98, and sums of up to 2^28 of them, which is as many as there may be, stay under 2^127.) Such
// operands are found while splitting. All threads of the block then multiply that slice of channels
// in plain float, from hi + low, which is x itself to the last bit.
#pragma once

#include <cstring>

#include "cuda/kernels/mma.h"
#include "cuda/kernels/sizes.h"

namespace fusedcnn::cuda {
namespace {

FUSEDCNN_DEVICE uint32_t bits_from(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Infinite, NaN, or 2^49 or more.
FUSEDCNN_DEVICE bool extreme(float value) {
  constexpr uint32_t kLargest = (127 + 49) << 23;
  return (bits_from(value) & 0x7fffffff) >= kLargest;
}

// Bits of two floats with hi + low == the value; an extreme value is hi alone.
struct SplitFloat {
  uint32_t hi, low;
};
FUSEDCNN_DEVICE SplitFloat split_float(float value) {
  if (extreme(value)) return {bits_from(value), 0};
  const uint32_t hi = to_tf32(value);
  return {hi, bits_from(value - float_from(hi))};
}

// The tf32 number of a float's leading bits.
FUSEDCNN_DEVICE uint32_t truncated_tf32(uint32_t bits) { return bits & 0xffffe000; }

// acc += a b for both rows of pixels and all tiles of M, three products each. `a` and `b` are hi
// parts, `a_low` and `b_low` leading bits of low parts.
template <int MTiles>
FUSEDCNN_DEVICE void multiply_split(float (&acc)[MTiles][2][4], const uint32_t (&a)[MTiles][4],
                                    const uint32_t (&a_low)[MTiles][4], const uint32_t (&b)[2][2],
                                    const uint32_t (&b_low)[2][2]) {
  float sum[MTiles][2][4];
  FUSEDCNN_UNROLL
  for (int i = 0; i < MTiles * 8; ++i) sum[i / 8][i / 4 % 2][i % 4] = 0;
  // A product at a time for all sums: none waits for the one before.
  FUSEDCNN_UNROLL
  for (int product = 0; product < 3; ++product) {
    FUSEDCNN_UNROLL
    for (int i = 0; i < 2 * MTiles; ++i) {
      const int m = i / 2, dy = i % 2;
      mma_tf32_k8(sum[m][dy], product == 0 ? a_low[m] : a[m], product == 1 ? b_low[dy] : b[dy],
                  sum[m][dy]);
    }
  }
  FUSEDCNN_UNROLL
  for (int i = 0; i < MTiles * 8; ++i) acc[i / 8][i / 4 % 2][i % 4] += sum[i / 8][i / 4 % 2][i % 4];
}

// What the steps of one slice compute, in plain float: for a slice with extreme operands. Tile is
// an MmaTile; `place`: this thread's upper left pixel of plane 0, tap 0.
template <typename Tile>
FUSEDCNN_DEVICE void multiply_plainly(Shared<uint32_t> stage, Shared<uint32_t> stage_low, int place,
                                      Shared<uint32_t> fragments, Shared<uint32_t> fragments_low,
                                      float (&acc)[4][Tile::kMTiles][2][4]) {
  const int g = thread_index() % kWarp / 4;
  FUSEDCNN_NO_UNROLL
  for (int k = 0; k < 9 * Tile::kPlanes; ++k) {
    const int tap = k / Tile::kPlanes, plane = k % Tile::kPlanes;
    const int pixel = place + plane * Tile::kPlane + tap / 3 * Tile::kPitch + tap % 3;
    // The lane that holds column `plane` of rows g and g + 8, and its register for row g.
    const int word = (tap * Tile::kMTiles * kWarp + 4 * g + plane % 4) * 4 + plane / 4 * 2;
    float weights[2 * Tile::kMTiles];
    FUSEDCNN_UNROLL
    for (int row = 0; row < 2 * Tile::kMTiles; ++row) {
      const int at = word + row / 2 * kWarp * 4 + row % 2;
      weights[row] = float_from(fragments[at]) + float_from(fragments_low[at]);
    }
    FUSEDCNN_UNROLL
    for (int i = 0; i < 16; ++i) {
      const int j = i / 4, dy = i / 2 % 2, dx = i % 2;
      const int at = pixel + dy * Tile::kPitch + 2 * j + dx;
      const float value = float_from(stage[at]) + float_from(stage_low[at]);
      FUSEDCNN_UNROLL
      for (int row = 0; row < 2 * Tile::kMTiles; ++row) {
        float& sum = acc[j][row / 2][dy][row % 2 * 2 + dx];
        sum = multiply_add(weights[row], value, sum);
      }
    }
  }
}

}  // namespace
}  // namespace fusedcnn::cuda
