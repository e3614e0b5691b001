#include "cpu_backend.h"

#include <atomic>
#include <thread>

namespace selftest {
namespace {

using TaskBody = void (*)(int64_t begin, int64_t end, void* context);

void run_in_order(int64_t tasks, TaskBody body, void* context) { body(0, tasks, context); }

void run_in_reverse(int64_t tasks, TaskBody body, void* context) {
  for (int64_t task = tasks - 1; task >= 0; --task) body(task, task + 1, context);
}

void run_on_three_threads(int64_t tasks, TaskBody body, void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t task = next++; task < tasks; task = next++) body(task, task + 1, context);
  };
  std::thread first(work), second(work), third(work);
  first.join();
  second.join();
  third.join();
}

constexpr fusedcnn::cpu::ThreadPool kPools[] = {
    {run_in_order}, {run_in_reverse}, {run_on_three_threads}};

// In a thread of its own, whose scratch blocks are therefore new and no larger than asked for.
template <typename Body>
void on_new_thread(const Body& body) {
  std::thread(body).join();
}

}  // namespace

Backend cpu_backend(const fusedcnn::cpu::Isa& isa) {
  Backend backend{isa.name, {"one thread", "reverse order", "three threads"}, {}};
  for (int i = 0; i < isa.list.count; ++i) {
    const fusedcnn::cpu::Kernel& kernel = isa.list.kernels[i];
    TestedKernel tested{kernel.name, kernel.pass, kernel.exact, kernel.why_not, nullptr, nullptr};
    if (kernel.forward) {
      tested.forward = [&kernel](const fusedcnn::ForwardArgs& args, int way) {
        on_new_thread([&] { kernel.forward(args, kPools[way]); });
      };
    } else {
      tested.backward = [&kernel](const fusedcnn::BackwardArgs& args, int way) {
        on_new_thread([&] { kernel.backward(args, kPools[way]); });
      };
    }
    backend.kernels.push_back(tested);
  }
  return backend;
}

}  // namespace selftest
