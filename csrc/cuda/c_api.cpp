// What Python asks libfusedcnn_cuda, through ctypes: no Python in it, and nothing of torch.
#include <exception>
#include <string>

#include "cuda/launch.h"
#include "cuda/select.h"

#define FUSEDCNN_CUDA_API extern "C" __attribute__((visibility("default")))

// The kernels and what they were compiled for, as JSON. Valid for ever.
FUSEDCNN_CUDA_API const char* fusedcnn_cuda_info() {
  static const std::string text = [] {
    std::string json = "{\"toolkit\": \"" FUSEDCNN_CUDA_TOOLKIT "\", \"architectures\": \""  //
        FUSEDCNN_CUDA_ARCHITECTURES "\", \"measured\": \"";
    for (const int architecture : fusedcnn::cuda::kMeasured) {
      json += std::to_string(architecture) + " ";
    }
    json += "\", \"kernels\": [";
    const fusedcnn::cuda::KernelList list = fusedcnn::cuda::kernels();
    for (int i = 0; i < list.count; ++i) {
      const fusedcnn::cuda::Kernel& kernel = list.kernels[i];
      json += std::string(i ? ", " : "") + "{\"pass\": \"" + name(kernel.pass) +
              "\", \"name\": \"" + kernel.name +
              "\", \"exact\": " + (kernel.exact ? "true" : "false") +
              ", \"tf32\": " + (kernel.tf32 ? "true" : "false") +
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

// Device `index`: "<compute capability> <that of the code for it> <whether it is measured>", three
// numbers, or why the kernels cannot run there. Valid until this thread's next call.
FUSEDCNN_CUDA_API const char* fusedcnn_cuda_device(int index) {
  thread_local std::string text;
  try {
    const fusedcnn::cuda::Device& device = fusedcnn::cuda::use_device(index);
    text = std::to_string(device.capability) + " " + std::to_string(device.code) +
           (fusedcnn::cuda::measured(device) ? " 1" : " 0");
  } catch (const std::exception& error) {
    text = error.what();
  }
  return text.c_str();
}

// For the check of a device (python/fusedcnn/_first_use.py): see select.h. The name is a listed one
// or empty.
FUSEDCNN_CUDA_API void fusedcnn_cuda_try(const char* kernel, int allow_tf32) {
  fusedcnn::cuda::try_kernel(kernel, allow_tf32 != 0);
}
FUSEDCNN_CUDA_API void fusedcnn_cuda_settle(int index, const char* const* refused) {
  fusedcnn::cuda::settle(index, refused);
}

FUSEDCNN_CUDA_API void fusedcnn_cuda_benchmark(int on) { fusedcnn::cuda::benchmark(on != 0); }

FUSEDCNN_CUDA_API void fusedcnn_cuda_allow_tf32(int allowed) {
  fusedcnn::cuda::allow_tf32(allowed != 0);
}
