// The answer, in double, straight from the definition in csrc/core/geometry.h: no tiles, no
// scratch, no shortcuts.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "core/geometry.h"

namespace selftest {

// All contiguous, in the sizes of the geometry.
struct Operands {
  std::vector<double> input;        // [N, C, H, W]
  std::vector<double> weight;       // [OC, C / groups, KH, KW]
  std::vector<double> bias;         // [OC], or empty for none
  std::vector<double> grad_output;  // [N, OC, OH, OW]
};

struct Forward {
  std::vector<double> output;  // [N, OC, OH, OW]
  std::vector<int32_t> code;   // [N, OC, OH, OW]; -1: off
};

struct Gradients {
  std::vector<double> input;
  std::vector<double> weight;
  std::vector<double> bias;
};

// One convolution output of image n, the bias included.
double convolution(const fusedcnn::Geometry& g, const Operands& operands, int64_t n, int64_t oc,
                   int64_t ch, int64_t cw);

// The convolution output that element `code` of pooled output i's window is (i counts through
// [N, OC, OH, OW]); NaN where there is none.
double window_element(const fusedcnn::Geometry& g, const Operands& operands, int64_t i,
                      int64_t code);

// The same in float, without the bias: the products of at most `chain` taps at a time are added to
// a sum, and these sums to the total.
double window_element_in_chains(const fusedcnn::Geometry& g, const Operands& operands, int64_t i,
                                int64_t code, int chain);

// What becomes of a convolution output before it is pooled, of its sum and its bias.
using Stored = std::function<double(double sum, double bias)>;

// `stored`: null for the sum of both, as it is. `relu`: see fusedcnn::ForwardArgs.
Forward forward(const fusedcnn::Geometry& g, const Operands& operands, const Stored& stored = {},
                bool relu = true);

// The gradients that flow to the winners that `code` names.
Gradients backward(const fusedcnn::Geometry& g, const Operands& operands,
                   const std::vector<int32_t>& code);

// The same in float, without the bias's: the products of at most `chain` winners at a time are
// added to a sum, and these sums to the total.
Gradients backward_in_chains(const fusedcnn::Geometry& g, const Operands& operands,
                             const std::vector<int32_t>& code, int chain);

// The gradients of all convolution outputs, [N, OC, conv h, conv w], most of which are zero.
std::vector<double> convolution_gradient(const fusedcnn::Geometry& g, const Operands& operands,
                                         const std::vector<int32_t>& code);

// What follows from those as stock layers compute it: gradients of zero are multiplied, too, which
// gives NaN where they meet what is not finite. An operand that is empty has no counterpart.
Gradients convolution_backward(const fusedcnn::Geometry& g, const Operands& operands,
                               const std::vector<double>& plane);

}  // namespace selftest
