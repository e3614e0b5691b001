// What conversions_isa.cpp offers of one ISA.
#pragma once

#include <cstdint>

namespace selftest {

struct Conversions {
  void (*widen_bfloat16)(const uint16_t* from, float* to, int64_t count);
  void (*narrow_bfloat16)(const float* from, uint16_t* to, int64_t count);
  void (*widen_float16)(const uint16_t* from, float* to, int64_t count);
  void (*narrow_float16)(const float* from, uint16_t* to, int64_t count);
};

}  // namespace selftest
