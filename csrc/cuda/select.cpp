#include "cuda/select.h"

#include <atomic>
#include <stdexcept>

namespace fusedcnn::cuda {
namespace {

// Points into static names, so readers need no lock; null means "choose".
std::atomic<const char*> forced_name{nullptr};
std::atomic<bool> tf32_switch{false};

}  // namespace

void force(const std::string& kernel) {
  const KernelList list = kernels();
  const char* found = nullptr;
  std::string names;
  for (int i = 0; i < list.count; ++i) {
    if (kernel == list.kernels[i].name) found = list.kernels[i].name;
    // One name serves several passes.
    const std::string listed = std::string(", ") + list.kernels[i].name;
    if ((names + ",").find(listed + ",") == std::string::npos) names += listed;
  }
  if (!kernel.empty() && !found) {
    throw std::invalid_argument("kernel: expected one of " + names.substr(2) + ", got '" + kernel +
                                "'");
  }
  forced_name.store(found, std::memory_order_release);
}

std::string forced_kernel() {
  const char* forced = forced_name.load(std::memory_order_acquire);
  return forced ? forced : "";
}

void allow_tf32(bool allowed) { tf32_switch.store(allowed, std::memory_order_relaxed); }

bool tf32_allowed() { return tf32_switch.load(std::memory_order_relaxed); }

const Kernel* select(Pass pass, const Problem& problem, const Target& target, std::string* reason) {
  const KernelList list = kernels();
  const char* forced = forced_name.load(std::memory_order_acquire);
  if (reason) reason->clear();
  for (int i = 0; i < list.count; ++i) {
    const Kernel& kernel = list.kernels[i];
    if (kernel.pass != pass || (forced && std::string(forced) != kernel.name)) continue;
    const char* why_not = kernel.why_not(problem, target);
    if (!why_not) return &kernel;
    if (reason) *reason += std::string(reason->empty() ? "" : "; ") + kernel.name + ": " + why_not;
  }
  if (reason && reason->empty()) {
    *reason = std::string("no ") + name(pass) + " kernel" +
              (forced ? std::string(" named ") + forced : std::string());
  }
  return nullptr;
}

}  // namespace fusedcnn::cuda
