#include "test_scratch.h"

#include <cstdint>
#include <thread>

#include "check.h"
#include "cpu/scratch.h"

namespace selftest {

void test_scratch() {
  using fusedcnn::cpu::scratch;
  constexpr auto kSlot = fusedcnn::cpu::Slot::kPlanes;
  constexpr int64_t kLarge = int64_t{64} << 20;
  // A thread of its own has asked for nothing before.
  std::thread([] {
    void* const none = scratch(kSlot, 0);
    check(none != nullptr, "scratch: null for no bytes");
    void* const large = scratch(kSlot, kLarge);
    static_cast<char*>(large)[kLarge - 1] = 1;
    check(reinterpret_cast<uintptr_t>(large) % 64 == 0, "scratch: not aligned to 64 bytes");
    check(scratch(kSlot, kLarge / 2) == large, "scratch: not kept for the next call");
    check(scratch(kSlot, 0) != nullptr, "scratch: null for no bytes after a large request");
  }).join();
}

}  // namespace selftest
