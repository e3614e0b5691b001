#include "ops/torch_threads.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

namespace fusedcnn {
namespace {

// torch's own threads: a second OpenMP runtime in the process costs milliseconds per call. What a
// task throws is kept aside, since the way through torch's C interface would lose all but the fact.
void run_on_torch_threads(int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context) {
  struct Run {
    void (*body)(int64_t, int64_t, void*);
    void* context;
    std::atomic_flag failed;
    std::exception_ptr error;  // of the first that failed
  } run{body, context, {}, nullptr};
  const auto guarded = [](int64_t begin, int64_t end, void* opaque) {
    Run& run = *static_cast<Run*>(opaque);
    try {
      run.body(begin, end, run.context);
    } catch (...) {
      if (!run.failed.test_and_set()) run.error = std::current_exception();
    }
  };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, tasks, 1, guarded, &run));
  if (run.error) std::rethrow_exception(run.error);
}

void run_inline(int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context) {
  body(0, tasks, context);
}

// Below this many multiply-adds, waking a second thread costs more than it saves (a few
// microseconds, in which one core does about this much).
constexpr double kSerialMultiplyAdds = 1e6;

}  // namespace

double multiply_adds(const Geometry& g) {
  const double conv_outputs =
      std::min(double(g.outputs()) * double(g.window()), double(g.h.conv) * double(g.w.conv));
  return double(g.batch) * g.out_channels * conv_outputs * g.in_channels_per_group() * g.taps();
}

cpu::ThreadPool thread_pool(double multiply_adds) {
  return {multiply_adds < kSerialMultiplyAdds ? run_inline : run_on_torch_threads};
}

cpu::ThreadPool thread_pool(const Geometry& g) { return thread_pool(multiply_adds(g)); }

}  // namespace fusedcnn
