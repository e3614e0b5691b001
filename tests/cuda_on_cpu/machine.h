// A CUDA device in miniature: runs the threads of a block as fibers, one block after the other, and
// fails loudly on what a GPU would do wrong in silence.
//
// Found: barriers and warp collectives that not all threads reach, or reach at different places;
// races on shared memory, and reads of what nobody wrote; overruns of shared arrays; more shared
// memory than asked for, or than the device has; misaligned vector accesses; results that depend on
// the order of threads or of blocks, or on when an asynchronous copy lands. Not found: errors
// of the memory model, bank conflicts, spills, occupancy, timing, and what nvcc makes of the code.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/kernel.h"

namespace cuda_on_cpu {

// What `launch` throws when a kernel misbehaves.
class Failure : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class Order : int {
  kForward,   // threads and blocks in order, each as far as it can run
  kReverse,   // from the last to the first
  kRunAhead,  // warps in random order, each as far as it can run before another may: the drift that
              // a missing barrier needs to show; blocks in random order
};

struct Options {
  Order order = Order::kForward;
  uint64_t seed = 1;
  bool late_copies = true;   // asynchronous copies land when waited for; otherwise when issued
  int64_t most_blocks = 64;  // of a launch, so that kernels have to loop
  fusedcnn::cuda::Device device{90, 90, 4, 227 * 1024};
};
// How the next launches run.
Options& options();

// Runs body(context) as every thread of every block.
void run(const char* kernel, int64_t blocks, int threads, int64_t shared, void (*body)(void*),
         void* context);

// Where a barrier or a collective stands in the source.
struct Site {
  const char* file;
  int line;
};

// What is known of one element of shared memory. Epochs count barriers, of the block or the warp.
struct Cell {
  uint32_t write_epoch = 0, write_warp_epoch = 0;  // 0: never written
  int32_t write_thread = -1;
  uint32_t read_epoch = 0, read_warp_epoch = 0;
  int32_t read_warp = -1;  // kMany: of several warps
  int32_t read_lane = -1;  // kMany: several lanes since the warp's last barrier
};
constexpr int32_t kMany = -2;

struct SharedArray {
  unsigned char* data = nullptr;
  std::vector<Cell> cells;
  int64_t element = 0;
};

struct PendingCopy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, valid;
  SharedArray* array;
  int64_t first;  // element
};

constexpr int kLaneBytes = 64;  // that a lane hands to a collective at most

struct Warp {
  uint32_t epoch = 1;
  int arrived = 0;
  int operation = 0;
  Site site{};
  int phase = 0;
  alignas(16) unsigned char values[2][32][kLaneBytes];
};

struct Thread {
  int index = 0;
  int lane = 0;
  int warp = 0;
  enum class State : int { kReady, kBarrier, kCollective, kDone } state = State::kReady;
  Site site{};
  int phase = 0;      // of the warp's values that the thread's next collective uses
  size_t arrays = 0;  // asked for so far
  std::vector<std::vector<PendingCopy>> copies;  // groups; the last one is open
};

// The running block. Plain variables: fibers of one system thread share them.
struct Block {
  int64_t index = 0, count = 0;
  int threads = 0;
  int64_t shared = 0, shared_used = 0;
  uint32_t epoch = 1;
  int waiting = 0;  // threads at the barrier
  int done = 0;     // threads that have returned
  std::vector<SharedArray*> arrays;
  std::vector<Warp> warps;
  std::vector<Thread> state;
};
extern Block block;
extern Thread* current;

// Ends the launch with a Failure. Does not return.
[[noreturn]] void fail(const std::string& message);

void barrier(Site site);

// Hands `size` bytes to the warp's collective, waits until all lanes have, and gives back all 32
// values, kLaneBytes apart. The last lane to arrive calls complete(values), where that is not null.
unsigned char* meet(int operation, Site site, const void* value, size_t size,
                    void (*complete)(unsigned char* values));
// As meet, and orders the lanes' memory accesses.
void meet_and_order(Site site);

SharedArray* shared_array(int64_t element, int64_t count);

void issue_copy(const PendingCopy& copy);
void commit_copies();
void wait_copies(size_t pending);

[[noreturn]] void fail_access(const SharedArray& array, int64_t at, const char* what, int other);

inline void check_bounds(const SharedArray& array, int64_t at, int64_t count) {
  if (at < 0 || at + count > static_cast<int64_t>(array.cells.size())) {
    fail_access(array, at, "is outside the array", -1);
  }
}

// Two accesses of different threads, at least one of them a write, need a barrier between them: of
// the block, or of their warp where it is the same.
inline void note_write(SharedArray& array, int64_t at) {
  Cell& cell = array.cells[static_cast<size_t>(at)];
  const Thread& me = *current;
  const uint32_t warp_epoch = block.warps[static_cast<size_t>(me.warp)].epoch;
  if (cell.write_epoch == block.epoch && cell.write_thread != me.index &&
      (cell.write_thread / 32 != me.warp || cell.write_warp_epoch == warp_epoch)) {
    fail_access(array, at, "is written without a barrier after the write of", cell.write_thread);
  }
  if (cell.read_epoch == block.epoch) {
    const bool ordered = cell.read_warp == me.warp &&
                         (cell.read_warp_epoch != warp_epoch || cell.read_lane == me.lane);
    if (!ordered) {
      fail_access(array, at, "is written without a barrier after the read of",
                  cell.read_warp == kMany || cell.read_lane == kMany
                      ? kMany
                      : 32 * cell.read_warp + cell.read_lane);
    }
  }
  cell.write_epoch = block.epoch;
  cell.write_warp_epoch = warp_epoch;
  cell.write_thread = me.index;
}

inline void note_read(SharedArray& array, int64_t at) {
  Cell& cell = array.cells[static_cast<size_t>(at)];
  const Thread& me = *current;
  const uint32_t warp_epoch = block.warps[static_cast<size_t>(me.warp)].epoch;
  if (cell.write_epoch == 0) fail_access(array, at, "is read, and nobody has written it", -1);
  if (cell.write_epoch == block.epoch && cell.write_thread != me.index &&
      (cell.write_thread / 32 != me.warp || cell.write_warp_epoch == warp_epoch)) {
    fail_access(array, at, "is read without a barrier after the write of", cell.write_thread);
  }
  if (cell.read_epoch != block.epoch) {
    cell.read_epoch = block.epoch;
    cell.read_warp = me.warp;
    cell.read_warp_epoch = warp_epoch;
    cell.read_lane = me.lane;
  } else if (cell.read_warp != me.warp) {
    cell.read_warp = kMany;
  } else if (cell.read_warp_epoch != warp_epoch) {
    cell.read_warp_epoch = warp_epoch;
    cell.read_lane = me.lane;
  } else if (cell.read_lane != me.lane) {
    cell.read_lane = kMany;
  }
}

}  // namespace cuda_on_cpu
