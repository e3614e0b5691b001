// Working memory of the kernels: one growing, cache-line-aligned block per thread and slot.
#pragma once

#include <cstdint>

namespace fusedcnn::cpu {

// Slots, so that buffers alive at the same time in one thread do not share a block.
enum class Slot : int {
  kPlanes,
  kConv,
  kPatch,
  kGradient,
  kLists,
  kPartials,
  kWeights,
  kTransformed,
  // Not for kernels: batch_norm.cpp, which calls them.
  kNormPlane,
  kNormChannels,
  kNormWeights,
  kNormGradient,
  kNormSums,
  // Nor for them: chain.cpp.
  kChainEven,
  kChainOdd,
  kCount
};

// At least `bytes` bytes, 64-byte aligned, of unspecified content, valid in this thread until its
// next call with the same slot. Never null, not even for no bytes. Blocks up to a few megabytes are
// kept for the thread's next call, since fresh pages cost more than the work on them; a larger one
// is replaced by the next request. Throws std::bad_alloc.
void* scratch(Slot slot, int64_t bytes);

// The self-test's: gets all memory that a kernel is about to write, before the kernel does.
extern void (*on_new_memory)(void* data, int64_t bytes);

}  // namespace fusedcnn::cpu
