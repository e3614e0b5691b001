#include "test_derived_weights.h"

#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/derived_weights.h"

namespace selftest {

namespace {

using fusedcnn::cpu::DerivedKey;
using fusedcnn::cpu::DerivedWeights;

constexpr int64_t kBytes = 64;
using Weight = std::array<unsigned char, kBytes>;

DerivedKey key_of(const Weight& weight) {
  static const char kernel = 0;
  return {&kernel, weight.data(), {9, 9, 3, 1}, fusedcnn::DataType::kFloat32, 1, 1, 3, 3};
}

// What a kernel does with it: takes the array over, or derives and keeps it. Whether it was there.
bool taken_over(const Weight& weight) {
  DerivedWeights derived(key_of(weight), kBytes, 1);
  if (derived.filled()) return derived.data()[0] == weight[0];
  derived.data()[0] = *static_cast<const unsigned char*>(derived.source());
  derived.keep(true);
  return false;
}

// Whether a child of this process gets through, with other threads of the parent in the cache.
bool child_takes_over(const Weight& weight) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // ends a child that waits for good
    _exit(taken_over(weight) ? 0 : 1);
  }
  int status = 0;
  return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

}  // namespace

void test_derived_weights() {
  // Many entries, so that threads spend most of their time looking for theirs, the mutex held.
  std::vector<Weight> weights(500);
  for (Weight& weight : weights) {
    weight.fill(1);
    check(!taken_over(weight), "derived weights: nothing is there at first");
  }
  Weight& weight = weights.front();
  check(taken_over(weight), "derived weights: kept from call to call");
  weight.back() = 2;
  check(!taken_over(weight), "derived weights: a changed byte is found");
  check(taken_over(weight), "derived weights: derived anew, and kept");

  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (size_t i = 1; i < 3; ++i) {
    threads.emplace_back([&weights, &stop, i] {
      while (!stop) taken_over(weights[i]);
    });
  }
  bool all = true;
  for (int i = 0; i < 20 && all; ++i) all = child_takes_over(weight);
  stop = true;
  for (std::thread& thread : threads) thread.join();
  check(all, "derived weights: a child forked while other threads are in the cache goes on");
}

}  // namespace selftest
