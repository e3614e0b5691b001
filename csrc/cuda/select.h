// Chooses a kernel per problem.
#pragma once

#include <initializer_list>
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

// Whether the operators measure which kernel is the quickest instead of asking `select` (default:
// no).
void benchmark(bool on);
bool benchmarking();

// A kernel and tf32 for this thread alone, before what holds for all; an empty name ends it.
void try_kernel(const std::string& kernel, bool allow_tf32);

// Architectures on which all kernels have run and been tested, in code compiled for them. An H200's
// until the forward kernels were rewritten.
constexpr std::initializer_list<int> kMeasured{};
bool measured(const Device& device);

// Says of each kernel, by its place in the list, why it must not run on device `index`, or null;
// and last of those that batch_norm.h declares. All null: they may. A null `refused` forgets.
void settle(int index, const char* const* refused);

// What was said, or null where all may run. Before, on an architecture that is not measured, only
// `library` may, and batch_norm.h's, unless FUSEDCNN_CUDA_CHECK=never is in the environment.
const char* const* refused_on(int index, const Device& device);

// The first kernel of the pass that serves, or null: `explain` says why not.
const Kernel* select(Pass pass, const Problem& problem, const Target& target);

// All kernels of the pass that may run, in order of preference: those, too, of which selection says
// that they are slower.
std::vector<const Kernel*> candidates(Pass pass, const Problem& problem, const Target& target);

// What selection says of every kernel of the pass, in its order.
std::vector<Verdict> explain(Pass pass, const Problem& problem, const Target& target);

}  // namespace fusedcnn::cuda
