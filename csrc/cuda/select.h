// Chooses a kernel per problem.
#pragma once

#include <string>
#include <vector>

#include "core/selection.h"
#include "cuda/kernel.h"

namespace fusedcnn::cuda {

// For tests and benchmarks: use only kernels of this name from now on, in every thread; an empty
// string means "choose". Throws std::invalid_argument on a name that is not compiled in.
void force(const std::string& kernel);
std::string forced_kernel();

// Whether kernels may round float32 operands to tf32 (default: no).
void allow_tf32(bool allowed);
bool tf32_allowed();

// The first kernel of the pass that serves, or null: `explain` says why not.
const Kernel* select(Pass pass, const Problem& problem, const Target& target);

// What selection says of every kernel of the pass, in its order.
std::vector<Verdict> explain(Pass pass, const Problem& problem, const Target& target);

}  // namespace fusedcnn::cuda
