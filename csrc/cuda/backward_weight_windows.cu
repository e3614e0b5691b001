#include "cuda/kernels.h"
#include "cuda/kernels/backward_weight_windows.h"

namespace fusedcnn::cuda {

int64_t grad_weight_windows_workspace(const Problem& problem) {
  return for_slots(problem.geometry, [&](auto slots) {
    const WindowsWeightSizes sizes = windows_weight_sizes<slots>(problem.geometry);
    return sizes.general.slabs * problem.geometry.out_channels * sizes.general.row * 4;
  });
}

void grad_weight_windows(const BackwardArgs& args, const Execution& execution) {
  for_slots(args.geometry, [&](auto slots) { launch_grad_weight_windows<slots>(args, execution); });
}

}  // namespace fusedcnn::cuda
