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
  multiply_tiles(1, 1, product, &a, &c);
}

void emulation(const uint16_t* a, const uint16_t* b, float* c) {
#if defined(__AMX_BF16__)
  emulated_tdpbf16ps(kTileDepth, a, kTileDepth, b, c, kTileLanes);
#else
  for (int i = 0; i < kTileRows * kTileLanes; ++i) {
    for (int k = 0; k < kTileDepth; k += 2) {
      const uint16_t* row = a + i / kTileLanes * kTileDepth;
      c[i] = emulated_vdpbf16ps(c[i], row + k, b + k * kTileLanes + i % kTileLanes * 2);
    }
  }
#endif
}

}  // namespace

selftest::TileProducts tile_products();

selftest::TileProducts tile_products() { return {machine, emulation}; }

}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
