// All CPU kernels of one ISA. Compiled once per ISA, with FUSEDCNN_ISA naming its namespace.
#include "cpu/kernel.h"
#include "cpu/kernels/backward_general.h"
#include "cpu/kernels/forward_direct.h"
#include "cpu/kernels/forward_general.h"
#include "cpu/kernels/forward_winograd1d.h"
#include "cpu/kernels/forward_winograd2.h"
#include "cpu/kernels/forward_winograd4.h"
#include "cpu/kernels/multiply_add_rate.h"
#if defined(__AVX512BW__)
#include "cpu/kernels/backward_input_windows.h"
#include "cpu/kernels/backward_weight_windows.h"
#endif

namespace fusedcnn::cpu::FUSEDCNN_ISA {

// The one list of kernels: selection, tests and benchmarks read it. Within a pass, first come,
// first served.
KernelList kernels();

KernelList kernels() {
  // name, pass, exact, winograd, why_not, forward, backward
  static constexpr Kernel list[] = {
      {"winograd4", Pass::kForward, false, true, why_not_winograd4, forward_winograd4, nullptr},
      {"winograd1d", Pass::kForward, true, true, why_not_winograd1d, forward_winograd1d, nullptr},
      {"winograd2", Pass::kForward, true, true, why_not_winograd2, forward_winograd2, nullptr},
      {"direct", Pass::kForward, true, false, why_not_direct, forward_direct, nullptr},
      {"general", Pass::kForward, true, false, covers_everything, forward_general, nullptr},
#if defined(__AVX512BW__)
      {"windows", Pass::kGradWeight, true, false, why_not_weight_windows, nullptr,
       grad_weight_windows},
#endif
      {"general", Pass::kGradWeight, true, false, why_not_backward_general, nullptr,
       grad_weight_general},
#if defined(__AVX512BW__)
      {"windows", Pass::kGradInput, true, false, why_not_windows, nullptr, grad_input_windows},
#endif
      {"general", Pass::kGradInput, true, false, why_not_backward_general, nullptr,
       grad_input_general},
  };
  return {list, sizeof list / sizeof *list, multiply_add_rate};
}

}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
