#include "machine.h"

#include <algorithm>
#include <memory>
#include <numeric>

#include "cuda/device.h"
#include "fiber.h"

namespace cuda_on_cpu {

Block block;
Thread* current = nullptr;

namespace {

// Enough for a kernel's frames without optimisation and with a sanitizer's padding.
constexpr size_t kStackBytes = 256 << 10;
constexpr int kMostThreads = 1024;

Options chosen;
Fiber main_fiber;
std::vector<std::unique_ptr<Fiber>> fibers;
const char* kernel_name = "";
void (*kernel_body)(void*) = nullptr;
void* kernel_context = nullptr;
std::string failure;

// splitmix64: the same orders in every run.
uint64_t random_state;
uint64_t next_random() {
  random_state += 0x9e3779b97f4a7c15;
  uint64_t z = random_state;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}
template <typename T>
void shuffle_order(std::vector<T>& list) {
  for (size_t i = list.size(); i > 1; --i) std::swap(list[i - 1], list[next_random() % i]);
}

std::string text(Site site) {
  const char* const slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}
bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

std::string thread_text(int thread) {
  return "thread " + std::to_string(thread) + " of block " + std::to_string(block.index);
}

void leave_fiber() {
  const int index = current->index;
  main_fiber.resume(*fibers[static_cast<size_t>(index)]);
}

void fiber_entry(void* index) {
  Thread& me = block.state[reinterpret_cast<uintptr_t>(index)];
  fibers[static_cast<size_t>(me.index)]->started();
  for (;;) {
    try {
      kernel_body(kernel_context);
    } catch (const Failure& caught) {
      failure = caught.what();
    }
    current->state = Thread::State::kDone;
    ++block.done;
    leave_fiber();
  }
}

void free_arrays() {
  for (SharedArray* array : block.arrays) {
    std::free(array->data);
    delete array;
  }
  block.arrays.clear();
}

void run_thread(Thread& thread) {
  current = &thread;
  fibers[static_cast<size_t>(thread.index)]->resume(main_fiber);
  current = nullptr;
  if (!failure.empty()) {
    free_arrays();
    throw Failure(std::string(kernel_name) + ": " + failure);
  }
}

// Why no thread can run on.
std::string deadlock_text() {
  std::string message = "the threads wait for each other:";
  Site last{};
  int listed = 0;
  for (const Thread& thread : block.state) {
    const bool done = thread.state == Thread::State::kDone;
    const Site site = done ? Site{"", 0} : thread.site;
    if (thread.index && last.file && same(site, last)) continue;
    last = site;
    if (++listed > 6) break;
    message += " from " + thread_text(thread.index) + " on " +
               (done ? std::string("they have returned;") : "at " + text(site) + ";");
  }
  return message;
}

// Lets every ready thread run until it waits, over and over, until all are done.
void run_block() {
  using State = Thread::State;
  const Order order = chosen.order;
  std::vector<int> warps(block.warps.size());
  std::iota(warps.begin(), warps.end(), 0);
  if (order == Order::kReverse) std::reverse(warps.begin(), warps.end());
  if (order == Order::kRunAhead) shuffle_order(warps);
  std::vector<int> lanes(32);
  std::iota(lanes.begin(), lanes.end(), 0);
  if (order == Order::kReverse) std::reverse(lanes.begin(), lanes.end());
  for (;;) {
    bool ran = false;
    for (const int warp : warps) {
      bool this_warp = false;
      if (order == Order::kRunAhead) shuffle_order(lanes);
      for (const int lane : lanes) {
        Thread& thread = block.state[static_cast<size_t>(32 * warp + lane)];
        if (thread.state != State::kReady) continue;
        run_thread(thread);
        this_warp = true;
      }
      ran |= this_warp;
      if (this_warp && order == Order::kRunAhead) {
        // Another draw now and then, or the first warp would always be the one ahead.
        if (next_random() % 16 == 0) shuffle_order(warps);
        break;
      }
    }
    if (ran) continue;
    if (block.done == block.threads) return;
    const std::string message = deadlock_text();
    free_arrays();
    throw Failure(std::string(kernel_name) + ": " + message);
  }
}

void land(const PendingCopy& copy) {
  const auto valid = static_cast<size_t>(copy.valid);
  if (valid) std::memcpy(copy.to, copy.from, valid);
  std::memset(copy.to + valid, 0, static_cast<size_t>(copy.bytes) - valid);
}

void note_copy(const PendingCopy& copy) {
  for (int64_t i = 0; i < copy.bytes / copy.array->element; ++i) {
    note_write(*copy.array, copy.first + i);
  }
}

}  // namespace

Options& options() { return chosen; }

// Caught where the fiber began, so that nothing on its stack is lost; run_thread() throws it again.
void fail(const std::string& message) {
  throw Failure(current ? thread_text(current->index) + ": " + message : message);
}

void fail_access(const SharedArray& array, int64_t at, const char* what, int other) {
  const auto number = std::find(block.arrays.begin(), block.arrays.end(), &array);
  fail("element " + std::to_string(at) + " of shared array " +
       std::to_string(number - block.arrays.begin()) + " (" + std::to_string(array.cells.size()) +
       " elements of " + std::to_string(array.element) + " bytes) " + what +
       (other == kMany ? " several threads"
        : other >= 0   ? " thread " + std::to_string(other)
                       : ""));
}

void run(const char* kernel, int64_t blocks, int threads, int64_t shared, void (*body)(void*),
         void* context) {
  kernel_name = kernel;
  failure.clear();
  random_state = chosen.seed;
  current = nullptr;
  const std::string name = std::string(kernel) + ": ";
  if (blocks < 1 || blocks > (int64_t{1} << 31) - 1) {
    throw Failure(name + std::to_string(blocks) + " blocks");
  }
  if (threads < 32 || threads > kMostThreads || threads % 32) {
    throw Failure(name + std::to_string(threads) + " threads a block");
  }
  if (shared < 0 || shared > chosen.device.shared_bytes) {
    throw Failure(name + std::to_string(shared) + " bytes of shared memory, of " +
                  std::to_string(chosen.device.shared_bytes));
  }
  kernel_body = body;
  kernel_context = context;
  block.count = blocks;
  block.threads = threads;
  block.shared = shared;
  block.state.resize(static_cast<size_t>(threads));
  block.warps.resize(static_cast<size_t>(threads / 32));
  for (size_t i = fibers.size(); i < block.state.size(); ++i) {
    fibers.push_back(std::make_unique<Fiber>(kStackBytes, fiber_entry, reinterpret_cast<void*>(i)));
  }
  // A launch that failed left its fibers wherever they were.
  for (int i = 0; i < threads; ++i) fibers[static_cast<size_t>(i)]->restart();
  std::vector<int64_t> order(static_cast<size_t>(blocks));
  std::iota(order.begin(), order.end(), int64_t{0});
  if (chosen.order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (chosen.order == Order::kRunAhead) shuffle_order(order);
  for (const int64_t index : order) {
    block.index = index;
    block.epoch = 1;
    block.waiting = block.done = 0;
    block.shared_used = 0;
    for (Warp& warp : block.warps) warp.epoch = 1, warp.arrived = 0, warp.phase = 0;
    for (int i = 0; i < threads; ++i) {
      Thread& thread = block.state[static_cast<size_t>(i)];
      thread.index = i;
      thread.lane = i % 32;
      thread.warp = i / 32;
      thread.state = Thread::State::kReady;
      thread.phase = 0;
      thread.arrays = 0;
      thread.copies.assign(1, {});
    }
    run_block();
    free_arrays();
  }
}

void barrier(Site site) {
  Thread& me = *current;
  const auto thread_in = [](Thread::State state) -> const Thread* {
    for (const Thread& thread : block.state) {
      if (thread.state == state) return &thread;
    }
    return current;
  };
  if (block.done) {
    fail("at the barrier " + text(site) + ", which thread " +
         std::to_string(thread_in(Thread::State::kDone)->index) +
         " will never reach: it has returned");
  }
  if (block.waiting) {
    const Thread& other = *thread_in(Thread::State::kBarrier);
    if (!same(other.site, site)) {
      fail("at the barrier " + text(site) + ", while thread " + std::to_string(other.index) +
           " is at " + text(other.site));
    }
  }
  me.site = site;
  if (++block.waiting < block.threads) {
    me.state = Thread::State::kBarrier;
    leave_fiber();
    return;
  }
  block.waiting = 0;
  ++block.epoch;
  for (Thread& thread : block.state) thread.state = Thread::State::kReady;
}

unsigned char* meet(int operation, Site site, const void* value, size_t size,
                    void (*complete)(unsigned char*)) {
  Thread& me = *current;
  Warp& warp = block.warps[static_cast<size_t>(me.warp)];
  if (size > static_cast<size_t>(kLaneBytes)) fail("hands too much to a collective");
  unsigned char* const values = &warp.values[me.phase][0][0];
  if (warp.arrived && (warp.operation != operation || !same(warp.site, site))) {
    fail("at the collective " + text(site) + ", while other lanes are at " + text(warp.site));
  }
  warp.operation = operation;
  warp.site = site;
  if (size) std::memcpy(values + me.lane * kLaneBytes, value, size);
  me.phase ^= 1;
  me.site = site;
  if (++warp.arrived < 32) {
    me.state = Thread::State::kCollective;
    leave_fiber();
    return values;
  }
  warp.arrived = 0;
  if (complete) complete(values);
  for (int lane = 0; lane < 32; ++lane) {
    block.state[static_cast<size_t>(32 * me.warp + lane)].state = Thread::State::kReady;
  }
  return values;
}

void meet_and_order(Site site) {
  meet(1, site, nullptr, 0,
       [](unsigned char*) { ++block.warps[static_cast<size_t>(current->warp)].epoch; });
}

SharedArray* shared_array(int64_t element, int64_t count) {
  const size_t number = current->arrays++;
  if (number < block.arrays.size()) {
    SharedArray* const array = block.arrays[number];
    if (array->element != element || static_cast<int64_t>(array->cells.size()) != count) {
      fail("asks for another shared array than the threads before it");
    }
    return array;
  }
  const int64_t bytes = element * count;
  block.shared_used += fusedcnn::cuda::shared_bytes<unsigned char>(bytes);
  if (block.shared_used > block.shared) {
    fail("uses " + std::to_string(block.shared_used) +
         " bytes of shared memory or more, and the launch asked for " +
         std::to_string(block.shared));
  }
  auto* const array = new SharedArray;
  array->element = element;
  array->cells.resize(static_cast<size_t>(count));
  // A heap block of exactly this size, aligned to 16 bytes: sanitizers see its ends. All ones are a
  // NaN in every floating-point format.
  array->data = static_cast<unsigned char*>(std::malloc(static_cast<size_t>(bytes)));
  std::memset(array->data, 0xff, static_cast<size_t>(bytes));
  block.arrays.push_back(array);
  return array;
}

void issue_copy(const PendingCopy& copy) {
  // The write may happen at any moment from now on, until it is waited for.
  note_copy(copy);
  if (!chosen.late_copies) land(copy);
  current->copies.back().push_back(copy);
}

void commit_copies() { current->copies.emplace_back(); }

void wait_copies(size_t pending) {
  auto& groups = current->copies;
  while (groups.size() - 1 > pending) {
    for (const PendingCopy& copy : groups.front()) {
      note_copy(copy);
      if (chosen.late_copies) land(copy);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace cuda_on_cpu
