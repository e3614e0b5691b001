// Checks of csrc/cuda/transpose.h.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "cuda/transpose.h"

namespace selftest {

// Runs the pass on memory of the host, in several `ways`.
struct TransposeBackend {
  std::vector<std::string> ways;
  std::function<void(const fusedcnn::cuda::TransposeArgs& args, int way)> run;
};

void test_transpose(const TransposeBackend& backend);

}  // namespace selftest
