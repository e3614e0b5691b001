// The CPU kernels of a feature beside AVX-512. Compiled once per feature, with FUSEDCNN_ISA naming
// its namespace.
#include "cpu/kernel.h"
#include "cpu/kernels/backward_input_tiles.h"
#include "cpu/kernels/backward_weight_tiles.h"
#include "cpu/kernels/forward_tiles.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {

// The feature's own kernels; what they do not cover is left to the list of AVX-512.
const KernelList& kernels();

const KernelList& kernels() {
  // name, pass, exact, error, winograd, why_not, forward, backward, library, why_slower
  static constexpr Kernel list[] = {
      {"tiles", Pass::kForward, true, 2, false, why_not_forward_tiles, forward_tiles, nullptr,
       false, forward_tiles_are_slower},
      {"tiles", Pass::kGradWeight, true, 2, false, why_not_grad_weight_tiles, nullptr,
       grad_weight_tiles, false, grad_weight_tiles_are_slower},
      {"tiles", Pass::kGradInput, true, 2, false, why_not_grad_input_tiles, nullptr,
       grad_input_tiles, false, grad_input_tiles_are_slower},
  };
  static constexpr KernelList result = {
      list, sizeof list / sizeof *list, nullptr, nullptr, nullptr, nullptr};
  return result;
}

}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
