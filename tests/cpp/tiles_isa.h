// What tiles_isa.cpp offers of one feature.
#pragma once

#include <cstdint>

namespace selftest {

// c [16][16] += a [16][32] x b [16 pairs][16][2], by the feature's instructions and by what their
// manual says that they do.
struct TileProducts {
  void (*machine)(const uint16_t* a, const uint16_t* b, float* c);
  void (*emulation)(const uint16_t* a, const uint16_t* b, float* c);
};

}  // namespace selftest
