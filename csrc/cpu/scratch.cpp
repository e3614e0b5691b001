#include "cpu/scratch.h"

#include <cstdlib>

#include "cpu/out_of_memory.h"

namespace fusedcnn::cpu {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kKeptBytes = int64_t{8} << 20;

struct Block {
  void* data = nullptr;
  int64_t bytes = 0;

  ~Block() { std::free(data); }
};

}  // namespace

void (*on_new_memory)(void* data, int64_t bytes) = nullptr;

void* scratch(Slot slot, int64_t bytes) {
  thread_local Block blocks[static_cast<int>(Slot::kCount)];
  Block& block = blocks[static_cast<int>(slot)];
  const bool oversized = block.bytes > kKeptBytes && bytes < block.bytes / 2;
  if (!block.data || block.bytes < bytes || oversized) {
    std::free(block.data);
    block = Block{};
    // No bytes still get an address: memset and memcpy forbid null even for a size of zero.
    const int64_t lines = (bytes + kAlignment - 1) / kAlignment;
    const int64_t rounded = (lines > 0 ? lines : 1) * kAlignment;
    block.data = std::aligned_alloc(kAlignment, static_cast<size_t>(rounded));
    if (!block.data) throw OutOfMemory(rounded);
    block.bytes = rounded;
  }
  if (on_new_memory) on_new_memory(block.data, bytes);
  return block.data;
}

}  // namespace fusedcnn::cpu
