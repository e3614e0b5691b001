#include "cuda/kernels.h"
#include "cuda/kernels/backward_input_general.h"

namespace fusedcnn::cuda {

void grad_input_general(const BackwardArgs& args, const Execution& execution) {
  for_storage(args.type, [&](auto storage) {
    using S = decltype(storage);
    args.wide_code ? grad_input_general_typed<S, int32_t>(args, execution)
                   : grad_input_general_typed<S, uint8_t>(args, execution);
  });
}

}  // namespace fusedcnn::cuda
