// Calls of kernels whose results are checked against the reference.
#pragma once

#include <string>
#include <vector>

#include "backend.h"
#include "calls.h"
#include "reference.h"

namespace selftest {

inline constexpr fusedcnn::DataType kTypes[] = {
    fusedcnn::DataType::kFloat32, fusedcnn::DataType::kFloat64, fusedcnn::DataType::kBFloat16,
    fusedcnn::DataType::kFloat16};

// Checks `got` against `want`, rounded to the element type; the failure names the first difference.
bool check_values(fusedcnn::DataType type, const std::vector<double>& got,
                  const std::vector<double>& want, const std::string& what);

// Kernels that are not `exact` compute in float and round on the way: their values lie within a few
// float roundings of the largest result, and their winners are as good as the best element within
// that. Values that are not finite must agree exactly.
void check_rounded(const fusedcnn::Problem& problem, const Operands& operands, const Forward& got,
                   const Forward& want, const std::string& what);

// What one call is, for messages.
std::string describe(const Backend& backend, const Call& call, const std::string& data);

// Runs one kernel and checks all that it returns. `dense`: the gradients where those of zero are
// multiplied, too, if that makes a difference. They are a library kernel's; a dense kernel's
// grad_weight may be NaN where theirs is.
void check_call(const Call& call, const Operands& operands, const Forward& want,
                const Gradients& grads, const std::string& what, const Gradients* dense = nullptr);

// Calls body(problem, kernel index) for every problem on `g` that a kernel of the backend covers.
template <typename Body>
void for_covering_kernels(const Backend& backend, const fusedcnn::Geometry& g, const Body& body) {
  for (const fusedcnn::DataType type : kTypes) {
    for (const bool wide : {false, true}) {
      if (!wide && g.window() > fusedcnn::kLargestByteWindow) continue;
      const fusedcnn::Problem problem{g, type, wide};
      for (int k = 0; k < static_cast<int>(backend.kernels.size()); ++k) {
        if (!backend.kernels[k].why_not(problem)) body(problem, k);
      }
    }
  }
}

}  // namespace selftest
