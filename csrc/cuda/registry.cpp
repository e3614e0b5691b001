// The one list of CUDA kernels. Within a pass, first come, first served.
#include "cuda/kernel.h"

namespace fusedcnn::cuda {

// Each is defined in kernels/<pass>_<name>.cu.
using WhyNot = const char*(const Problem& problem, const Target& target);
using WorkspaceBytes = int64_t(const Problem& problem);
using Forward = void(const ForwardArgs& args, const Execution& execution);
using Backward = void(const BackwardArgs& args, const Execution& execution);
WhyNot why_not_general, why_not_cuda_cores_3x3, why_not_tensor_cores_3x3,
    why_not_tensor_cores_3xtf32;
WhyNot why_not_winners_3x3_few_channels, why_not_grad_weight_winners_3x3,
    why_not_grad_input_winners_3x3;
Forward forward_tensor_cores_3x3, forward_tensor_cores_3xtf32, forward_cuda_cores_3x3,
    forward_general;
WorkspaceBytes grad_weight_tensor_cores_3x3_workspace,
    grad_weight_winners_3x3_few_channels_workspace, grad_weight_winners_3x3_workspace,
    grad_weight_general_workspace;
Backward grad_weight_tensor_cores_3x3, grad_weight_winners_3x3_few_channels,
    grad_weight_winners_3x3, grad_weight_general;
Backward grad_input_tensor_cores_3x3, grad_input_winners_3x3, grad_input_general;

KernelList kernels() {
  // name, pass, exact, error, why_not, workspace_bytes, forward, backward
  static constexpr Kernel list[] = {
      {"tensor_cores_3x3", Pass::kForward, true, 2, why_not_tensor_cores_3x3, nullptr,
       forward_tensor_cores_3x3, nullptr, /*dense=*/false, /*tf32=*/true},
      {"tensor_cores_3xtf32", Pass::kForward, true, 2, why_not_tensor_cores_3xtf32, nullptr,
       forward_tensor_cores_3xtf32, nullptr},
      {"cuda_cores_3x3", Pass::kForward, true, 2, why_not_cuda_cores_3x3, nullptr,
       forward_cuda_cores_3x3, nullptr},
      {"general", Pass::kForward, true, 2, why_not_general, nullptr, forward_general, nullptr},
      {"tensor_cores_3x3", Pass::kGradWeight, true, 2, why_not_tensor_cores_3x3,
       grad_weight_tensor_cores_3x3_workspace, nullptr, grad_weight_tensor_cores_3x3,
       /*dense=*/true, /*tf32=*/true},
      {"winners_3x3_few_channels", Pass::kGradWeight, true, 2, why_not_winners_3x3_few_channels,
       grad_weight_winners_3x3_few_channels_workspace, nullptr,
       grad_weight_winners_3x3_few_channels},
      {"winners_3x3", Pass::kGradWeight, true, 2, why_not_grad_weight_winners_3x3,
       grad_weight_winners_3x3_workspace, nullptr, grad_weight_winners_3x3},
      {"general", Pass::kGradWeight, true, 2, why_not_general, grad_weight_general_workspace,
       nullptr, grad_weight_general},
      {"tensor_cores_3x3", Pass::kGradInput, true, 2, why_not_tensor_cores_3x3, nullptr, nullptr,
       grad_input_tensor_cores_3x3, /*dense=*/false, /*tf32=*/true},
      {"winners_3x3", Pass::kGradInput, true, 2, why_not_grad_input_winners_3x3, nullptr, nullptr,
       grad_input_winners_3x3},
      {"general", Pass::kGradInput, true, 2, why_not_general, nullptr, nullptr, grad_input_general},
  };
  return {list, sizeof list / sizeof *list};
}

}  // namespace fusedcnn::cuda
