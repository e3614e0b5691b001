// The CUDA kernels, run by the machine of machine.h in several orders of threads and blocks.
#pragma once

#include "backend.h"

namespace selftest {

Backend cuda_backend(bool allow_tf32 = true);

}  // namespace selftest
