#include "fiber.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves what a callee must keep, swaps stacks, restores. Twelve times faster than swapcontext,
// which asks the kernel for the signal mask.
extern "C" void cuda_on_cpu_switch(void** save, void* load);
extern "C" void cuda_on_cpu_begin();
asm(R"(
.text
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
.globl cuda_on_cpu_begin
.type cuda_on_cpu_begin, @function
cuda_on_cpu_begin:
  movq %r12, %rdi
  call *%rbx
  ud2
.size cuda_on_cpu_begin, .-cuda_on_cpu_begin
)");
#endif

namespace cuda_on_cpu {
namespace {

[[maybe_unused]] void start_switch(void** save, const void* bottom, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, bottom, size);
#else
  (void)save, (void)bottom, (void)size;
#endif
}

// The main stack's extent, learnt when the first fiber starts.
const void* main_bottom = nullptr;
size_t main_size = 0;

[[maybe_unused]] void finish_switch(void* saved, bool from_main) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(saved, &bottom, &size);
  if (from_main) main_bottom = bottom, main_size = size;
#else
  (void)saved, (void)from_main;
#endif
}

}  // namespace

Fiber::Fiber(size_t stack_bytes, void (*entry)(void*), void* context)
    : stack_bytes_(stack_bytes), entry_(entry), context_(context) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  mapped_bytes_ = stack_bytes + page;
  void* const mapped =
      mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  // A page that nobody may touch, below the stack: an overrun faults at once.
  if (mapped == MAP_FAILED || mprotect(mapped, page, PROT_NONE) != 0) {
    std::perror("fiber stack");
    std::abort();
  }
  stack_ = static_cast<unsigned char*>(mapped) + page;
#if !defined(__x86_64__)
  ucontext_ = new ucontext_t;
#endif
  restart();
}

Fiber::~Fiber() {
  delete static_cast<ucontext_t*>(ucontext_);
  if (stack_) munmap(stack_ - (mapped_bytes_ - stack_bytes_), mapped_bytes_);
}

void Fiber::restart() {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, stack_bytes_);
  fake_stack_ = nullptr;
#endif
#if defined(__x86_64__)
  // What cuda_on_cpu_switch pops: r15, r14, r13, r12, rbx, rbp, the return address. The stack is
  // aligned as before a call when cuda_on_cpu_begin starts.
  void** top = reinterpret_cast<void**>(stack_ + stack_bytes_) - 2;
  *--top = reinterpret_cast<void*>(&cuda_on_cpu_begin);
  *--top = nullptr;                              // rbp
  *--top = reinterpret_cast<void*>(entry_);      // rbx
  *--top = context_;                             // r12
  for (int i = 0; i < 3; ++i) *--top = nullptr;  // r13, r14, r15
  stack_pointer_ = top;
#else
  auto* const context = static_cast<ucontext_t*>(ucontext_);
  getcontext(context);
  context->uc_stack.ss_sp = stack_;
  context->uc_stack.ss_size = stack_bytes_;
  context->uc_link = nullptr;
  // makecontext passes ints only.
  const auto whole = reinterpret_cast<uintptr_t>(this);
  makecontext(context, reinterpret_cast<void (*)()>(+[](unsigned high, unsigned low) {
                const uintptr_t at = (static_cast<uintptr_t>(high) << 16 << 16) | low;
                auto* const fiber = reinterpret_cast<Fiber*>(at);
                fiber->entry_(fiber->context_);
              }),
              2, static_cast<unsigned>(whole >> 16 >> 16), static_cast<unsigned>(whole));
#endif
}

void Fiber::started() { finish_switch(nullptr, true); }

void Fiber::resume(Fiber& from) {
  const bool to_main = stack_ == nullptr;
  start_switch(&from.fake_stack_, to_main ? main_bottom : stack_,
               to_main ? main_size : stack_bytes_);
#if defined(__x86_64__)
  cuda_on_cpu_switch(&from.stack_pointer_, stack_pointer_);
#else
  if (!from.ucontext_) from.ucontext_ = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.ucontext_), static_cast<ucontext_t*>(ucontext_));
#endif
  // Back in `from`. Fibers are only ever resumed by the main fiber.
  finish_switch(from.fake_stack_, from.stack_ != nullptr);
}

}  // namespace cuda_on_cpu
