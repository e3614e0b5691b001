#include "cuda/kernels.h"
#include "cuda/kernels/backward_input_windows.h"

namespace fusedcnn::cuda {

int64_t grad_input_windows_shared(const Problem& problem) {
  return for_columns(problem.geometry, [&](auto columns) {
    return input_windows_shared<columns>(input_windows_sizes<columns>(problem.geometry));
  });
}

void grad_input_windows(const BackwardArgs& args, const Execution& execution) {
  for_columns(args.geometry, [&](auto columns) {
    switch (args.type) {
      case DataType::kFloat32: return launch_grad_input_windows<float, columns>(args, execution);
      case DataType::kBFloat16:
        return launch_grad_input_windows<BFloat16, columns>(args, execution);
      case DataType::kFloat16: return launch_grad_input_windows<Float16, columns>(args, execution);
      case DataType::kFloat64: return;  // why_not_input_windows
    }
  });
}

}  // namespace fusedcnn::cuda
