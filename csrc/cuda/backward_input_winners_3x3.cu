#include "cuda/kernels.h"
#include "cuda/kernels/backward_input_winners_3x3.h"

namespace fusedcnn::cuda {

int64_t grad_input_winners_3x3_shared(const Problem& problem) {
  return for_columns(problem.geometry, [&](auto columns) {
    return input_winners_shared<columns>(input_winners_sizes<columns>(problem.geometry));
  });
}

void grad_input_winners_3x3(const BackwardArgs& args, const Execution& execution) {
  for_columns(args.geometry, [&](auto columns) {
    switch (args.type) {
      case DataType::kFloat32:
        return launch_grad_input_winners_3x3<float, columns>(args, execution);
      case DataType::kBFloat16:
        return launch_grad_input_winners_3x3<BFloat16, columns>(args, execution);
      case DataType::kFloat16:
        return launch_grad_input_winners_3x3<Float16, columns>(args, execution);
      case DataType::kFloat64: return;  // why_not_grad_input_winners_3x3
    }
  });
}

}  // namespace fusedcnn::cuda
