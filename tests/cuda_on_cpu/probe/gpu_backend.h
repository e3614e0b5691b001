// The CUDA kernels on a GPU, each call on copies of its tensors in device memory.
#pragma once

#include <cstdint>

#include "backend.h"
#include "test_batch_norm.h"
#include "test_transpose.h"

namespace selftest {

// After so many seconds the kernels cover nothing more, and problems_left_out counts what they
// would have been asked for; 0: never.
Backend gpu_backend(double seconds);
int64_t problems_left_out();

NormBackend gpu_norm_backend();

TransposeBackend gpu_transpose_backend();

}  // namespace selftest
