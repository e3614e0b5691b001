#include "cuda/kernels.h"
#include "cuda/kernels/backward_weight_tensor_cores_3x3.h"

namespace fusedcnn::cuda {

int64_t grad_weight_tensor_cores_3x3_workspace(const Problem& problem) {
  return for_weight_mma(problem, [&](auto storage, auto tiles) {
    const auto sizes = weight_mma_sizes<decltype(storage), tiles>(problem.geometry);
    return sizes.slabs * slab_bytes(sizes);
  });
}

void grad_weight_tensor_cores_3x3(const BackwardArgs& args, const Execution& execution) {
  for_weight_mma({args.geometry, args.type, args.wide_code}, [&](auto storage, auto tiles) {
    launch_grad_weight_tensor_cores_3x3<decltype(storage), tiles>(args, execution);
    return int64_t{0};
  });
}

}  // namespace fusedcnn::cuda
