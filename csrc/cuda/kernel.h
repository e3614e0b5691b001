// The contract between selection and the CUDA kernels. Torch-free: raw pointers, sizes, a stream.
#pragma once

#include <cstdint>

#include "core/arguments.h"
#include "core/geometry.h"

namespace fusedcnn::cuda {

using fusedcnn::BackwardArgs;
using fusedcnn::ForwardArgs;
using fusedcnn::Pass;
using fusedcnn::Problem;

// The device that a call runs on.
struct Device {
  int capability;  // 10 * major + minor: 90 for sm_90
  int code;        // the same of the code that runs there; lower for an older GPU's PTX
  int multiprocessors;
  int64_t shared_bytes;  // that one block can have
};

// What selection may look at besides the problem.
struct Target {
  Device device;
  bool allow_tf32;  // torch's own convolutions may round float32 operands to tf32
  // By their places in the list, why kernels must not run on this device, or null; null: all may.
  // Holds only where no kernel is forced.
  const char* const* refused = nullptr;
};

// Where a kernel runs. `workspace`: as many bytes as the kernel's workspace_bytes asked for,
// 256-byte aligned, of unspecified content, this call's own until its launches have run.
// `multiprocessors`: the GPU's, for choices of blocks and tiles on which no result depends.
struct Execution {
  void* stream;  // a cudaStream_t
  void* workspace;
  int multiprocessors;
};

// One kernel. `why_not` returns null where the kernel covers the problem and otherwise the reason
// why it does not. Exactly one of `forward` and `backward` is set; a grad_weight kernel also
// computes grad_bias. Both only launch: they neither wait nor allocate.
struct Kernel {
  const char* name;  // as in csrc/cpu where it is the same method: "winners_3x3", ...
  Pass pass;
  bool exact;  // small integers give exact results, and equal outputs in a window tie
  int error;   // at most, in errors of the stock layers: see docs/accuracy.md
  const char* (*why_not)(const Problem& problem, const Target& target);
  // Bytes of device memory to work in; null: none. A function of the problem alone, as is the order
  // of all sums: results depend on no device.
  int64_t (*workspace_bytes)(const Problem& problem);
  void (*forward)(const ForwardArgs& args, const Execution& execution);
  void (*backward)(const BackwardArgs& args, const Execution& execution);
  // A grad_weight kernel that multiplies every pixel by a gradient, as stock layers do, zeros too:
  // NaN spreads from a pixel that is not finite to weights that no gradient links to it.
  bool dense = false;
  bool tf32 = false;  // rounds float32 operands to tf32
  // Whether it stands around the stock convolution, which the caller runs: the forward reads
  // args.plane, without the bias, instead of input and weight; the backward writes args.plane, the
  // same for both passes, instead of the gradients of input and weight, unless it is null.
  bool library = false;
  // Null, or why another kernel would be faster: holds only where no kernel is forced.
  const char* (*why_slower)(const Problem& problem, const Target& target) = nullptr;
};

struct KernelList {
  const Kernel* kernels;  // in order of preference, within each pass
  int count;
};

// The one list of kernels, in registry.cpp: selection and tests read it.
KernelList kernels();

}  // namespace fusedcnn::cuda
