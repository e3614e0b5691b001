#include "cuda/kernels.h"
#include "cuda/kernels/forward_mma.h"

namespace fusedcnn::cuda {

void forward_mma(const ForwardArgs& args, const Execution& execution) {
  switch (args.type) {
    case DataType::kFloat32: return forward_mma_typed<float>(args, execution);
    case DataType::kBFloat16: return forward_mma_typed<BFloat16>(args, execution);
    case DataType::kFloat16: return forward_mma_typed<Float16>(args, execution);
    case DataType::kFloat64: return;  // why_not_mma
  }
}

}  // namespace fusedcnn::cuda
