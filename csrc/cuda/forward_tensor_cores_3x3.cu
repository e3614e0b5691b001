#include "cuda/kernels.h"
#include "cuda/kernels/forward_tensor_cores_3x3.h"

namespace fusedcnn::cuda {

void forward_tensor_cores_3x3(const ForwardArgs& args, const Execution& execution) {
  switch (args.type) {
    case DataType::kFloat32: return forward_tensor_cores_3x3_typed<float>(args, execution);
    case DataType::kBFloat16: return forward_tensor_cores_3x3_typed<BFloat16>(args, execution);
    case DataType::kFloat16: return forward_tensor_cores_3x3_typed<Float16>(args, execution);
    case DataType::kFloat64: return;  // why_not_tensor_cores_3x3
  }
}

}  // namespace fusedcnn::cuda
