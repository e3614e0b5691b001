#include "cuda/kernels.h"
#include "cuda/kernels/backward_weight_winners_3x3.h"

namespace fusedcnn::cuda {

int64_t grad_weight_winners_3x3_workspace(const Problem& problem) {
  return for_slots(problem.geometry, [&](auto slots) {
    const WeightWinnersSizes sizes = weight_winners_sizes<slots>(problem.geometry);
    return sizes.slabs * slab_bytes(sizes);
  });
}

int64_t grad_weight_winners_3x3_shared(const Problem& problem) {
  return for_slots(problem.geometry, [&](auto slots) {
    return weight_winners_shared<slots>(weight_winners_sizes<slots>(problem.geometry), true);
  });
}

void grad_weight_winners_3x3(const BackwardArgs& args, const Execution& execution) {
  for_slots(args.geometry, [&](auto slots) {
    switch (args.type) {
      case DataType::kFloat32: return launch_grad_weight_winners_3x3<float, slots>(args, execution);
      case DataType::kBFloat16:
        return launch_grad_weight_winners_3x3<BFloat16, slots>(args, execution);
      case DataType::kFloat16:
        return launch_grad_weight_winners_3x3<Float16, slots>(args, execution);
      case DataType::kFloat64: return;  // why_not_grad_weight_winners_3x3
    }
  });
}

}  // namespace fusedcnn::cuda
