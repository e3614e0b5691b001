// Fibers: functions with stacks of their own that hand the processor to each other.
#pragma once

#include <cstddef>

namespace cuda_on_cpu {

class Fiber {
 public:
  // Runs on whatever stack calls resume(): the main fiber.
  Fiber() = default;
  // Will run entry(context) at its first resume(); `entry` never returns.
  Fiber(size_t stack_bytes, void (*entry)(void*), void* context);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Begins anew, forgetting where the fiber was.
  void restart();

  // Leaves `from`, the running fiber, and continues this one.
  void resume(Fiber& from);

  // The first thing that an entry function calls.
  void started();

 private:
  void* stack_pointer_ = nullptr;
  unsigned char* stack_ = nullptr;  // null: the main fiber
  size_t stack_bytes_ = 0;
  size_t mapped_bytes_ = 0;
  void (*entry_)(void*) = nullptr;
  void* context_ = nullptr;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void* ucontext_ = nullptr;    // where there is no switch of our own
};

}  // namespace cuda_on_cpu
