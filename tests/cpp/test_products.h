// Tests of float32 kernels that multiply by other means than float's own products.
#pragma once

#include "backend.h"

namespace selftest {

// Forward kernels in float32, but for those that round to tf32, give float's results: its accuracy
// at every magnitude, and infinity and NaN exactly where float has them.
void test_float32_products(const Backend& backend);

// Kernels that round float32 operands to the nearest tf32 number do nothing else to them.
void test_tf32_rounding(const Backend& backend);

}  // namespace selftest
