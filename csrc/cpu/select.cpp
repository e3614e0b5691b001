#include "cpu/select.h"

#include <atomic>
#include <stdexcept>

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
  const char* kernel_name = nullptr;
  std::string isa_names, kernel_names;
  for (const Isa& entry : isas()) {
    isa_names += std::string(isa_names.empty() ? "" : ", ") + entry.name;
    if (isa == entry.name) isa_entry = &entry;
    for (int i = 0; i < entry.list.count; ++i) {
      if (kernel == entry.list.kernels[i].name) kernel_name = entry.list.kernels[i].name;
      // One name serves several passes and ISAs.
      const std::string listed = std::string(", ") + entry.list.kernels[i].name;
      if (kernel_names.find(listed) == std::string::npos) kernel_names += listed;
    }
  }
  if (!isa.empty() && !isa_entry) {
    throw std::invalid_argument("isa: expected one of " + isa_names + ", got '" + isa + "'");
  }
  if (isa_entry && !isa_entry->supported) {
    throw std::invalid_argument("isa: this machine cannot run '" + isa + "'");
  }
  if (!kernel.empty() && !kernel_name) {
    throw std::invalid_argument("kernel: expected one of " + kernel_names.substr(2) + ", got '" +
                                kernel + "'");
  }
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
  const KernelList list = selected_isa().list;
  const char* forced = forced_kernel_name.load(std::memory_order_acquire);
  if (reason) reason->clear();
  for (int i = 0; i < list.count; ++i) {
    const Kernel& kernel = list.kernels[i];
    if (kernel.pass != pass || (forced && std::string(forced) != kernel.name)) continue;
    const bool ruled_out = kernel.winograd && !forced && !winograd_allowed();
    const char* why_not = ruled_out ? "Winograd is switched off" : kernel.why_not(problem);
    if (!why_not) {
      last_selected_name[static_cast<int>(pass)].store(kernel.name, std::memory_order_relaxed);
      return &kernel;
    }
    if (reason) *reason += std::string(reason->empty() ? "" : "; ") + kernel.name + ": " + why_not;
  }
  if (reason && reason->empty()) {
    *reason = std::string("no ") + name(pass) + " kernel" +
              (forced ? std::string(" named ") + forced : std::string());
  }
  return nullptr;
}

}  // namespace fusedcnn::cpu
