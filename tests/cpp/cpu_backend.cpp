#include "cpu_backend.h"

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <map>
#include <mutex>
#include <thread>

#include "cpu/scratch.h"
#include "stock_convolution.h"
#include "storage.h"
#include "tensor.h"

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

// The most of each block of it at a time.
std::mutex held_mutex;
std::map<void*, int64_t> held;

void fill_with_stale(void* data, int64_t bytes) {
  fill_memory(data, bytes, stale);
  handed_out += bytes;
  const std::lock_guard<std::mutex> lock(held_mutex);
  int64_t& most = held[data];
  most = std::max(most, bytes);
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

// The bytes of working memory that kernel.h allows one call on one thread.
int64_t allowed_memory(const fusedcnn::Geometry& g, fusedcnn::DataType type) {
  const auto whole = [](int64_t size) { return (size + 15) / 16 * 16; };
  const auto seen = [](const fusedcnn::Axis& axis) {
    return (axis.conv - 1) * axis.stride + (axis.kernel - 1) * axis.dilation + 1;
  };
  const int64_t in = whole(g.in_channels), out = whole(g.out_channels);
  const int64_t image = in * (seen(g.h) + 8) * (seen(g.w) + 32);
  const int64_t conv = out * (g.h.conv + 4) * whole(g.w.conv);
  const int64_t outputs = out * (g.h.out + 4) * whole(g.w.out);
  const int64_t weights = out * in * std::max<int64_t>(g.taps(), 36);
  const int64_t bytes = type == fusedcnn::DataType::kFloat64 ? 8 : 4;
  const int64_t partial_sums = std::min(std::min<int64_t>(g.batch, 16) * weights * bytes,
                                        std::max(weights * bytes, int64_t{8} << 20));
  return bytes * (2 * (image + conv + outputs) + weights) + partial_sums;
}

// Runs `body` with memory that holds `content`, in a thread of its own, whose scratch blocks are
// therefore new and no larger than asked for. Returns the bytes that were handed out.
template <typename Body>
int64_t watched(uint64_t content, const Body& body) {
  stale = content;
  handed_out = 0;
  held.clear();
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
  int64_t bytes = 0;
  for (const auto& [block, most] : held) bytes += most;
  const int64_t allowed = allowed_memory(args.geometry, args.type);
  if (bytes > allowed) {
    misuse = "asked for " + std::to_string(bytes) + " bytes of working memory, where " +
             std::to_string(allowed) + " are allowed";
  }
  // A kernel that takes another road asks for other memory. Both calls find what the first one may
  // have derived from the weights.
  const int64_t with_zeros = watched(0, body);
  if (watched(signalling_nan(args.type), body) != with_zeros) {
    misuse = "memory that nobody wrote decided what it did";
  }
}

}  // namespace

std::string run_watched(fusedcnn::DataType type, int way,
                        const std::function<void(const fusedcnn::cpu::ThreadPool&)>& body) {
  fusedcnn::cpu::on_new_memory = fill_with_stale;
  watched(signalling_nan(type), [&] { body(kPools[way]); });
  return met_signalling_nan ? "computed on memory that nobody wrote" : "";
}

Backend cpu_backend(const fusedcnn::cpu::Isa& isa) {
  fusedcnn::cpu::on_new_memory = fill_with_stale;
  Backend backend{isa.name, {"one thread", "reverse order", "three threads"}, {}};
  backend.misuse = [] { return misuse; };
  for (int i = 0; i < isa.list.count; ++i) {
    const fusedcnn::cpu::Kernel& kernel = isa.list.kernels[i];
    // Of a plane that nobody has written.
    const auto plane_of = [](const fusedcnn::Geometry& g, fusedcnn::DataType type) {
      const Shape shape{g.batch, g.out_channels, g.h.conv, g.w.conv};
      return Tensor(shape, strides_for(Layout::kChannelsLast, shape), element_size(type),
                    signalling_nan(type));
    };
    TestedKernel tested{kernel.name, kernel.pass, kernel.exact,  kernel.why_not,
                        nullptr,     nullptr,     kernel.library};
    if (kernel.library) {
      tested.stored = [](fusedcnn::DataType type, double sum, double bias) {
        return rounded(type, sum + bias);
      };
    }
    tested.without_relu = kernel.without_relu;
    tested.accumulates = kernel.accumulates;
    if (kernel.forward) {
      tested.forward = [&kernel, plane_of](fusedcnn::ForwardArgs args, int way) {
        if (!kernel.library) return call(kernel.forward, args, way);
        Tensor plane = plane_of(args.geometry, args.type);
        args.plane_channels_last = true;
        stock_convolution(args, plane.data());
        args.input = args.weight = args.bias = nullptr;
        args.plane = plane.data();
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
