// The contract between selection and the CPU kernels. Torch-free: raw pointers and sizes.
#pragma once

#include <cstdint>

#include "core/arguments.h"
#include "core/geometry.h"

namespace fusedcnn::cpu {

using fusedcnn::BackwardArgs;
using fusedcnn::ForwardArgs;
using fusedcnn::Pass;
using fusedcnn::Problem;

// The caller's thread pool. `run` calls body(begin, end, context) over disjoint ranges that cover
// [0, tasks), possibly at the same time, and returns when all are done. What a task computes must
// not depend on how tasks are grouped or on which thread runs them.
struct ThreadPool {
  void (*run)(int64_t tasks, void (*body)(int64_t begin, int64_t end, void* context),
              void* context);
};

// Batches smaller than this are split further than into images, by rows or blocks of channels, so
// that several threads have work. Such tasks read some data twice, which larger batches need not
// pay for.
constexpr int64_t kSmallBatch = 8;

template <typename Body>
void parallel_tasks(const ThreadPool& pool, int64_t tasks, const Body& body) {
  pool.run(
      tasks,
      [](int64_t begin, int64_t end, void* context) {
        for (int64_t task = begin; task < end; ++task) (*static_cast<const Body*>(context))(task);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Working memory. All that one call on one thread asks for, in elements of the accumulation type,
// is at most
//   2 x (image + convolution + outputs) + weights, and for grad_weight 16 x weights while that is
//   less than 8 MB, otherwise weights again
// image: of one image as far as the kernel sees it, C x (rows + 8) x (cols + 32), padding included;
// convolution and outputs: OC x (rows + 4) x cols, of one image, before and after the pool;
// weights: OC x C x the larger of the taps and 36; channels and cols in multiples of 16. It does
// not grow with the batch beyond 16, nor with the window; each further thread asks for its share of
// the first term again. Kernels say what they use it for.
//
// One kernel of one ISA. `why_not` returns null where the kernel covers the problem and otherwise
// the reason why it does not. Exactly one of `forward` and `backward` is set; a grad_weight kernel
// also computes grad_bias.
struct Kernel {
  const char* name;  // "general", "direct", ...: the same in every ISA
  Pass pass;
  bool exact;     // small integers give exact results, and equal outputs in a window tie
  int error;      // at most, in errors of the stock layers: see docs/accuracy.md
  bool winograd;  // `allow_winograd` can rule it out
  const char* (*why_not)(const Problem& problem);
  void (*forward)(const ForwardArgs& args, const ThreadPool& pool);
  void (*backward)(const BackwardArgs& args, const ThreadPool& pool);
  // Whether it stands around the stock convolution, which the caller runs: it reads args.plane
  // instead of input and weight.
  bool library = false;
  // Null, or why another kernel would be faster: holds only where no kernel is forced.
  const char* (*why_slower)(const Problem& problem) = nullptr;
  // Whether a forward kernel can leave ReLU out.
  bool without_relu = false;
  // Null, or into how many parts a forward kernel that writes moments splits the batch. A function
  // of the problem alone.
  int64_t (*moment_slots)(const Problem& problem) = nullptr;
  // Whether a grad_weight kernel can add to what is there: see BackwardArgs.
  bool accumulates = false;
};

// Dense images [channels][pixels], which become [pixels][channels].
struct TransposeArgs {
  int64_t element_bytes;  // 2 or 4
  int64_t images, channels, pixels;
  const void* from;
  void* to;
};

// A fully connected layer, float32: output = input weight^T + bias, above zero where `relu`.
struct LinearArgs {
  int64_t rows, in_features, out_features;
  const float* input;  // [rows, in_features], rows `input_stride` apart
  int64_t input_stride;
  const float* weight;  // [out_features, in_features]
  const float* bias;    // [out_features]
  bool relu;
  float* output;  // [rows, out_features], rows `output_stride` apart
  int64_t output_stride;
};

struct NormPasses;  // batch_norm_passes.h

struct KernelList {
  const Kernel* kernels;  // in order of preference, within each pass
  int count;
  void (*to_channels_last)(const TransposeArgs& args, const ThreadPool& pool);
  // Billions of float32 operations a second that one core of this ISA can do in multiply-adds: the
  // yardstick of the benchmarks. Runs for about `seconds`.
  double (*multiply_add_rate)(double seconds);
  // What stands around the convolutions of a block with batch normalisation.
  const NormPasses* norm;
  void (*linear)(const LinearArgs& args, const ThreadPool& pool);
};

}  // namespace fusedcnn::cpu
