// grad_weight kernels where every output of a convolution has a gradient: see Problem::dense.
#pragma once

#include "backend.h"

namespace selftest {

// All cases without their pool, types and layouts of the input, into memory that is overwritten or
// added to; what is not finite, rounding, and the same bits whatever the way.
void test_dense_gradients(const Backend& backend, bool quick);

}  // namespace selftest
