// Forward kernels that write the moments of all convolution outputs.
#pragma once

#include "backend.h"

namespace selftest {

// Exact ones of small integers, also far from zero; of floats near 1e4, as good as a sum in double
// of the kernel's own outputs; where something is not finite; the same bits whatever the way.
void test_moments(const Backend& backend);

}  // namespace selftest
