#include "cpu/select.h"

#include <atomic>

#include "core/selection.h"

namespace fusedcnn::cpu {

// One accessor per ISA object, each defined in registry.cpp.
#define X(isa)          \
  namespace isa {       \
  KernelList kernels(); \
  }
FUSEDCNN_ISA_LIST
#undef X

namespace {

bool supported(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && supported("avx2");
  }
  if (isa == "avx2") {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("f16c");
  }
#endif
  return isa == "baseline";
}

// Forced choices; null means "choose". They point into static names, so readers need no lock.
std::atomic<const Isa*> forced_isa_entry{nullptr};
std::atomic<const char*> forced_kernel_name{nullptr};
std::atomic<bool> winograd_switch{true};

// By pass.
std::atomic<const char*> last_selected_name[3] = {};

}  // namespace

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = {
#define X(isa) Isa{#isa, supported(#isa), isa::kernels()},
      FUSEDCNN_ISA_LIST
#undef X
  };
  return all;
}

const Isa& selected_isa() {
  static const Isa* const widest = [] {
    for (const Isa& isa : isas()) {
      if (isa.supported) return &isa;
    }
    return &isas().back();
  }();
  const Isa* forced = forced_isa_entry.load(std::memory_order_acquire);
  return forced ? *forced : *widest;
}

void force(const std::string& isa, const std::string& kernel) {
  const Isa* isa_entry = nullptr;
  std::string isa_names;
  std::vector<KernelList> lists;
  for (const Isa& entry : isas()) {
    isa_names += std::string(isa_names.empty() ? "" : ", ") + entry.name;
    if (isa == entry.name) isa_entry = &entry;
    lists.push_back(entry.list);
  }
  if (!isa.empty() && !isa_entry) {
    throw std::invalid_argument("isa: expected one of " + isa_names + ", got '" + isa + "'");
  }
  if (isa_entry && !isa_entry->supported) {
    throw std::invalid_argument("isa: this machine cannot run '" + isa + "'");
  }
  const char* const kernel_name = listed_name(lists, kernel);
  forced_isa_entry.store(isa_entry, std::memory_order_release);
  forced_kernel_name.store(kernel_name, std::memory_order_release);
}

std::string forced_isa() {
  const Isa* forced = forced_isa_entry.load(std::memory_order_acquire);
  return forced ? forced->name : "";
}

std::string forced_kernel() {
  const char* forced = forced_kernel_name.load(std::memory_order_acquire);
  return forced ? forced : "";
}

void allow_winograd(bool allowed) { winograd_switch.store(allowed, std::memory_order_relaxed); }

bool winograd_allowed() { return winograd_switch.load(std::memory_order_relaxed); }

const char* last_selected(Pass pass) {
  return last_selected_name[static_cast<int>(pass)].load(std::memory_order_relaxed);
}

const Kernel* select(Pass pass, const Problem& problem, std::string* reason) {
  const char* const forced = forced_kernel_name.load(std::memory_order_acquire);
  const auto why_not = [&](const Kernel& kernel) {
    const bool ruled_out = kernel.winograd && !forced && !winograd_allowed();
    if (ruled_out) return "Winograd is switched off";
    const char* const because = kernel.why_not(problem);
    return because || forced || !kernel.why_slower ? because : kernel.why_slower(problem);
  };
  const Kernel* const kernel = first_covering(selected_isa().list, pass, forced, why_not, reason);
  if (kernel) {
    last_selected_name[static_cast<int>(pass)].store(kernel->name, std::memory_order_relaxed);
  }
  return kernel;
}

}  // namespace fusedcnn::cpu
