#include "cpu_backend.h"

#include <atomic>
#include <cfenv>
#include <thread>

#include "cpu/scratch.h"
#include "storage.h"

namespace selftest {
namespace {

using TaskBody = void (*)(int64_t begin, int64_t end, void* context);

// What a kernel finds in memory that it has not written yet, and how much of it has been handed out
// since the last call of `watched`.
uint64_t stale = 0;
std::atomic<int64_t> handed_out{0};
// Whether some thread of that call computed on a signalling NaN.
std::atomic<bool> met_signalling_nan{false};
// What the latest call did, as Backend::misuse tells it.
std::string misuse;

void fill_with_stale(void* data, int64_t bytes) {
  fill_memory(data, bytes, stale);
  handed_out += bytes;
}

// Runs body() in this thread and notes the floating-point exception.
template <typename Body>
void noting_exceptions(const Body& body) {
  std::feclearexcept(FE_INVALID);  // a thread may begin with those of the one that started it
  body();
  if (std::fetestexcept(FE_INVALID)) met_signalling_nan = true;
}

void run_in_order(int64_t tasks, TaskBody body, void* context) { body(0, tasks, context); }

void run_in_reverse(int64_t tasks, TaskBody body, void* context) {
  for (int64_t task = tasks - 1; task >= 0; --task) body(task, task + 1, context);
}

void run_on_three_threads(int64_t tasks, TaskBody body, void* context) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    noting_exceptions([&] {
      for (int64_t task = next++; task < tasks; task = next++) body(task, task + 1, context);
    });
  };
  std::thread first(work), second(work), third(work);
  first.join();
  second.join();
  third.join();
}

constexpr fusedcnn::cpu::ThreadPool kPools[] = {
    {run_in_order}, {run_in_reverse}, {run_on_three_threads}};

// Runs `body` with memory that holds `content`, in a thread of its own, whose scratch blocks are
// therefore new and no larger than asked for. Returns the bytes that were handed out.
template <typename Body>
int64_t watched(uint64_t content, const Body& body) {
  stale = content;
  handed_out = 0;
  met_signalling_nan = false;
  std::thread([&] { noting_exceptions(body); }).join();
  return handed_out;
}

template <typename Args>
void call(void (*function)(const Args&, const fusedcnn::cpu::ThreadPool&), const Args& args,
          int way) {
  const auto body = [&] { function(args, kPools[way]); };
  watched(signalling_nan(args.type), body);
  misuse = met_signalling_nan ? "computed on memory that nobody wrote" : "";
  if (way > 0) return;
  // A kernel that takes another road asks for other memory. Both calls find what the first one may
  // have derived from the weights.
  const int64_t with_zeros = watched(0, body);
  if (watched(signalling_nan(args.type), body) != with_zeros) {
    misuse = "memory that nobody wrote decided what it did";
  }
}

}  // namespace

Backend cpu_backend(const fusedcnn::cpu::Isa& isa) {
  fusedcnn::cpu::on_new_memory = fill_with_stale;
  Backend backend{isa.name, {"one thread", "reverse order", "three threads"}, {}};
  backend.misuse = [] { return misuse; };
  for (int i = 0; i < isa.list.count; ++i) {
    const fusedcnn::cpu::Kernel& kernel = isa.list.kernels[i];
    TestedKernel tested{kernel.name, kernel.pass, kernel.exact, kernel.why_not, nullptr, nullptr};
    if (kernel.forward) {
      tested.forward = [&kernel](const fusedcnn::ForwardArgs& args, int way) {
        call(kernel.forward, args, way);
      };
    } else {
      tested.backward = [&kernel](const fusedcnn::BackwardArgs& args, int way) {
        call(kernel.backward, args, way);
      };
    }
    backend.kernels.push_back(tested);
  }
  return backend;
}

}  // namespace selftest
