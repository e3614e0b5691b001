#include "cpu/select.h"

#include <atomic>

#include "core/selection.h"
#include "cpu/machine.h"

namespace fusedcnn::cpu {

// One accessor per ISA object, each defined in registry.cpp.
#define X(isa)                 \
  namespace isa {              \
  const KernelList& kernels(); \
  }
FUSEDCNN_FEATURE_LIST
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
  if (isa == "avx512_amx") return supported("avx512") && machine().amx_bf16;
  if (isa == "avx512_bf16") return supported("avx512") && machine().avx512_bf16;
#endif
  return isa == "baseline";
}

// Forced choices; null means "choose". They point into static names, so readers need no lock.
std::atomic<const Isa*> forced_isa_entry{nullptr};
std::atomic<const char*> forced_kernel_name{nullptr};
std::atomic<bool> winograd_switch{true};
std::atomic<bool> benchmark_switch{false};

// By pass.
std::atomic<const char*> last_chosen_name[3] = {};

}  // namespace

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> isas = {
#define X(isa) Isa{#isa, supported(#isa), isa::kernels(), nullptr},
        FUSEDCNN_FEATURE_LIST FUSEDCNN_ISA_LIST
#undef X
    };
    // A feature's name is its base's and one of its own.
    for (Isa& isa : isas) {
      const std::string name = isa.name;
      for (const Isa& base : isas) {
        if (name.rfind(std::string(base.name) + "_", 0) == 0) isa.base = &base;
      }
    }
    return isas;
  }();
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

void benchmark(bool enabled) { benchmark_switch.store(enabled, std::memory_order_relaxed); }

bool benchmarking() { return benchmark_switch.load(std::memory_order_relaxed); }

void chosen(Pass pass, const Kernel& kernel) {
  last_chosen_name[static_cast<int>(pass)].store(kernel.name, std::memory_order_relaxed);
}

const char* last_chosen(Pass pass) {
  return last_chosen_name[static_cast<int>(pass)].load(std::memory_order_relaxed);
}

namespace {

// Why a kernel cannot compute the problem, or null.
const char* why_never(const Kernel& kernel, const Problem& problem) {
  if (kernel.pass == Pass::kForward) {
    if (!problem.relu && !kernel.without_relu) return "only with ReLU";
    if (problem.moments && !kernel.moment_slots) return "without statistics";
  }
  return kernel.why_not(problem);
}

// Why a kernel does not serve, as far as switches and forced choices let it; null where it does.
auto why_not(const Problem& problem, const char* forced) {
  return [&problem, forced](const Kernel& kernel) {
    if (kernel.winograd && !forced && !winograd_allowed()) return "Winograd is switched off";
    const char* const because = why_never(kernel, problem);
    return because || forced || !kernel.why_slower ? because : kernel.why_slower(problem);
  };
}

}  // namespace

const Kernel* select(Pass pass, const Problem& problem) {
  const char* const forced = forced_kernel_name.load(std::memory_order_acquire);
  for (const Isa* isa = &selected_isa(); isa; isa = isa->base) {
    const Kernel* const kernel = first_serving(isa->list, pass, forced, why_not(problem, forced));
    if (kernel) return kernel;
  }
  return nullptr;
}

std::vector<Verdict> explain(Pass pass, const Problem& problem) {
  const char* const forced = forced_kernel_name.load(std::memory_order_acquire);
  std::vector<Verdict> verdicts;
  bool found = false;
  for (const Isa* isa = &selected_isa(); isa; isa = isa->base) {
    add_verdicts(isa->list, pass, forced, why_not(problem, forced), verdicts, found);
  }
  return verdicts;
}

std::vector<const Kernel*> candidates(Pass pass, const Problem& problem) {
  std::vector<const Kernel*> kernels;
  for (const Isa* isa = &selected_isa(); isa; isa = isa->base) {
    for (int i = 0; i < isa->list.count; ++i) {
      const Kernel& kernel = isa->list.kernels[i];
      const bool ruled_out = kernel.winograd && !winograd_allowed();
      if (kernel.pass == pass && !ruled_out && !why_never(kernel, problem)) {
        kernels.push_back(&kernel);
      }
    }
  }
  return kernels;
}

}  // namespace fusedcnn::cpu
