// The contract between selection and the CPU kernels. Torch-free: raw pointers and sizes.
#pragma once

#include <cstdint>

#include "core/geometry.h"

namespace fusedcnn::cpu {

// The caller's thread pool. `run` calls body(begin, end, context) over disjoint ranges that cover
// [0, tasks), possibly at the same time, and returns when all are done. What a task computes must
// not depend on how tasks are grouped or on which thread runs them.
struct ThreadPool {
  void (*run)(int64_t tasks, void (*body)(int64_t begin, int64_t end, void* context),
              void* context);
};

template <typename Body>
void parallel_tasks(const ThreadPool& pool, int64_t tasks, const Body& body) {
  pool.run(
      tasks,
      [](int64_t begin, int64_t end, void* context) {
        for (int64_t task = begin; task < end; ++task) (*static_cast<const Body*>(context))(task);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Pointers are to elements of `type`, except the code's. Tensors have the sizes of the geometry:
// input [N, C, H, W], weight [OC, C/groups, KH, KW], bias [OC], output, grad_output and code
// [N, OC, OH, OW]. `wide_code`: the code's elements are int32 instead of uint8.
struct ForwardArgs {
  Geometry geometry;
  DataType type;
  bool wide_code;
  const void* input;
  Strides input_strides;
  const void* weight;
  Strides weight_strides;
  const void* bias;  // null: none
  int64_t bias_stride;
  void* output;
  void* code;  // null: not wanted
  // The code's too. Contiguous or channels_last, without gaps: what the operator allocates.
  Strides output_strides;
};

// Any of the three gradients may be null: not wanted. Each is overwritten, not added to.
struct BackwardArgs {
  Geometry geometry;
  DataType type;
  bool wide_code;
  const void* grad_output;
  Strides grad_output_strides;
  const void* code;
  Strides code_strides;
  const void* input;  // null allowed when grad_weight is null
  Strides input_strides;
  const void* weight;  // null allowed when grad_input is null
  Strides weight_strides;
  void* grad_input;
  Strides grad_input_strides;
  void* grad_weight;
  Strides grad_weight_strides;
  void* grad_bias;  // contiguous
};

// What selection may look at: enough to decide, nothing that changes from call to call.
struct Problem {
  Geometry geometry;
  DataType type;
  bool wide_code;
};

enum class Pass : int { kForward, kGradWeight, kGradInput };

constexpr const char* name(Pass pass) {
  return pass == Pass::kForward      ? "forward"
         : pass == Pass::kGradWeight ? "grad_weight"
                                     : "grad_input";
}

// One kernel of one ISA. `why_not` returns null where the kernel covers the problem and otherwise
// the reason why it does not. Exactly one of `forward` and `backward` is set; a grad_weight kernel
// also computes grad_bias.
struct Kernel {
  const char* name;  // "general", "direct3x3", ...: the same in every ISA
  Pass pass;
  // Whether small integers give exact results, and equal outputs in a window tie. Winograd's larger
  // transforms only round to about the same size; `allow_winograd` can rule every Winograd kernel
  // out.
  bool exact;
  bool winograd;
  const char* (*why_not)(const Problem& problem);
  void (*forward)(const ForwardArgs& args, const ThreadPool& pool);
  void (*backward)(const BackwardArgs& args, const ThreadPool& pool);
};

struct KernelList {
  const Kernel* kernels;  // in order of preference, within each pass
  int count;
  // Billions of float32 operations a second that one core of this ISA can do in multiply-adds: the
  // yardstick of the benchmarks. Runs for about `seconds`.
  double (*multiply_add_rate)(double seconds);
};

}  // namespace fusedcnn::cpu
