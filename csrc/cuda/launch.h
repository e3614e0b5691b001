// What a launch needs from the host, free of CUDA's own headers.
#pragma once

#include <cstdint>
#include <functional>

#include "cuda/kernel.h"

namespace fusedcnn::cuda {

// Blocks of one launch at most: kernels loop over what is left, so any number of tasks will do.
// A function, so that a test can make it small.
int64_t most_blocks();

// The block count of a launch for `tasks` tasks, at least one.
inline int64_t blocks_for(int64_t tasks) {
  return tasks < 1 ? 1 : tasks < most_blocks() ? tasks : most_blocks();
}

// Throws std::runtime_error "fusedcnn: <doing> CUDA kernel <name>: <the error>" unless `status`, a
// cudaError_t, is success.
void check_launch(const char* name, int status, const char* doing);

// Lets the kernel be launched with `bytes` of shared memory on this thread's device, and with less.
// No stream operation: graphs may be capturing. Throws as check_launch does.
void allow_shared(const char* name, const void* kernel, int64_t bytes);

// Whether a graph is being captured on the stream.
bool capturing(void* stream);

// How long what `work` launches on the stream takes, in seconds, from an idle stream to its end:
// with the host's calls, where the device waits for them. Waits for it, also while other streams
// are captured. Throws std::runtime_error, which names the kernel.
double seconds_of(const char* kernel, void* stream, const std::function<void()>& work);

// Makes device `index` the one that this thread's next launches run on, and returns its properties,
// which are asked for once. Throws std::runtime_error.
const Device& use_device(int index);

}  // namespace fusedcnn::cuda
