// What the tests of the kernels need to know of a backend: its kernels, and the ways to run them.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "core/arguments.h"

namespace selftest {

struct TestedKernel {
  std::string name;
  fusedcnn::Pass pass;
  bool exact;  // small integers give exact results
  // Null where the kernel covers the problem.
  std::function<const char*(const fusedcnn::Problem&)> why_not;
  // Exactly one of the two is set. `way` counts through Backend::ways. May throw std::exception,
  // which fails the check.
  std::function<void(const fusedcnn::ForwardArgs&, int way)> forward;
  std::function<void(const fusedcnn::BackwardArgs&, int way)> backward;
  bool dense = false;  // grad_weight multiplies by gradients of zero, too
  bool tf32 = false;   // rounds float32 operands to tf32
  // Of a library kernel: the convolution output that it pools, of a sum and its bias.
  std::function<double(fusedcnn::DataType, double sum, double bias)> stored = {};
  bool without_relu = false;  // a forward that can leave ReLU out
  // A grad_weight of a convolution on its own, that can add to what is there.
  bool accumulates = false;
};

struct Backend {
  std::string name;
  // Orders in which tasks or threads run; no result may depend on them.
  std::vector<std::string> ways;
  std::vector<TestedKernel> kernels;
  // What the latest call did with memory that nobody had written, or "" for nothing; called after
  // calls whose operands are small integers. May be empty: the backend cannot tell.
  std::function<std::string()> misuse = {};
};

}  // namespace selftest
