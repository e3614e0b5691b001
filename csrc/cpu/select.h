// Chooses the ISA once per process and a kernel per problem.
#pragma once

#include <string>
#include <vector>

#include "core/selection.h"
#include "cpu/kernel.h"

#if defined(__GNUC__)
#define FUSEDCNN_EXPORT __attribute__((visibility("default")))
#endif

namespace fusedcnn::cpu {

struct Isa {
  const char* name;
  bool supported;  // by this machine
  KernelList list;
  // Null, or the ISA whose kernels serve what none of this list covers: then this one is a feature
  // beside it, with a few kernels of its own.
  const Isa* base;

  // The ISA that has everything besides kernels, which a feature leaves to its base.
  const Isa& whole() const { return base ? *base : *this; }
};

// All ISAs compiled in, widest first, and a feature before its base.
FUSEDCNN_EXPORT const std::vector<Isa>& isas();

// The ISA in use: the forced one, else the widest supported.
FUSEDCNN_EXPORT const Isa& selected_isa();

// For tests and benchmarks: use only this ISA and only kernels of this name from now on, in every
// thread; an empty string means "choose". Throws std::invalid_argument on a name that is not
// compiled in or an ISA that this machine lacks.
FUSEDCNN_EXPORT void force(const std::string& isa, const std::string& kernel);
FUSEDCNN_EXPORT std::string forced_isa();
FUSEDCNN_EXPORT std::string forced_kernel();

// Whether selection may choose Winograd kernels (default: yes); a forced kernel runs regardless.
FUSEDCNN_EXPORT void allow_winograd(bool allowed);
FUSEDCNN_EXPORT bool winograd_allowed();

// Whether the operators measure which kernel is the quickest instead of asking `select` (default:
// no); a forced kernel runs regardless.
FUSEDCNN_EXPORT void benchmark(bool enabled);
FUSEDCNN_EXPORT bool benchmarking();

// The first kernel of the pass that serves, or null: `explain` says why not.
const Kernel* select(Pass pass, const Problem& problem);

// What selection says of every kernel of the pass, in its order.
std::vector<Verdict> explain(Pass pass, const Problem& problem);

// The kernels that could serve, however fast they are, in the list's order.
std::vector<const Kernel*> candidates(Pass pass, const Problem& problem);

// Tells benchmarks and tests what ran: the name of the kernel of the latest call of `chosen` for
// this pass, in any thread, or null where there was none yet.
void chosen(Pass pass, const Kernel& kernel);
FUSEDCNN_EXPORT const char* last_chosen(Pass pass);

}  // namespace fusedcnn::cpu
