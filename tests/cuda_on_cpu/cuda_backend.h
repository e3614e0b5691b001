// The CUDA kernels, run by the machine of machine.h in several orders of threads and blocks.
#pragma once

#include "backend.h"
#include "test_batch_norm.h"
#include "test_transpose.h"

namespace selftest {

Backend cuda_backend(bool allow_tf32 = true);

NormBackend norm_backend();

TransposeBackend transpose_backend();

}  // namespace selftest
