#include "ops/measured.h"

#include <torch/csrc/stable/ops.h>

#include <chrono>
#include <exception>
#include <limits>
#include <mutex>
#include <string>
#include <unordered_map>

#include "cpu/select.h"
#include "ops/choice.h"

namespace fusedcnn {
namespace {

// The first run warms caches and derives weights; of the others the quickest counts, since
// whatever else the machine does only ever adds time.
constexpr int kRuns = 4;

double seconds(const std::function<void()>& run) {
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kRuns; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    run();
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
    if (i > 0 && time.count() < least) least = time.count();
  }
  return least;
}

}  // namespace

const cpu::Kernel& quickest(Pass pass, const Problem& problem,
                            const std::function<void(const cpu::Kernel&)>& run) {
  static std::mutex mutex;  // also: one measurement at a time
  static std::unordered_map<std::string, const cpu::Kernel*> winners;
  const std::string key = std::string(name(pass)) + " " + cpu::selected_isa().name + " " +
                          (cpu::winograd_allowed() ? "" : "exact ") +
                          std::to_string(torch::stable::get_num_threads()) + " " +
                          description(problem);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = winners.find(key);
  if (known != winners.end()) return *known->second;
  const cpu::Kernel* winner = nullptr;
  double least = std::numeric_limits<double>::infinity();
  std::exception_ptr error;
  for (const cpu::Kernel* const kernel : cpu::candidates(pass, problem)) {
    try {
      const double time = seconds([&] { run(*kernel); });
      if (time < least) {
        least = time;
        winner = kernel;
      }
    } catch (...) {
      error = std::current_exception();
    }
  }
  if (!winner) std::rethrow_exception(error);
  winners.emplace(key, winner);
  return *winner;
}

}  // namespace fusedcnn
