// Forward kernels that can leave ReLU out, as batch normalisation needs them.
#pragma once

#include "backend.h"

namespace selftest {

// All cases, types, codes and layouts, with and without a code; NaN and infinities.
void test_without_relu(const Backend& backend, bool quick);

}  // namespace selftest
