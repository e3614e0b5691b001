#include "cuda/kernels.h"
#include "cuda/kernels/forward_general.h"

namespace fusedcnn::cuda {

void forward_general(const ForwardArgs& args, const Execution& execution) {
  for_storage(args.type,
              [&](auto storage) { forward_general_typed<decltype(storage)>(args, execution); });
}

}  // namespace fusedcnn::cuda
