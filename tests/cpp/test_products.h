// Tests of float32 kernels that multiply by other means than float's own products.
#pragma once

#include "backend.h"

namespace selftest {

// Forward kernels in float32 give float's results: its accuracy at every magnitude, and infinity
// and NaN exactly where float has them. `tf32`: kernels of this name round operands and are left
// out.
void test_float32_products(const Backend& backend, const char* tf32);

// Kernels named `tf32` round float32 operands to the nearest tf32 number, and nothing else.
void test_tf32_rounding(const Backend& backend, const char* tf32);

}  // namespace selftest
