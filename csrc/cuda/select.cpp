#include "cuda/select.h"

#include <atomic>

#include "core/selection.h"

namespace fusedcnn::cuda {
namespace {

// Points into static names, so readers need no lock; null means "choose".
std::atomic<const char*> forced_name{nullptr};
std::atomic<bool> tf32_switch{false};

const char* forced() { return forced_name.load(std::memory_order_acquire); }

}  // namespace

void force(const std::string& kernel) {
  forced_name.store(listed_name<KernelList>({kernels()}, kernel), std::memory_order_release);
}

std::string forced_kernel() {
  const char* const name = forced();
  return name ? name : "";
}

void allow_tf32(bool allowed) { tf32_switch.store(allowed, std::memory_order_relaxed); }

bool tf32_allowed() { return tf32_switch.load(std::memory_order_relaxed); }

namespace {

auto why_not(const Problem& problem, const Target& target) {
  return [&, choose = !forced()](const Kernel& kernel) {
    const char* const because = kernel.why_not(problem, target);
    return because || !choose || !kernel.why_slower ? because : kernel.why_slower(problem, target);
  };
}

}  // namespace

const Kernel* select(Pass pass, const Problem& problem, const Target& target) {
  return first_serving(kernels(), pass, forced(), why_not(problem, target));
}

std::vector<Verdict> explain(Pass pass, const Problem& problem, const Target& target) {
  std::vector<Verdict> verdicts;
  bool found = false;
  add_verdicts(kernels(), pass, forced(), why_not(problem, target), verdicts, found);
  return verdicts;
}

}  // namespace fusedcnn::cuda
