// libtorch_cuda's C interface, which this library cannot be linked against: a torch without CUDA
// has no such library.
#pragma once

namespace fusedcnn {

// The exported function of this name. Throws std::runtime_error where the process's torch has none.
void* torch_cuda_function(const char* name);

}  // namespace fusedcnn
