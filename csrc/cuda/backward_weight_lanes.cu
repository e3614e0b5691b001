#include "cuda/kernels.h"
#include "cuda/kernels/backward_weight_lanes.h"

namespace fusedcnn::cuda {

int64_t grad_weight_lanes_workspace(const Problem& problem) {
  const LanesSizes sizes = lanes_sizes(problem.geometry);
  return sizes.slabs * slab_bytes(sizes);
}

void grad_weight_lanes(const BackwardArgs& args, const Execution& execution) {
  switch (args.type) {
    case DataType::kFloat32: return grad_weight_lanes_typed<float>(args, execution);
    case DataType::kBFloat16: return grad_weight_lanes_typed<BFloat16>(args, execution);
    case DataType::kFloat16: return grad_weight_lanes_typed<Float16>(args, execution);
    case DataType::kFloat64: return;  // why_not_weight_lanes
  }
}

}  // namespace fusedcnn::cuda
