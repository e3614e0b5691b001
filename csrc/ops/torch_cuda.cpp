#include "ops/torch_cuda.h"

#include <dlfcn.h>

#include <stdexcept>
#include <string>

namespace fusedcnn {

void* torch_cuda_function(const char* name) {
  void* found = dlsym(RTLD_DEFAULT, name);
  if (!found) {
    // Python loads the library without making its symbols known to others.
    if (void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) {
      found = dlsym(library, name);
    }
  }
  if (found) return found;
  throw std::runtime_error(std::string("fusedcnn: this process's torch has no ") + name);
}

}  // namespace fusedcnn
