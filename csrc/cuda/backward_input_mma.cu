#include "cuda/kernels.h"
#include "cuda/kernels/backward_input_mma.h"

namespace fusedcnn::cuda {

void grad_input_mma(const BackwardArgs& args, const Execution& execution) {
  switch (args.type) {
    case DataType::kFloat32: return grad_input_mma_typed<float>(args, execution);
    case DataType::kBFloat16: return grad_input_mma_typed<BFloat16>(args, execution);
    case DataType::kFloat16: return grad_input_mma_typed<Float16>(args, execution);
    case DataType::kFloat64: return;  // why_not_mma
  }
}

}  // namespace fusedcnn::cuda
