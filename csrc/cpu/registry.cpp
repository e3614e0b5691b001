// All CPU kernels of one ISA. Compiled once per ISA, with FUSEDCNN_ISA naming its namespace.
#include "cpu/batch_norm_passes.h"
#include "cpu/kernel.h"
#include "cpu/kernels/backward_general.h"
#include "cpu/kernels/backward_weight_dense.h"
#include "cpu/kernels/batch_norm_channels.h"
#include "cpu/kernels/batch_norm_gradient.h"
#include "cpu/kernels/batch_norm_pool.h"
#include "cpu/kernels/batch_norm_pooled.h"
#include "cpu/kernels/channels_last.h"
#include "cpu/kernels/forward_direct.h"
#include "cpu/kernels/forward_general.h"
#include "cpu/kernels/forward_winograd_f2.h"
#include "cpu/kernels/forward_winograd_f2x2.h"
#include "cpu/kernels/forward_winograd_f4x4.h"
#include "cpu/kernels/library.h"
#include "cpu/kernels/linear.h"
#include "cpu/kernels/multiply_add_rate.h"
#if defined(__AVX2__)
#include "cpu/kernels/backward_input_winners_3x3.h"
#include "cpu/kernels/backward_weight_winners_3x3.h"
#endif

namespace fusedcnn::cpu::FUSEDCNN_ISA {

// The one list of kernels: selection, tests and benchmarks read it. Within a pass, first come,
// first served.
//
// A reference, since machines without this ISA call the function too: to return a copy, compilers
// use the widest registers that the ISA has.
const KernelList& kernels();

const KernelList& kernels() {
  // name, pass, exact, error, winograd, why_not, forward, backward, library, why_slower,
  // without_relu, moment_slots, accumulates
  static constexpr Kernel list[] = {
      {"library", Pass::kForward, true, 2, false, why_not_library, forward_library, nullptr, true,
       library_is_slower},
      {"winograd_f4x4", Pass::kForward, false, 4, true, why_not_winograd_f4x4,
       forward_winograd_f4x4, nullptr, false, nullptr, /*without_relu=*/true,
       winograd_moment_slots},
      {"winograd_f2", Pass::kForward, true, 2, true, why_not_winograd_f2, forward_winograd_f2,
       nullptr, false, nullptr, /*without_relu=*/true, winograd_moment_slots},
      {"winograd_f2x2", Pass::kForward, true, 2, true, why_not_winograd_f2x2, forward_winograd_f2x2,
       nullptr, false, nullptr, /*without_relu=*/true, winograd_moment_slots},
      {"direct", Pass::kForward, true, 2, false, why_not_direct, forward_direct, nullptr, false,
       nullptr, /*without_relu=*/true, direct_moment_slots},
      {"general", Pass::kForward, true, 2, false, why_not_forward_general, forward_general, nullptr,
       false, nullptr, /*without_relu=*/true},
#if defined(__AVX2__)
      {"winners_3x3", Pass::kGradWeight, true, 2, false, why_not_grad_weight_winners_3x3, nullptr,
       grad_weight_winners_3x3},
#endif
      {"dense", Pass::kGradWeight, true, 2, false, why_not_grad_weight_dense, nullptr,
       grad_weight_dense, false, nullptr, false, nullptr, /*accumulates=*/true},
      {"general", Pass::kGradWeight, true, 2, false, why_not_backward_general, nullptr,
       grad_weight_general},
#if defined(__AVX2__)
      {"winners_3x3", Pass::kGradInput, true, 2, false, why_not_3x3_block, nullptr,
       grad_input_winners_3x3},
#endif
      {"general", Pass::kGradInput, true, 2, false, why_not_backward_general, nullptr,
       grad_input_general},
  };
  static constexpr NormPasses norm = {norm_pool, norm_output, norm_sums, norm_gradient,
                                      norm_load, norm_store,  norm_add,  norm_weight};
  static constexpr KernelList result = {
      list, sizeof list / sizeof *list, to_channels_last, multiply_add_rate, &norm, linear};
  return result;
}

}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
