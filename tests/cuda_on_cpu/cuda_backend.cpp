#include "cuda_backend.h"

#include <cstdlib>
#include <cstring>
#include <memory>

#include "cuda/batch_norm.h"
#include "cuda/kernel.h"
#include "machine.h"
#include "stock_convolution.h"
#include "storage.h"
#include "tensor.h"

namespace selftest {
namespace {

using cuda_on_cpu::Order;
using fusedcnn::cuda::Execution;
using fusedcnn::cuda::Kernel;
using fusedcnn::cuda::Target;

struct Way {
  const char* name;
  Order order;
  uint64_t seed;
  bool late_copies;
  int64_t most_blocks;  // few, so that blocks take several tasks; or one for every task
  int multiprocessors;  // few, which one problem fills; or so many that tiles are small
};
constexpr Way kWays[] = {
    {"forward order, late copies", Order::kForward, 1, true, 1 << 30, 1},
    {"reverse order, early copies, 3 blocks", Order::kReverse, 1, false, 3, 1},
    {"run ahead, late copies, 5 blocks", Order::kRunAhead, 2, true, 5, 132},
    {"run ahead, early copies, 4 blocks", Order::kRunAhead, 3, false, 4, 132},
};

// The order of a library kernel's plane: either one in every layout and every way of running, if
// not for every type, also where a quick test leaves most of them out.
template <typename Args>
bool plane_channels_last(const Args& args, int way) {
  return (static_cast<int>(args.type) + args.wide_code + way) % 2;
}

void use(const Way& way) {
  cuda_on_cpu::Options& options = cuda_on_cpu::options();
  options.order = way.order;
  options.seed = way.seed;
  options.late_copies = way.late_copies;
  options.most_blocks = way.most_blocks;
}

// As many bytes as the kernel asks for and no more, each a part of a NaN.
struct Workspace {
  explicit Workspace(int64_t bytes) : data(std::malloc(static_cast<size_t>(bytes)), std::free) {
    std::memset(data.get(), 0xff, static_cast<size_t>(bytes));
  }
  std::unique_ptr<void, void (*)(void*)> data;
};

// Runs the kernel's function with what it works in.
template <typename Function, typename Args>
void call(const Kernel& kernel, Function function, const Args& args, int way) {
  use(kWays[way]);
  const fusedcnn::Problem problem{args.geometry, args.type, args.wide_code};
  const Workspace workspace(kernel.workspace_bytes ? kernel.workspace_bytes(problem) : 0);
  function(args, Execution{nullptr, workspace.data.get(), kWays[way].multiprocessors});
}

// A plane that nobody has written.
Tensor new_plane(const fusedcnn::Geometry& g, fusedcnn::DataType type) {
  const Shape shape{g.batch, g.out_channels, g.h.conv, g.w.conv};
  return Tensor(shape, strides_for(Layout::kContiguous, shape), element_size(type),
                signalling_nan(type));
}

void library_forward(const Kernel& kernel, fusedcnn::ForwardArgs args, int way) {
  Tensor plane = new_plane(args.geometry, args.type);
  args.plane_channels_last = plane_channels_last(args, way);
  const void* const bias = args.bias;
  args.bias = nullptr;
  stock_convolution(args, plane.data());
  args.input = args.weight = nullptr;
  args.bias = bias;
  args.plane = plane.data();
  call(kernel, kernel.forward, args, way);
}

void library_backward(const Kernel& kernel, fusedcnn::BackwardArgs args, int way) {
  Tensor plane = new_plane(args.geometry, args.type);
  args.plane = plane.data();
  args.plane_channels_last = plane_channels_last(args, way);
  fusedcnn::BackwardArgs scatter = args;
  scatter.input = scatter.weight = nullptr;
  scatter.grad_input = scatter.grad_weight = nullptr;
  call(kernel, kernel.backward, scatter, way);
  args.grad_bias = nullptr;
  stock_convolution_backward(args);
}

}  // namespace

Backend cuda_backend(bool allow_tf32) {
  Backend backend{"cuda", {}, {}};
  for (const Way& way : kWays) backend.ways.push_back(way.name);
  const fusedcnn::cuda::KernelList list = fusedcnn::cuda::kernels();
  for (int i = 0; i < list.count; ++i) {
    const Kernel& kernel = list.kernels[i];
    // The convolution is exact here.
    TestedKernel tested{kernel.name,  kernel.pass, kernel.exact || kernel.library,
                        nullptr,      nullptr,     nullptr,
                        kernel.dense, kernel.tf32};
    tested.why_not = [&kernel, allow_tf32](const fusedcnn::Problem& problem) {
      return kernel.why_not(problem, Target{cuda_on_cpu::options().device, allow_tf32});
    };
    if (kernel.library) {
      tested.stored = [](fusedcnn::DataType type, double sum, double bias) {
        return rounded(type, sum) + bias;
      };
    }
    if (kernel.forward) {
      tested.forward = [&kernel](const fusedcnn::ForwardArgs& args, int way) {
        if (!args.geometry.batch) return;  // the operator launches nothing for an empty batch
        if (kernel.library) return library_forward(kernel, args, way);
        call(kernel, kernel.forward, args, way);
      };
    } else {
      tested.backward = [&kernel](const fusedcnn::BackwardArgs& args, int way) {
        if (!args.geometry.batch && kernel.pass != fusedcnn::Pass::kGradWeight) return;
        if (kernel.library) return library_backward(kernel, args, way);
        call(kernel, kernel.backward, args, way);
      };
    }
    backend.kernels.push_back(tested);
  }
  return backend;
}

NormBackend norm_backend() {
  NormBackend backend{"cuda", {}, {}, {}};
  for (const Way& way : kWays) backend.ways.push_back(way.name);
  const auto run = [](auto* function, auto* workspace_bytes, const auto& args, int way) {
    use(kWays[way]);
    const Workspace workspace(workspace_bytes(args));
    function(args, Execution{nullptr, workspace.data.get(), kWays[way].multiprocessors});
  };
  backend.forward = [run](const fusedcnn::NormForwardArgs& args, int way) {
    run(fusedcnn::cuda::batch_norm_forward, fusedcnn::cuda::batch_norm_forward_workspace, args,
        way);
  };
  backend.backward = [run](const fusedcnn::NormBackwardArgs& args, int way) {
    run(fusedcnn::cuda::batch_norm_backward, fusedcnn::cuda::batch_norm_backward_workspace, args,
        way);
  };
  return backend;
}

TransposeBackend transpose_backend() {
  TransposeBackend backend;
  for (const Way& way : kWays) backend.ways.push_back(way.name);
  backend.run = [](const fusedcnn::cuda::TransposeArgs& args, int way) {
    use(kWays[way]);
    fusedcnn::cuda::transpose(args, Execution{nullptr, nullptr, kWays[way].multiprocessors});
  };
  return backend;
}

}  // namespace selftest
