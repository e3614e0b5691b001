#include "cuda/kernels.h"
#include "cuda/kernels/backward_weight_general.h"

namespace fusedcnn::cuda {

int64_t grad_weight_general_workspace(const Problem& problem) {
  const int64_t element = problem.type == DataType::kFloat64 ? 8 : 4;  // of an accumulator
  const WeightSizes sizes = weight_sizes(problem.geometry, element);
  return sizes.slabs * problem.geometry.out_channels * sizes.row * element;
}

void grad_weight_general(const BackwardArgs& args, const Execution& execution) {
  for_storage(args.type, [&](auto storage) {
    using S = decltype(storage);
    args.wide_code ? grad_weight_general_typed<S, int32_t>(args, execution)
                   : grad_weight_general_typed<S, uint8_t>(args, execution);
  });
}

}  // namespace fusedcnn::cuda
