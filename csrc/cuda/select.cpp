#include "cuda/select.h"

#include <atomic>

#include "core/selection.h"

namespace fusedcnn::cuda {
namespace {

// Points into static names, so readers need no lock; null means "choose".
std::atomic<const char*> forced_name{nullptr};
std::atomic<bool> tf32_switch{false};

}  // namespace

void force(const std::string& kernel) {
  forced_name.store(listed_name<KernelList>({kernels()}, kernel), std::memory_order_release);
}

std::string forced_kernel() {
  const char* forced = forced_name.load(std::memory_order_acquire);
  return forced ? forced : "";
}

void allow_tf32(bool allowed) { tf32_switch.store(allowed, std::memory_order_relaxed); }

bool tf32_allowed() { return tf32_switch.load(std::memory_order_relaxed); }

const Kernel* select(Pass pass, const Problem& problem, const Target& target, std::string* reason) {
  const char* const forced = forced_name.load(std::memory_order_acquire);
  const auto why_not = [&](const Kernel& kernel) {
    const char* const because = kernel.why_not(problem, target);
    return because || forced || !kernel.why_slower ? because : kernel.why_slower(problem, target);
  };
  return first_covering(kernels(), pass, forced, why_not, reason);
}

}  // namespace fusedcnn::cuda
