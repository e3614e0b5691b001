// Products of tiles: bfloat16 operands, float32 sums, 16 x 16 of them at a time.
//
//   C [16][16] floats  +=  A [16][32]  x  B [32][16],  B as pairs of rows: [16][16][2]
//
// By AMX (TDPBF16PS: 16 cycles of the tile unit, 16,384 operations), by avx512_bf16 (VDPBF16PS: the
// same in 256 instructions), or, for tests on machines with neither, by what the AMX instruction is
// defined to do (tile_emulation.h). All three take denormal numbers as zeros.
#pragma once

#include <immintrin.h>

#include "cpu/kernels/simd.h"
#include "cpu/kernels/tile_emulation.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

constexpr int kTileRows = 16;   // of A and C
constexpr int kTileDepth = 32;  // elements of a row of A
constexpr int kTileLanes = 16;  // columns of B and C
constexpr int kTileA = kTileRows * kTileDepth;
constexpr int kTileB = kTileDepth * kTileLanes;

// A sum of products over `chunks` of `depth`, 32 or less. Row i of an A tile begins at
//   a + offsets[chunk] + i * a_pitch
// where as many elements must be readable, and the B tiles of a chunk lie side by side, `b_step`
// elements after those of the chunk before. C's rows are c_pitch floats apart, and its tiles of
// neighbouring columns c_step. Sums begin with the row `start` of [tiles][16], the same for all
// rows of C, or with C where it is null.
struct TileProduct {
  int depth;  // even; what the TileMachine was made for
  int64_t a_pitch;
  const int64_t* offsets;
  int64_t chunks;
  const uint16_t* b;
  int64_t b_step;
  int64_t c_pitch;
  int64_t c_step;
  const float* start;
};

#if defined(FUSEDCNN_EMULATED_TILES)

struct TileMachine {
  explicit TileMachine(int, int = 0) {}

  template <int M, int N>
  static void multiply(const TileProduct& p, const uint16_t* const* a, float* const* c) {
    for (int t = 0; t < M * N; ++t) {
      float* const to = c[t / N] + t % N * p.c_step;
      for (int i = 0; p.start && i < kTileRows; ++i) {
        memcpy(to + i * p.c_pitch, p.start + t % N * kTileLanes, kTileLanes * sizeof(float));
      }
      for (int64_t k = 0; k < p.chunks; ++k) {
        emulated_tdpbf16ps(p.depth, a[t / N] + p.offsets[k], p.a_pitch,
                           p.b + k * p.b_step + t % N * kTileB, to, p.c_pitch);
      }
    }
  }
};

#elif defined(__AMX_BF16__)

// One task's hold on the thread's tile registers. They are given back at the end, as other users of
// them (oneDNN) do: the next one configures its own, and the kernel saves no tiles when it switches
// threads.
class TileMachine {
 public:
  // Shallow tiles of A cross fewer cache lines, and those of B have fewer rows. `rows`: of A and C,
  // if fewer than 16 are wanted; a product takes a cycle for each.
  explicit TileMachine(int depth, int rows = kTileRows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    for (int tile = 0; tile < 6; ++tile) config.rows[tile] = static_cast<uint8_t>(rows);
    config.bytes[4] = config.bytes[5] = static_cast<uint16_t>(depth * 2);
    config.rows[6] = config.rows[7] = static_cast<uint8_t>(depth / 2);
    asm volatile("" : : "m"(config));
    _tile_loadconfig(&config);
  }
  ~TileMachine() { _tile_release(); }
  TileMachine(const TileMachine&) = delete;
  TileMachine& operator=(const TileMachine&) = delete;

  // M x N tiles of C in tile registers m * 2 + n, A's in 4 and 5, B's in 6 and 7.
  template <int M, int N>
  static FUSEDCNN_NOINLINE void multiply(const TileProduct& p, const uint16_t* const* a,
                                         float* const* c) {
    // The compiler does not know that tile loads read memory.
    asm volatile("" : : : "memory");
    const int64_t c_bytes = p.c_pitch * int64_t{sizeof(float)}, a_bytes = p.a_pitch * 2;
    const float* const second = M > 1 ? c[M - 1] : c[0];
    if (p.start) {
      _tile_loadd(0, p.start, 0);
      if constexpr (N > 1) _tile_loadd(1, p.start + kTileLanes, 0);
      if constexpr (M > 1) _tile_loadd(2, p.start, 0);
      if constexpr (M > 1 && N > 1) _tile_loadd(3, p.start + kTileLanes, 0);
    } else {
      _tile_loadd(0, c[0], c_bytes);
      if constexpr (N > 1) _tile_loadd(1, c[0] + p.c_step, c_bytes);
      if constexpr (M > 1) _tile_loadd(2, second, c_bytes);
      if constexpr (M > 1 && N > 1) _tile_loadd(3, second + p.c_step, c_bytes);
    }
    const uint16_t* b = p.b;
    for (int64_t k = 0; k < p.chunks; ++k, b += p.b_step) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, a[0] + p.offsets[k], a_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (N > 1) {
        _tile_loadd(7, b + kTileB, 64);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (M > 1) {
        _tile_loadd(5, a[M - 1] + p.offsets[k], a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (N > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, c[0], c_bytes);
    if constexpr (N > 1) _tile_stored(1, c[0] + p.c_step, c_bytes);
    if constexpr (M > 1) _tile_stored(2, c[M - 1], c_bytes);
    if constexpr (M > 1 && N > 1) _tile_stored(3, c[M - 1] + p.c_step, c_bytes);
  }
};

#else

struct TileMachine {
  explicit TileMachine(int, int = 0) {}

  // One tile of C in 16 registers: a load of B and 16 broadcasts of a pair of A for 16 products.
  template <int M, int N>
  static FUSEDCNN_NOINLINE void multiply(const TileProduct& p, const uint16_t* const* a,
                                         float* const* c) {
    for (int t = 0; t < M * N; ++t) {
      float* const to = c[t / N] + t % N * p.c_step;
      __m512 sum[kTileRows];
      FUSEDCNN_UNROLL
      for (int i = 0; i < kTileRows; ++i) {
        sum[i] = _mm512_loadu_ps(p.start ? p.start + t % N * kTileLanes : to + i * p.c_pitch);
      }
      const uint16_t* b = p.b + t % N * kTileB;
      for (int64_t k = 0; k < p.chunks; ++k, b += p.b_step) {
        const uint16_t* pair = a[t / N] + p.offsets[k];
        for (int d = 0; d < p.depth; d += 2, pair += 2) {
          const __m512bh weights = (__m512bh)_mm512_loadu_si512(b + d * kTileLanes);
          FUSEDCNN_UNROLL
          for (int i = 0; i < kTileRows; ++i) {
            int32_t bits;
            memcpy(&bits, pair + i * p.a_pitch, sizeof bits);
            sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)_mm512_set1_epi32(bits), weights);
          }
        }
      }
      FUSEDCNN_UNROLL
      for (int i = 0; i < kTileRows; ++i) _mm512_storeu_ps(to + i * p.c_pitch, sum[i]);
    }
  }
};

#endif

// multiply<M, N> for numbers of tiles known at run time.
FUSEDCNN_INLINE void multiply_tiles(int64_t m, int64_t n, const TileProduct& product,
                                    const uint16_t* const* a, float* const* c) {
  if (m == 2) {
    n == 2 ? TileMachine::multiply<2, 2>(product, a, c)
           : TileMachine::multiply<2, 1>(product, a, c);
  } else {
    n == 2 ? TileMachine::multiply<1, 2>(product, a, c)
           : TileMachine::multiply<1, 1>(product, a, c);
  }
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
