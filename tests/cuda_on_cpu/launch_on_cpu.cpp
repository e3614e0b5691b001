// The host functions of csrc/cuda/launch.h.
#include "cuda/launch.h"
#include "machine.h"

namespace fusedcnn::cuda {

int64_t most_blocks() { return cuda_on_cpu::options().most_blocks; }

const Device& use_device(int) { return cuda_on_cpu::options().device; }

}  // namespace fusedcnn::cuda
