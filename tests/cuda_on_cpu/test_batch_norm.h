// Checks of the batch normalisation around the stock convolution (csrc/cuda/batch_norm.h).
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "core/batch_norm.h"

namespace selftest {

// Runs the two functions on tensors of the host, in `ways` that must give the same bits.
struct NormBackend {
  std::string name;
  std::vector<std::string> ways;
  std::function<void(const fusedcnn::NormForwardArgs& args, int way)> forward;
  std::function<void(const fusedcnn::NormBackwardArgs& args, int way)> backward;
};

// `quick`: each case and type in one order of plane and outputs only.
void test_batch_norm(const NormBackend& backend, bool quick);

}  // namespace selftest
