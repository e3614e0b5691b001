// One product of tiles, compiled once per feature like the kernels themselves.
#include "tiles_isa.h"

#include "cpu/kernels/tile_machine.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

void machine(const uint16_t* a, const uint16_t* b, float* c) {
  [[maybe_unused]] const TileMachine held(kTileDepth);
  const int64_t offset = 0;
  TileProduct product{};
  product.depth = kTileDepth;
  product.a_pitch = kTileDepth;
  product.offsets = &offset;
  product.chunks = 1;
  product.b = b;
  product.c_pitch = kTileLanes;
  product.c_step = 0;
  multiply_tiles(1, 1, product, &a, &c);
}

void emulation(const uint16_t* a, const uint16_t* b, float* c) {
#if defined(__AMX_BF16__)
  emulated_tdpbf16ps(kTileDepth, a, kTileDepth, b, c, kTileLanes);
#else
  for (int i = 0; i < kTileRows; ++i) {
    __m512 sum = _mm512_loadu_ps(c + i * kTileLanes);
    for (int k = 0; k < kTileDepth; k += 2) {
      int32_t pair;
      memcpy(&pair, a + i * kTileDepth + k, sizeof pair);
      sum =
          emulated_vdpbf16ps(sum, _mm512_set1_epi32(pair), _mm512_loadu_si512(b + k * kTileLanes));
    }
    _mm512_storeu_ps(c + i * kTileLanes, sum);
  }
#endif
}

}  // namespace

selftest::TileProducts tile_products();

selftest::TileProducts tile_products() { return {machine, emulation}; }

}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
