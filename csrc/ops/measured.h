// Selection by the clock: fusedcnn.backends.benchmark, and on CUDA torch.backends.cudnn.benchmark.
#pragma once

#include <exception>
#include <functional>
#include <limits>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace fusedcnn {

// The quickest kernels of a backend, each found out once for its key.
template <typename Kernel>
class Winners {
 public:
  // Of the candidates, of which there is at least one, whose names belong to the key; null where
  // that is not known yet and nothing may be measured. seconds(kernel) computes a pass with it and
  // says how long that took. A kernel that fails, for want of memory say, is out; where all do,
  // throws what the first one threw. Threads that ask at the same time may measure the same: none
  // waits for another, which may be waiting for it.
  const Kernel* quickest(std::string key, const std::vector<const Kernel*>& candidates,
                         bool may_measure, const std::function<double(const Kernel&)>& seconds) {
    if (candidates.size() == 1) return candidates[0];
    for (const Kernel* const kernel : candidates) key += std::string(" ") + kernel->name;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto known = winners_.find(key);
      if (known != winners_.end()) return known->second;
    }
    if (!may_measure) return nullptr;
    const Kernel* winner = nullptr;
    double least = std::numeric_limits<double>::infinity();
    std::exception_ptr error;
    for (const Kernel* const kernel : candidates) {
      try {
        const double time = seconds(*kernel);
        if (!winner || time < least) {
          least = time;
          winner = kernel;
        }
      } catch (...) {
        if (!error) error = std::current_exception();
      }
    }
    if (!winner) std::rethrow_exception(error);
    const std::lock_guard<std::mutex> lock(mutex_);
    return winners_.emplace(key, winner).first->second;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<std::string, const Kernel*> winners_;
};

// The least that time() says of several runs but the first, which warms caches and derives weights:
// whatever else the machine does only ever adds.
template <typename Time>
double least_time(const Time& time) {
  constexpr int kRuns = 4;
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kRuns; ++i) {
    const double now = time();
    if (i > 0 && now < least) least = now;
  }
  return least;
}

}  // namespace fusedcnn
