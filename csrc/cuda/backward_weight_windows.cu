#include "cuda/kernels.h"
#include "cuda/kernels/backward_weight_windows.h"

namespace fusedcnn::cuda {

int64_t grad_weight_windows_workspace(const Problem& problem) {
  return for_slots(problem.geometry, [&](auto slots) {
    const WindowsWeightSizes sizes = windows_weight_sizes<slots>(problem.geometry);
    return sizes.slabs * slab_bytes(sizes);
  });
}

int64_t grad_weight_windows_shared(const Problem& problem) {
  return for_slots(problem.geometry, [&](auto slots) {
    return windows_weight_shared<slots>(windows_weight_sizes<slots>(problem.geometry), true);
  });
}

void grad_weight_windows(const BackwardArgs& args, const Execution& execution) {
  for_slots(args.geometry, [&](auto slots) {
    switch (args.type) {
      case DataType::kFloat32: return launch_grad_weight_windows<float, slots>(args, execution);
      case DataType::kBFloat16: return launch_grad_weight_windows<BFloat16, slots>(args, execution);
      case DataType::kFloat16: return launch_grad_weight_windows<Float16, slots>(args, execution);
      case DataType::kFloat64: return;  // why_not_weight_windows
    }
  });
}

}  // namespace fusedcnn::cuda
