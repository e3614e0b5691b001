// The one list of CUDA kernels. Within a pass, first come, first served.
#include "cuda/kernel.h"

namespace fusedcnn::cuda {

// Each is defined in kernels/<pass>_<name>.cu.
using WhyNot = const char*(const Problem& problem, const Target& target);
using WorkspaceBytes = int64_t(const Problem& problem);
using Forward = void(const ForwardArgs& args, const Execution& execution);
using Backward = void(const BackwardArgs& args, const Execution& execution);
WhyNot why_not_library, why_not_cuda_cores_3x3, why_not_forward_tensor_cores_3x3,
    why_not_tensor_cores_3x3;
WhyNot why_not_grad_weight_winners_3x3;
WhyNot forward_tensor_cores_is_slower, forward_cuda_cores_is_slower,
    grad_weight_tensor_cores_is_slower, grad_weight_winners_is_slower,
    grad_input_tensor_cores_is_slower, grad_input_cuda_cores_is_slower;  // slower.cu
Forward forward_tensor_cores_3x3, forward_cuda_cores_3x3, forward_library;
WorkspaceBytes grad_weight_tensor_cores_3x3_workspace, grad_weight_winners_3x3_workspace,
    backward_library_workspace;
Backward grad_weight_tensor_cores_3x3, grad_weight_winners_3x3;
Backward grad_input_tensor_cores_3x3, grad_input_cuda_cores_3x3;
Backward backward_library;

KernelList kernels() {
  // library: what stands around the convolution is exact, and errs by the plane's rounding at most,
  // as the stock layers do; but the convolution may be Winograd's, which cuDNN takes as it likes.
  // name, pass, exact, error, why_not, workspace_bytes, forward, backward, dense, tf32, library,
  // why_slower
  static constexpr Kernel list[] = {
      {"tensor_cores_3x3", Pass::kForward, true, 2, why_not_forward_tensor_cores_3x3, nullptr,
       forward_tensor_cores_3x3, nullptr, /*dense=*/false, /*tf32=*/true, /*library=*/false,
       forward_tensor_cores_is_slower},
      {"cuda_cores_3x3", Pass::kForward, true, 2, why_not_cuda_cores_3x3, nullptr,
       forward_cuda_cores_3x3, nullptr, /*dense=*/false, /*tf32=*/false, /*library=*/false,
       forward_cuda_cores_is_slower},
      {"library", Pass::kForward, false, 4, why_not_library, nullptr, forward_library, nullptr,
       /*dense=*/false, /*tf32=*/false, /*library=*/true},
      {"tensor_cores_3x3", Pass::kGradWeight, true, 2, why_not_tensor_cores_3x3,
       grad_weight_tensor_cores_3x3_workspace, nullptr, grad_weight_tensor_cores_3x3,
       /*dense=*/true, /*tf32=*/true, /*library=*/false, grad_weight_tensor_cores_is_slower},
      {"winners_3x3", Pass::kGradWeight, true, 2, why_not_grad_weight_winners_3x3,
       grad_weight_winners_3x3_workspace, nullptr, grad_weight_winners_3x3, /*dense=*/false,
       /*tf32=*/false, /*library=*/false, grad_weight_winners_is_slower},
      {"library", Pass::kGradWeight, false, 4, why_not_library, backward_library_workspace, nullptr,
       backward_library, /*dense=*/true, /*tf32=*/false, /*library=*/true},
      {"tensor_cores_3x3", Pass::kGradInput, true, 2, why_not_tensor_cores_3x3, nullptr, nullptr,
       grad_input_tensor_cores_3x3, /*dense=*/false, /*tf32=*/true, /*library=*/false,
       grad_input_tensor_cores_is_slower},
      {"cuda_cores_3x3", Pass::kGradInput, true, 2, why_not_cuda_cores_3x3, nullptr, nullptr,
       grad_input_cuda_cores_3x3, /*dense=*/false, /*tf32=*/false, /*library=*/false,
       grad_input_cuda_cores_is_slower},
      {"library", Pass::kGradInput, false, 4, why_not_library, backward_library_workspace, nullptr,
       backward_library, /*dense=*/false, /*tf32=*/false, /*library=*/true},
  };
  return {list, sizeof list / sizeof *list};
}

}  // namespace fusedcnn::cuda
