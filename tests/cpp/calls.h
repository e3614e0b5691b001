// Calls one kernel on strided copies of dense operands, and gives back dense results.
#pragma once

#include <string>
#include <vector>

#include "backend.h"
#include "reference.h"
#include "tensor.h"

namespace selftest {

// How a kernel is called.
struct Call {
  const TestedKernel* kernel;
  fusedcnn::Problem problem;
  Layout layout;
  int way;
};

// Each returns false, having counted a failure named `what`, when the kernel wrote between the
// elements of a tensor or threw. moments: [slots][OC], for a kernel that writes them.
bool run_forward(const Call& call, const Operands& operands, Forward* result,
                 const std::string& what, bool want_code = true,
                 std::vector<fusedcnn::Moments>* moments = nullptr);

// Fills the gradients that the kernel's pass computes. `want_weight` and `want_bias` apply to
// grad_weight kernels; a gradient that is not wanted is left empty, and operands that it alone
// would need are null.
bool run_backward(const Call& call, const Operands& operands, const std::vector<int32_t>& code,
                  Gradients* result, const std::string& what, bool want_weight = true,
                  bool want_bias = true);

}  // namespace selftest
