#include "cuda/select.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>

#include "core/selection.h"

namespace fusedcnn::cuda {
namespace {

// Points into static names, so readers need no lock; null means "choose".
std::atomic<const char*> forced_name{nullptr};
std::atomic<bool> tf32_switch{false};
std::atomic<bool> benchmark_switch{false};

struct Trial {
  const char* kernel;  // null: none
  bool allow_tf32;
};
thread_local Trial trial{nullptr, false};

const char* forced() {
  return trial.kernel ? trial.kernel : forced_name.load(std::memory_order_acquire);
}

// Of devices, by their index; null: nobody has said anything. Beyond the last, nobody can.
constexpr int kMostDevices = 64;
std::atomic<const char* const*> settled[kMostDevices] = {};

// Until somebody has: `library` and the kernels around it, which stand last, may run.
const char* const* unchecked() {
  static const std::vector<const char*> refused = [] {
    std::vector<const char*> all(static_cast<size_t>(kernels().count) + 1, nullptr);
    for (int i = 0; i < kernels().count; ++i) {
      if (!kernels().kernels[i].library) all[i] = "it has not been checked on this GPU";
    }
    return all;
  }();
  return refused.data();
}

}  // namespace

void force(const std::string& kernel) {
  forced_name.store(listed_name<KernelList>({kernels()}, kernel), std::memory_order_release);
}

std::string forced_kernel() {
  const char* const name = forced();
  return name ? name : "";
}

void allow_tf32(bool allowed) { tf32_switch.store(allowed, std::memory_order_relaxed); }

void benchmark(bool on) { benchmark_switch.store(on, std::memory_order_relaxed); }

bool benchmarking() { return benchmark_switch.load(std::memory_order_relaxed); }

bool tf32_allowed() {
  return trial.kernel ? trial.allow_tf32 : tf32_switch.load(std::memory_order_relaxed);
}

void try_kernel(const std::string& kernel, bool allow_tf32) {
  trial = {listed_name<KernelList>({kernels()}, kernel), allow_tf32};
}

bool measured(const Device& device) {
  for (const int architecture : kMeasured) {
    if (device.capability == architecture) return device.code == architecture;
  }
  return false;
}

void settle(int index, const char* const* refused) {
  if (index < 0 || index >= kMostDevices) return;
  // Kept for ever: a call may be reading what is replaced.
  static std::mutex mutex;
  static std::deque<std::string> texts;
  static std::deque<std::vector<const char*>> tables;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!refused) return settled[index].store(nullptr, std::memory_order_release);
  std::vector<const char*>& table = tables.emplace_back();
  for (int i = 0; i <= kernels().count; ++i) {
    table.push_back(refused[i] ? texts.emplace_back(refused[i]).c_str() : nullptr);
  }
  settled[index].store(table.data(), std::memory_order_release);
}

const char* const* refused_on(int index, const Device& device) {
  static const bool never = [] {
    const char* const value = std::getenv("FUSEDCNN_CUDA_CHECK");
    return value && std::strcmp(value, "never") == 0;
  }();
  const bool known = index >= 0 && index < kMostDevices;
  const char* const* const said = known ? settled[index].load(std::memory_order_acquire) : nullptr;
  return said || never || measured(device) ? said : unchecked();
}

namespace {

// Why the kernel must not run, or null. What was refused may where it is forced.
const char* why_never(const Kernel& kernel, const Problem& problem, const Target& target) {
  const char* const because = kernel.why_not(problem, target);
  if (because || forced() || !target.refused) return because;
  return target.refused[&kernel - kernels().kernels];
}

auto why_not(const Problem& problem, const Target& target) {
  return [&, choose = !forced()](const Kernel& kernel) {
    const char* const because = why_never(kernel, problem, target);
    if (because || !choose || !kernel.why_slower) return because;
    return kernel.why_slower(problem, target);
  };
}

}  // namespace

std::vector<const Kernel*> candidates(Pass pass, const Problem& problem, const Target& target) {
  std::vector<const Kernel*> found;
  for (int i = 0; i < kernels().count; ++i) {
    const Kernel& kernel = kernels().kernels[i];
    if (kernel.pass == pass && !why_never(kernel, problem, target)) found.push_back(&kernel);
  }
  return found;
}

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
