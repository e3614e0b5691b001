// Selection by the clock: fusedcnn.backends.benchmark.
#pragma once

#include <functional>

#include "cpu/kernel.h"

namespace fusedcnn {

// The quickest of the kernels that cover the problem: measured at its first call with these
// numbers of threads, looked up afterwards. run(kernel) computes the pass into its results. A
// kernel that fails, for want of memory say, is out; where all do, throws what the last one threw.
const cpu::Kernel& quickest(Pass pass, const Problem& problem,
                            const std::function<void(const cpu::Kernel&)>& run);

}  // namespace fusedcnn
