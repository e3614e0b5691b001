#include "cuda/kernels.h"
#include "cuda/kernels/backward_weight_winners_3x3_few_channels.h"

namespace fusedcnn::cuda {

int64_t grad_weight_winners_3x3_few_channels_workspace(const Problem& problem) {
  const FewChannelsSizes sizes = few_channels_sizes(problem.geometry);
  return sizes.slabs * slab_bytes(sizes);
}

void grad_weight_winners_3x3_few_channels(const BackwardArgs& args, const Execution& execution) {
  switch (args.type) {
    case DataType::kFloat32:
      return grad_weight_winners_3x3_few_channels_typed<float>(args, execution);
    case DataType::kBFloat16:
      return grad_weight_winners_3x3_few_channels_typed<BFloat16>(args, execution);
    case DataType::kFloat16:
      return grad_weight_winners_3x3_few_channels_typed<Float16>(args, execution);
    case DataType::kFloat64: return;  // why_not_winners_3x3_few_channels
  }
}

}  // namespace fusedcnn::cuda
