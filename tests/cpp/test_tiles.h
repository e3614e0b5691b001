// The products of tiles: the machine's instructions against their emulation, and kernels on it.
#pragma once

#include <vector>

#include "cpu/select.h"

namespace selftest {

// Where `isa` is a feature that multiplies tiles: its instructions give what the emulation gives,
// bit for bit, whatever the operands.
void test_tile_products(const fusedcnn::cpu::Isa& isa);

// The features' kernels on the emulation; empty where they are not compiled in.
std::vector<fusedcnn::cpu::Isa> emulated_isas();

}  // namespace selftest
