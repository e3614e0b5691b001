// The host's side of launching: errors and device properties.
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/launch.h"

namespace fusedcnn::cuda {
namespace {

// Compiled as the kernels are: what it was compiled for, they were, too.
__global__ void empty_kernel() {}

}  // namespace

int64_t most_blocks() { return (int64_t{1} << 31) - 1; }

void check_launch(const char* name, int status, const char* doing) {
  if (status == cudaSuccess) return;
  const auto error = static_cast<cudaError_t>(status);
  // It stays the runtime's last error otherwise, and the next launch would be taken to have failed.
  cudaGetLastError();
  throw std::runtime_error(std::string("fusedcnn: ") + doing + " CUDA kernel " + name + ": " +
                           cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

void allow_shared(const char* name, const void* kernel, int64_t bytes) {
  // Of a kernel on a device, for all threads. They only grow: another thread may be about to launch
  // the same kernel with more than this one needs.
  static std::map<std::pair<const void*, int>, int64_t> limits;
  static std::mutex mutex;
  const auto check = [&](cudaError_t status) {
    check_launch(name, status, "asking for shared memory for");
  };
  int device = 0;
  check(cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t& limit = limits[{kernel, device}];
  if (bytes <= limit) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)));
  limit = bytes;
}

bool capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) != cudaSuccess) {
    cudaGetLastError();  // as above
    return true;         // nothing more than launches is safe then
  }
  return status != cudaStreamCaptureStatusNone;
}

double seconds_of(const char* kernel, void* stream, const std::function<void()>& work) {
  const auto check = [&](cudaError_t status) { check_launch(kernel, status, "timing"); };
  // Another stream's capture forbids this thread to wait, unless it says that it knows better.
  struct Relaxed {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
    ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
  };
  struct Event {
    cudaEvent_t event = nullptr;
    ~Event() {
      if (event) cudaEventDestroy(event);
    }
  };
  const Relaxed relaxed;
  Event begin, end;
  check(cudaEventCreate(&begin.event));
  check(cudaEventCreate(&end.event));
  check(cudaEventRecord(begin.event, static_cast<cudaStream_t>(stream)));
  work();
  check(cudaEventRecord(end.event, static_cast<cudaStream_t>(stream)));
  check(cudaEventSynchronize(end.event));
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, begin.event, end.event));
  return milliseconds / 1e3;
}

const Device& use_device(int index) {
  static std::mutex mutex;
  static std::map<int, Device> devices;  // a map keeps its elements where they are
  const auto ask = [&](cudaError_t status) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // as above
    throw std::runtime_error("fusedcnn: using CUDA device " + std::to_string(index) + ": " +
                             cudaGetErrorString(status));
  };
  // This library has a CUDA runtime of its own, and every runtime remembers its own device.
  ask(cudaSetDevice(index));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = devices.find(index);
  if (found != devices.end()) return found->second;
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    ask(cudaDeviceGetAttribute(&value, which, index));
    return value;
  };
  Device device{};
  device.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                      attribute(cudaDevAttrComputeCapabilityMinor);
  // Of another GPU's PTX, compiled by the driver, this is the architecture that the PTX is for.
  cudaFuncAttributes compiled{};
  ask(cudaFuncGetAttributes(&compiled, empty_kernel));
  device.code = compiled.ptxVersion;
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  device.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return devices[index] = device;
}

}  // namespace fusedcnn::cuda
