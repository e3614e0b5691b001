#include "test_tiles.h"

#include <cmath>
#include <cstring>
#include <string>

#include "check.h"
#include "operands.h"
#include "tiles_isa.h"

namespace fusedcnn::cpu {
#define X(isa)                            \
  namespace isa {                         \
  selftest::TileProducts tile_products(); \
  }
FUSEDCNN_FEATURE_LIST
#undef X
#if defined(FUSEDCNN_EMULATED_TILES)
namespace emulated_tiles {
const KernelList& kernels();
}
#endif
}  // namespace fusedcnn::cpu

namespace selftest {
namespace {

TileProducts tile_products_of([[maybe_unused]] const std::string& isa) {
#define X(name) \
  if (isa == #name) return fusedcnn::cpu::name::tile_products();
  FUSEDCNN_FEATURE_LIST
#undef X
  return {};
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

void test_tile_products(const fusedcnn::cpu::Isa& isa) {
  const TileProducts products = tile_products_of(isa.name);
  if (!products.machine) return;
  struct Data {
    const char* name;
    uint32_t lowest, exponents;  // of the exponent, biased
  };
  // Products of numbers near 2^-63 are denormal or nearly so.
  constexpr Data kData[] = {
      {"any bits", 0, 256}, {"near 1", 120, 10}, {"denormal", 0, 3}, {"tiny products", 58, 10}};
  Random random(3);
  for (const Data& data : kData) {
    const auto number = [&] {
      const auto exponent =
          static_cast<uint32_t>(random.integer(data.lowest, data.lowest + data.exponents - 1));
      const auto rest = static_cast<uint32_t>(random.integer(0, 255));  // sign and mantissa
      return static_cast<uint16_t>((rest & 0x80) << 8 | exponent << 7 | (rest & 0x7f));
    };
    int wrong = 0;
    for (int trial = 0; trial < 200; ++trial) {
      uint16_t a[16 * 32], b[16 * 32];
      float machine[16 * 16], emulation[16 * 16];
      for (uint16_t& bits : a) bits = number();
      for (uint16_t& bits : b) bits = number();
      for (int i = 0; i < 256; ++i) {
        const auto low = static_cast<uint32_t>(random.integer(0, 0xffff));
        machine[i] = emulation[i] = trial % 4 ? float_of(uint32_t{number()} << 16 | low) : 0;
      }
      products.machine(a, b, machine);
      products.emulation(a, b, emulation);
      for (int i = 0; i < 256; ++i) {
        const bool nan = std::isnan(machine[i]) && std::isnan(emulation[i]);
        wrong += !nan && std::memcmp(&machine[i], &emulation[i], sizeof(float)) != 0;
      }
    }
    check(wrong == 0, std::string(isa.name) + " products of tiles, " + data.name + ": " +
                          std::to_string(wrong) + " sums differ from the emulation's");
  }
}

std::vector<fusedcnn::cpu::Isa> emulated_isas() {
#if defined(FUSEDCNN_EMULATED_TILES)
  for (const fusedcnn::cpu::Isa& isa : fusedcnn::cpu::isas()) {
    if (std::string(isa.name) != "avx512") continue;
    return {{"emulated_tiles", isa.supported, fusedcnn::cpu::emulated_tiles::kernels(), &isa}};
  }
#endif
  return {};
}

}  // namespace selftest
