#include "test_machine.h"

#include <string>
#include <vector>

#include "check.h"
#include "cuda/device.h"
#include "machine.h"

namespace selftest {
namespace {

using namespace fusedcnn::cuda;
using cuda_on_cpu::Failure;
using cuda_on_cpu::options;
using cuda_on_cpu::Order;

constexpr int kThreads = 64;

// What a launch says when it fails; empty when it does not.
template <typename... Parameters, typename... Arguments>
std::string message_of(void (*kernel)(Parameters...), int64_t shared,
                       const Arguments&... arguments) {
  try {
    launch("faulty", kernel, 1, kThreads, shared, Execution{}, arguments...);
  } catch (const Failure& failure) {
    return failure.what();
  }
  return "";
}

// ---- faults: one kernel each --------------------------------------------------------------------

FUSEDCNN_KERNEL(kThreads) return_before_barrier() {
  if (thread_index() == 5) return;
  sync_threads();
}

FUSEDCNN_KERNEL(kThreads) two_barriers() {
  if (thread_index() < 32) {
    sync_threads();
  } else {
    sync_threads();
  }
}

FUSEDCNN_KERNEL(kThreads) barrier_of_one_warp() {
  if (thread_index() < 32) sync_threads();
}

FUSEDCNN_KERNEL(kThreads) collective_of_some_lanes(int* out) {
  if (thread_index() % 32 < 16) *out = shuffle(thread_index(), 0);
}

FUSEDCNN_KERNEL(kThreads) two_collectives(int* out) {
  if (thread_index() % 2) {
    *out = shuffle(thread_index(), 0);
  } else {
    *out = shuffle(thread_index(), 0);
  }
}

// Each thread reads what its neighbour has written.
FUSEDCNN_KERNEL(kThreads) read_neighbour(int* out, bool barrier, bool warp_barrier) {
  SharedMemory memory;
  const Shared<int> values = memory.array<int>(kThreads);
  values[thread_index()] = thread_index();
  if (barrier) sync_threads();
  if (warp_barrier) sync_warp();
  const int neighbour = warp_barrier ? thread_index() ^ 1 : (thread_index() + 32) % kThreads;
  out[thread_index()] = values[neighbour];
}

// A second round overwrites what the first still reads.
FUSEDCNN_KERNEL(kThreads) overwrite(int* out, bool barrier) {
  SharedMemory memory;
  const Shared<int> values = memory.array<int>(kThreads);
  for (int round = 0; round < 2; ++round) {
    values[thread_index()] = round;
    sync_threads();
    out[thread_index()] = values[kThreads - 1 - thread_index()];
    if (barrier) sync_threads();
  }
}

FUSEDCNN_KERNEL(kThreads) read_unwritten(int* out) {
  SharedMemory memory;
  const Shared<int> values = memory.array<int>(kThreads);
  out[thread_index()] = values[thread_index()];
}

FUSEDCNN_KERNEL(kThreads) overrun(int at) {
  SharedMemory memory;
  const Shared<int> values = memory.array<int>(kThreads);
  const Shared<int> others = memory.array<int>(kThreads);
  others[thread_index()] = 0;
  if (thread_index() == 0) values[at] = 1;
}

FUSEDCNN_KERNEL(kThreads) misaligned(int at) {
  SharedMemory memory;
  const Shared<float> values = memory.array<float>(kThreads);
  if (thread_index() == 0) store_pack<4, float>(values + at, {{1, 2, 3, 4}});
}

FUSEDCNN_KERNEL(kThreads) different_arrays() {
  SharedMemory memory;
  memory.array<int>(thread_index() < 32 ? 16 : 8);
}

FUSEDCNN_KERNEL(kThreads) copy_and_read(const int* from, int* out, bool wait, bool barrier) {
  SharedMemory memory;
  const Shared<int> values = memory.array<int>(4 * kThreads);
  for (int i = 0; i < 4; ++i) values[4 * thread_index() + i] = -1;
  copy_async<16>(values + 4 * thread_index(), from + 4 * thread_index());
  commit_copies();
  if (wait) wait_copies<0>();
  if (barrier) sync_threads();
  out[thread_index()] = values[4 * (barrier ? kThreads - 1 - thread_index() : thread_index())];
}

// Partial sums of blocks added up in whatever order the blocks run.
FUSEDCNN_KERNEL(kThreads) unordered_sum(float* sum) {
  if (thread_index() == 0) *sum += block_index() == 0 ? 1e8f : block_index() == 1 ? -1e8f : 1.f;
}

}  // namespace

void test_machine() {
  std::vector<int> out(kThreads);
  std::vector<int> in(4 * kThreads, 7);
  const int64_t room = 4 * shared_bytes<int>(kThreads);
  const auto found = [](const std::string& message, const char* expected) {
    check(message.find(expected) != std::string::npos && message.find("faulty: ") == 0,
          std::string("the machine says '") + expected + "'; it said '" + message + "'");
  };
  const auto right = [](const std::string& message, const char* what) {
    check(message.empty(),
          std::string("the machine accepts ") + what + "; it said '" + message + "'");
  };
  struct How {
    Order order;
    bool late;
  };
  const auto before = options();
  for (const How how : {How{Order::kForward, true}, How{Order::kReverse, false},
                        How{Order::kRunAhead, true}, How{Order::kRunAhead, false}}) {
    options().order = how.order;
    options().late_copies = how.late;
    check(!message_of(return_before_barrier, 0).empty(), "a return before a barrier is found");
    found(message_of(two_barriers, 0), "at the barrier test_machine.cpp:");
    check(!message_of(barrier_of_one_warp, 0).empty(), "a barrier of one warp is found");
    found(message_of(collective_of_some_lanes, 0, out.data()), "wait for each other");
    found(message_of(two_collectives, 0, out.data()), "while other lanes are at");
    found(message_of(read_neighbour, room, out.data(), false, false), "is read");
    right(message_of(read_neighbour, room, out.data(), true, false), "a barrier between");
    right(message_of(read_neighbour, room, out.data(), false, true), "a warp's barrier between");
    found(message_of(overwrite, room, out.data(), false), "without a barrier after the");
    right(message_of(overwrite, room, out.data(), true), "a barrier before the next round");
    found(message_of(read_unwritten, room, out.data()), "nobody has written");
    found(message_of(overrun, room, kThreads), "outside the array");
    found(message_of(overrun, room, -1), "outside the array");
    right(message_of(overrun, room, kThreads - 1), "the last element");
    found(message_of(misaligned, room, 2), "not aligned");
    right(message_of(misaligned, room, 4), "an aligned access");
    found(message_of(misaligned, room, kThreads - 2), "outside the array");
    found(message_of(different_arrays, room), "another shared array");
    found(message_of(read_unwritten, 16, out.data()), "the launch asked for 16");
    found(message_of(read_unwritten, options().device.shared_bytes + 1, out.data()),
          "bytes of shared memory, of");
    right(message_of(copy_and_read, room, in.data(), out.data(), true, true), "a copy waited for");
    check(out == std::vector<int>(kThreads, 7), "a copy waited for has landed");
    right(message_of(copy_and_read, room, in.data(), out.data(), false, false),
          "a copy that this thread alone reads");
    check((out == std::vector<int>(kThreads, 7)) != how.late,
          "a copy not waited for has landed only where copies are early");
  }
  // A block of another size, and nothing, after a failure.
  right(message_of(overwrite, room, out.data(), true), "a launch after one that failed");

  float sums[2];
  const Order orders[2] = {Order::kForward, Order::kReverse};
  for (int i = 0; i < 2; ++i) {
    options().order = orders[i];
    sums[i] = 0;
    launch("faulty", unordered_sum, 3, kThreads, 0, Execution{}, &sums[i]);
  }
  check(sums[0] != sums[1], "an unordered sum depends on the order of blocks");
  options() = before;
}

}  // namespace selftest
