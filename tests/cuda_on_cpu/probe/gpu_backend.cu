#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <vector>

#include "cases.h"
#include "cuda/batch_norm.h"
#include "cuda/kernel.h"
#include "cuda/launch.h"
#include "cuda/transpose.h"
#include "gpu_backend.h"
#include "stock_convolution.h"
#include "storage.h"
#include "tensor.h"

namespace selftest {
namespace {

using fusedcnn::BackwardArgs;
using fusedcnn::DataType;
using fusedcnn::element_size;
using fusedcnn::ForwardArgs;
using fusedcnn::Geometry;
using fusedcnn::NormBackwardArgs;
using fusedcnn::NormForwardArgs;
using fusedcnn::Problem;
using fusedcnn::statistics_type;
using fusedcnn::Strides;
using fusedcnn::cuda::check_launch;
using fusedcnn::cuda::Execution;
using fusedcnn::cuda::Kernel;
using fusedcnn::cuda::Target;

struct Way {
  const char* name;
  bool side_stream;
  bool shifted;         // every tensor begins one element after an aligned address
  bool nan_workspace;   // or as allocated: then a sanitizer sees what is read before it is written
  int multiprocessors;  // few, which one problem fills; or so many that tiles are small
};
constexpr Way kWays[] = {
    {"aligned, workspace of NaNs, large tiles", false, false, true, 1},
    {"shifted by an element, a stream of its own, workspace as it comes", true, true, false, 132},
};

int64_t left_out = 0;

// As in the self-test on a CPU.
template <typename Args>
bool plane_channels_last(const Args& args, const Way& way) {
  return (static_cast<int>(args.type) + args.wide_code + way.side_stream) % 2;
}

void ask(cudaError_t status, const char* doing) { check_launch("(test)", status, doing); }

// A tensor's elements and the gaps between them in an allocation that ends with the last one, so
// that compute-sanitizer sees the first byte past it.
class Copy {
 public:
  // `host` may be null: then so is the copy.
  Copy(const void* host, int64_t elements, int64_t element_bytes, bool shifted)
      : bytes_(elements * element_bytes), offset_(shifted ? element_bytes : 0) {
    if (!host) return;
    ask(cudaMalloc(&memory_, static_cast<size_t>(offset_ + bytes_ + !bytes_)), "allocating for");
    ask(cudaMemcpy(data(), host, static_cast<size_t>(bytes_), cudaMemcpyHostToDevice),
        "copying to");
  }
  Copy(const Copy&) = delete;
  Copy& operator=(const Copy&) = delete;
  ~Copy() { cudaFree(memory_); }

  void* data() const { return memory_ ? static_cast<char*>(memory_) + offset_ : nullptr; }

  void back_to(void* host) const {
    if (!memory_) return;
    ask(cudaMemcpy(host, data(), static_cast<size_t>(bytes_), cudaMemcpyDeviceToHost),
        "copying from");
  }

 private:
  int64_t bytes_;
  int64_t offset_;
  void* memory_ = nullptr;
};

// Elements from the first to the last of a tensor, gaps included.
int64_t span(int64_t n, int64_t c, int64_t h, int64_t w, const Strides& strides) {
  if (n * c * h * w == 0) return 0;
  return (n - 1) * strides.n + (c - 1) * strides.c + (h - 1) * strides.h + (w - 1) * strides.w + 1;
}

int64_t input_span(const Geometry& g, const Strides& strides) {
  return span(g.batch, g.in_channels, g.h.in, g.w.in, strides);
}

int64_t weight_span(const Geometry& g, const Strides& strides) {
  return span(g.out_channels, g.in_channels_per_group(), g.h.kernel, g.w.kernel, strides);
}

int64_t output_span(const Geometry& g, const Strides& strides) {
  return span(g.batch, g.out_channels, g.h.out, g.w.out, strides);
}

// Runs function(args, execution) with so many bytes to work in, and waits for it.
template <typename Function, typename Args>
void run(const char* name, int64_t bytes, Function function, const Args& args, const Way& way) {
  const std::vector<unsigned char> nans(static_cast<size_t>(bytes), 0xff);
  void* memory = nullptr;
  cudaStream_t stream = nullptr;
  if (bytes) ask(cudaMalloc(&memory, static_cast<size_t>(bytes)), "allocating for");
  if (bytes && way.nan_workspace) {
    ask(cudaMemcpy(memory, nans.data(), static_cast<size_t>(bytes), cudaMemcpyHostToDevice),
        "copying to");
  }
  if (way.side_stream) {
    ask(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream for");
  }
  function(args, Execution{stream, memory, way.multiprocessors});
  check_launch(name, cudaDeviceSynchronize(), "running");
  if (stream) ask(cudaStreamDestroy(stream), "ending the stream of");
  ask(cudaFree(memory), "freeing the workspace of");
}
template <typename Function, typename Args>
void run(const Kernel& kernel, Function function, const Args& args, const Way& way) {
  const Problem problem{args.geometry, args.type, args.wide_code};
  run(kernel.name, kernel.workspace_bytes ? kernel.workspace_bytes(problem) : 0, function, args,
      way);
}

// A plane of library kernels, which torch allocates: always aligned.
class Plane {
 public:
  // `forward`: what the convolution of these arguments writes. Null: what no one has written.
  Plane(const Kernel& kernel, const Geometry& g, DataType type, const Way& way,
        const ForwardArgs* forward)
      : host_(shape(g), strides_for(Layout::kContiguous, shape(g)), element_size(type),
              signalling_nan(type)),
        device_(filled(kernel, way, forward), shape(g).elements(), element_size(type), false) {}

  void* device() const { return device_.data(); }
  void* back() {
    device_.back_to(host_.data());
    return host_.data();
  }

 private:
  static Shape shape(const Geometry& g) { return {g.batch, g.out_channels, g.h.conv, g.w.conv}; }
  const void* filled(const Kernel& kernel, const Way& way, const ForwardArgs* forward) {
    if (!kernel.library) return nullptr;
    if (forward) {
      ForwardArgs convolution = *forward;
      convolution.bias = nullptr;
      convolution.plane_channels_last = plane_channels_last(*forward, way);
      stock_convolution(convolution, host_.data());
    }
    return host_.data();
  }

  Tensor host_;
  Copy device_;
};

void run_forward(const Kernel& kernel, const ForwardArgs& host, const Way& way) {
  const Geometry& g = host.geometry;
  const int64_t size = element_size(host.type);
  const Plane plane(kernel, g, host.type, way, &host);
  const Copy input(host.input, input_span(g, host.input_strides), size, way.shifted);
  const Copy weight(host.weight, weight_span(g, host.weight_strides), size, way.shifted);
  const Copy bias(host.bias, (g.out_channels - 1) * host.bias_stride + 1, size, way.shifted);
  const int64_t outputs = output_span(g, host.output_strides);
  // torch allocates these: always aligned.
  const Copy output(host.output, outputs, size, false);
  const Copy code(host.code, outputs, host.wide_code ? 4 : 1, false);
  ForwardArgs args = host;
  args.input = input.data();
  args.weight = weight.data();
  args.bias = bias.data();
  args.output = output.data();
  args.code = code.data();
  if (kernel.library) args.input = args.weight = nullptr;
  args.plane = plane.device();
  args.plane_channels_last = plane_channels_last(host, way);
  run(kernel, kernel.forward, args, way);
  output.back_to(host.output);
  code.back_to(host.code);
}

void run_backward(const Kernel& kernel, const BackwardArgs& host, const Way& way) {
  const Geometry& g = host.geometry;
  const int64_t size = element_size(host.type);
  const Copy grad_output(host.grad_output, output_span(g, host.grad_output_strides), size,
                         way.shifted);
  const Copy code(host.code, output_span(g, host.code_strides), host.wide_code ? 4 : 1, false);
  const Copy input(host.input, input_span(g, host.input_strides), size, way.shifted);
  const Copy weight(host.weight, weight_span(g, host.weight_strides), size, way.shifted);
  const Copy grad_input(host.grad_input, input_span(g, host.grad_input_strides), size, false);
  const Copy grad_weight(host.grad_weight, weight_span(g, host.grad_weight_strides), size, false);
  const Copy grad_bias(host.grad_bias, g.out_channels, size, false);
  Plane plane(kernel, g, host.type, way, nullptr);
  BackwardArgs args = host;
  args.grad_output = grad_output.data();
  args.code = code.data();
  args.input = input.data();
  args.weight = weight.data();
  args.grad_input = grad_input.data();
  args.grad_weight = grad_weight.data();
  args.grad_bias = grad_bias.data();
  args.plane = plane.device();
  args.plane_channels_last = plane_channels_last(host, way);
  if (kernel.library) {
    args.input = args.weight = nullptr;
    args.grad_input = args.grad_weight = nullptr;
  }
  run(kernel, kernel.backward, args, way);
  grad_bias.back_to(host.grad_bias);
  if (kernel.library) {
    BackwardArgs convolution = host;
    convolution.grad_bias = nullptr;
    convolution.plane = plane.back();
    convolution.plane_channels_last = plane_channels_last(host, way);
    return stock_convolution_backward(convolution);
  }
  grad_input.back_to(host.grad_input);
  grad_weight.back_to(host.grad_weight);
}

int64_t plane_elements(const Geometry& g) { return g.batch * g.out_channels * g.h.conv * g.w.conv; }

// A vector with an element for each output channel.
int64_t vector_span(const Geometry& g, int64_t stride) { return (g.out_channels - 1) * stride + 1; }

void run_norm_forward(const NormForwardArgs& host, const Way& way) {
  const ForwardArgs& block = host.block;
  const Geometry& g = block.geometry;
  const int64_t size = element_size(block.type), affine_size = element_size(host.affine.type);
  const int64_t statistics_size = element_size(statistics_type(block.type));
  const int64_t outputs = output_span(g, block.output_strides);
  // torch allocates the plane and what is written: always aligned.
  const Copy plane(block.plane, plane_elements(g), size, false);
  const Copy bias(block.bias, vector_span(g, block.bias_stride), size, way.shifted);
  const Copy weight(host.affine.weight, vector_span(g, host.affine.weight_stride), affine_size,
                    way.shifted);
  const Copy shift(host.affine.bias, vector_span(g, host.affine.bias_stride), affine_size,
                   way.shifted);
  const Copy output(block.output, outputs, size, false);
  const Copy code(block.code, outputs, block.wide_code ? 4 : 1, false);
  const Copy extremum(host.extremum, outputs, size, false);
  const Copy mean(host.mean, g.out_channels, statistics_size, false);
  const Copy var(host.var, g.out_channels, statistics_size, false);
  NormForwardArgs args = host;
  args.block.plane = plane.data();
  args.block.bias = bias.data();
  args.affine.weight = weight.data();
  args.affine.bias = shift.data();
  args.block.output = output.data();
  args.block.code = code.data();
  args.extremum = extremum.data();
  args.mean = mean.data();
  args.var = var.data();
  run("batch_norm_forward", fusedcnn::cuda::batch_norm_forward_workspace(args),
      fusedcnn::cuda::batch_norm_forward, args, way);
  output.back_to(block.output);
  code.back_to(block.code);
  extremum.back_to(host.extremum);
  mean.back_to(host.mean);
  var.back_to(host.var);
}

void run_norm_backward(const NormBackwardArgs& host, const Way& way) {
  const BackwardArgs& block = host.block;
  const Geometry& g = block.geometry;
  const int64_t size = element_size(block.type), affine_size = element_size(host.affine.type);
  const int64_t statistics_size = element_size(statistics_type(block.type));
  const Copy grad_output(block.grad_output, output_span(g, block.grad_output_strides), size,
                         way.shifted);
  const Copy code(block.code, output_span(g, block.code_strides), block.wide_code ? 4 : 1, false);
  const Copy extremum(host.extremum, output_span(g, host.extremum_strides), size, way.shifted);
  const Copy mean(host.mean, vector_span(g, host.mean_stride), statistics_size, way.shifted);
  const Copy var(host.var, vector_span(g, host.var_stride), statistics_size, way.shifted);
  const Copy weight(host.affine.weight, vector_span(g, host.affine.weight_stride), affine_size,
                    way.shifted);
  const Copy plane(block.plane, plane_elements(g), size, false);
  const Copy grad_weight(host.grad_bn_weight, g.out_channels, affine_size, false);
  const Copy grad_bias(host.grad_bn_bias, g.out_channels, affine_size, false);
  NormBackwardArgs args = host;
  args.block.grad_output = grad_output.data();
  args.block.code = code.data();
  args.extremum = extremum.data();
  args.mean = mean.data();
  args.var = var.data();
  args.affine.weight = weight.data();
  args.block.plane = plane.data();
  args.grad_bn_weight = grad_weight.data();
  args.grad_bn_bias = grad_bias.data();
  run("batch_norm_backward", fusedcnn::cuda::batch_norm_backward_workspace(args),
      fusedcnn::cuda::batch_norm_backward, args, way);
  plane.back_to(block.plane);
  grad_weight.back_to(host.grad_bn_weight);
  grad_bias.back_to(host.grad_bn_bias);
}

}  // namespace

NormBackend gpu_norm_backend() {
  NormBackend backend{"cuda on a GPU", {}, {}, {}};
  for (const Way& way : kWays) backend.ways.push_back(way.name);
  fusedcnn::cuda::use_device(0);
  backend.forward = [](const NormForwardArgs& args, int way) {
    run_norm_forward(args, kWays[way]);
  };
  backend.backward = [](const NormBackwardArgs& args, int way) {
    run_norm_backward(args, kWays[way]);
  };
  return backend;
}

int64_t problems_left_out() { return left_out; }

Backend gpu_backend(double seconds) {
  Backend backend{"cuda on a GPU", {}, {}};
  for (const Way& way : kWays) backend.ways.push_back(way.name);
  const auto begin = std::chrono::steady_clock::now();
  const Target target{fusedcnn::cuda::use_device(0), true};
  const fusedcnn::cuda::KernelList list = fusedcnn::cuda::kernels();
  for (int i = 0; i < list.count; ++i) {
    const Kernel& kernel = list.kernels[i];
    const auto covers = [&](const Target& gpu) {
      for (const Case& one : cases()) {
        for (const DataType type : {DataType::kFloat32, DataType::kBFloat16}) {
          if (!kernel.why_not(Problem{one.geometry, type, false}, gpu)) return true;
        }
      }
      return false;
    };
    // sm_90 has every kernel; one that serves nothing here is for other GPUs.
    if (!covers(target) && covers(Target{{90, 90, 132, 227 * 1024}, true})) {
      std::printf("  %s %s: not for this GPU\n", name(kernel.pass), kernel.name);
      continue;
    }
    // The convolution runs on the CPU.
    TestedKernel tested{kernel.name,  kernel.pass, kernel.exact || kernel.library,
                        nullptr,      nullptr,     nullptr,
                        kernel.dense, kernel.tf32};
    tested.why_not = [&kernel, target, seconds, begin](const Problem& problem) -> const char* {
      const char* const why_not = kernel.why_not(problem, target);
      const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begin;
      if (why_not || !seconds || passed.count() < seconds) return why_not;
      ++left_out;
      return "the time is over";
    };
    if (kernel.library) {
      tested.stored = [](DataType type, double sum, double bias) {
        return rounded(type, sum) + bias;
      };
    }
    if (kernel.forward) {
      tested.forward = [&kernel](const ForwardArgs& args, int way) {
        // The operator launches nothing for an empty batch.
        if (args.geometry.batch) run_forward(kernel, args, kWays[way]);
      };
    } else {
      tested.backward = [&kernel](const BackwardArgs& args, int way) {
        if (args.geometry.batch || kernel.pass == fusedcnn::Pass::kGradWeight) {
          run_backward(kernel, args, kWays[way]);
        }
      };
    }
    backend.kernels.push_back(tested);
  }
  return backend;
}

TransposeBackend gpu_transpose_backend() {
  TransposeBackend backend;
  for (const Way& way : kWays) backend.ways.push_back(way.name);
  backend.run = [](const fusedcnn::cuda::TransposeArgs& host, int way) {
    const int64_t size = host.element_bytes;
    const bool shifted = kWays[way].shifted;
    const Copy from(host.from,
                    span(host.images, host.channels, host.rows, host.columns, host.strides), size,
                    shifted);
    const Copy to(host.to, host.images * host.channels * host.rows * host.columns, size, shifted);
    fusedcnn::cuda::TransposeArgs args = host;
    args.from = from.data();
    args.to = to.data();
    run("transpose", 0, fusedcnn::cuda::transpose, args, kWays[way]);
    to.back_to(host.to);
  };
  return backend;
}

}  // namespace selftest
