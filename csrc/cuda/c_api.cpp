// What Python asks libfusedcnn_cuda, through ctypes: no Python in it, and nothing of torch.
#include <exception>
#include <string>

#include "cuda/select.h"

#define FUSEDCNN_CUDA_API extern "C" __attribute__((visibility("default")))

// The kernels and what they were compiled for, as JSON. Valid for ever.
FUSEDCNN_CUDA_API const char* fusedcnn_cuda_info() {
  static const std::string text = [] {
    std::string json = "{\"toolkit\": \"" FUSEDCNN_CUDA_TOOLKIT "\", \"architectures\": \""  //
        FUSEDCNN_CUDA_ARCHITECTURES "\", \"kernels\": [";
    const fusedcnn::cuda::KernelList list = fusedcnn::cuda::kernels();
    for (int i = 0; i < list.count; ++i) {
      const fusedcnn::cuda::Kernel& kernel = list.kernels[i];
      json += std::string(i ? ", " : "") + "{\"pass\": \"" + name(kernel.pass) +
              "\", \"name\": \"" + kernel.name +
              "\", \"exact\": " + (kernel.exact ? "true" : "false") +
              ", \"error\": " + std::to_string(kernel.error) + "}";
    }
    return json + "]}";
  }();
  return text.c_str();
}

// Null, or why the name was refused; valid until this thread's next call.
FUSEDCNN_CUDA_API const char* fusedcnn_cuda_force(const char* kernel) {
  thread_local std::string message;
  try {
    fusedcnn::cuda::force(kernel);
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

// Valid until this thread's next call.
FUSEDCNN_CUDA_API const char* fusedcnn_cuda_forced() {
  thread_local std::string name;
  name = fusedcnn::cuda::forced_kernel();
  return name.c_str();
}

FUSEDCNN_CUDA_API void fusedcnn_cuda_allow_tf32(int allowed) {
  fusedcnn::cuda::allow_tf32(allowed != 0);
}
