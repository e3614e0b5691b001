// What one call of an operator on CUDA runs with.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "core/selection.h"
#include "cuda/kernel.h"
#include "ops/calls.h"
#include "ops/checks.h"

namespace fusedcnn {

// The kernels' coordinates have 32 bits, and they add two of them. Throws std::runtime_error.
void check_coordinates(const Geometry& g);

// One call's device, stream and working memory.
class Session {
 public:
  explicit Session(const torch::stable::Tensor& input);

  // The kernel that is to compute the pass: selection's, or where the clock decides, the quickest.
  // run(kernel) computes the pass, which the chosen kernel then does once more; never while a graph
  // is captured. wanted: which results, for the clock.
  const cuda::Kernel& choose(Pass pass, const Problem& problem, int wanted,
                             const std::function<void(const cuda::Kernel&)>& run) const;

  std::vector<Verdict> explain(Pass pass, const Problem& problem) const;

  // Throws std::runtime_error where the kernels of a BatchNorm must not run.
  void check_batch_norm() const;

  // Runs function(args, execution) with so many bytes to work in.
  template <typename Args>
  void run(int64_t bytes, void (*function)(const Args& args, const cuda::Execution& execution),
           const Args& args) const {
    // Freed at return, to torch's allocator, which hands it out again in the stream's order only.
    std::optional<torch::stable::Tensor> workspace;
    if (bytes) workspace = empty_vector(input_, bytes, torch::headeronly::ScalarType::Byte);
    function(args, cuda::Execution{stream_, workspace ? workspace->mutable_data_ptr() : nullptr,
                                   target_.device.multiprocessors});
  }
  // The kernel's function, with the memory that it asks for.
  template <typename Args>
  void run(const cuda::Kernel& kernel,
           void (*function)(const Args& args, const cuda::Execution& execution),
           const Args& args) const {
    const Problem problem = problem_of(args.geometry, args.type, args.wide_code, {});
    run(kernel.workspace_bytes ? kernel.workspace_bytes(problem) : 0, function, args);
  }

  // Whether torch's convolutions multiply operands of this type on tensor cores.
  bool on_tensor_cores(DataType type) const;

 private:
  const cuda::Kernel* quickest(Pass pass, const Problem& problem, int wanted,
                               const std::function<void(const cuda::Kernel&)>& run) const;

  const torch::stable::Tensor& input_;
  const torch::stable::accelerator::DeviceGuard guard_;
  const cuda::Target target_;
  void* const stream_;
};

}  // namespace fusedcnn
