// Where the specialised kernels lose to torch's convolution and the pass around it: they stage a
// few channels at a time and suit blocks of few, and cuDNN's products catch up with the plane that
// it writes and reads as channels grow.
//
// Measured on an H200 under torch 2.11 with cuDNN 9.19: time of the kernel / time of `library`, one
// pass, contiguous, 1,024 images of 3 -> 16 channels at 32x32 and 16 -> 32 at 16x16, and 256 of
// 64 -> 128 at 16x16, of the same at 112x112, and of 128 -> 256 at 8x8.
//
//                                       3 -> 16  16 -> 32  64 -> 128 @16  @112  128 -> 256
//   forward      tensor cores, bfloat16    0.17      0.36           1.88   2.8         8.7
//                tensor cores, tf32        0.33      0.47           2.7    3.8          13
//                CUDA cores, float32       0.24      0.72           1.05   1.5         3.0
//   grad_weight  tensor cores, bfloat16    0.11      0.26           0.51   0.60        0.89
//                tensor cores, tf32        0.15      0.12           0.55   0.60        0.93
//                winners, float32          0.15      0.62           3.3    3.6         1.7
//   grad_input   tensor cores, bfloat16    0.09      0.14           0.34               1.6
//                tensor cores, tf32        0.13      0.21           0.55   0.61        2.3
//                winners, float32          1.24      0.52           0.78   3.9         1.4
//
// In between, the bounds below are drawn by straight lines. The forward's come from a kernel that
// fetched its weights for every image (0.51 and 0.69 for 16 -> 32), and its wide columns still do.
// Both gradients by `library` share the pass around them, so bounds are on the low side. In tf32
// and 3 -> 16 channels, CUDA cores take 1.02 (forward) and 0.90 (grad_weight) of the tensor cores'
// time, and round nothing. Small batches were not measured so: 16 -> 32 in float32 at 64 images
// takes 1.4 times as long as stock layers, forward and backward.
#include "cuda/kernel.h"

namespace fusedcnn::cuda {
namespace {

constexpr const char* kManyChannels = "so many channels, which cuDNN multiplies faster";
constexpr const char* kCudaCores = "so few input channels, for which CUDA cores are as quick";

bool few_in_float32(const Problem& problem) {
  return problem.type == DataType::kFloat32 && problem.geometry.in_channels <= 4;
}

// Input channels times output channels. The 3x3 block has few enough of both.
int64_t channel_pairs(const Problem& problem) {
  return problem.geometry.in_channels * problem.geometry.out_channels;
}

}  // namespace

const char* forward_tensor_cores_is_slower(const Problem& problem, const Target&) {
  if (few_in_float32(problem)) return kCudaCores;
  const bool many = problem.type == DataType::kFloat32 && problem.geometry.in_channels > 24;
  return many ? kManyChannels : nullptr;  // of halves, it covers no more than 32
}

const char* forward_cuda_cores_is_slower(const Problem& problem, const Target&) {
  return problem.geometry.in_channels > 32 ? kManyChannels : nullptr;
}

const char* grad_weight_tensor_cores_is_slower(const Problem& problem, const Target&) {
  if (few_in_float32(problem)) return kCudaCores;
  return channel_pairs(problem) > 128 * 128 ? kManyChannels : nullptr;
}

const char* grad_weight_winners_is_slower(const Problem& problem, const Target&) {
  return channel_pairs(problem) > 32 * 32 ? kManyChannels : nullptr;
}

const char* grad_input_tensor_cores_is_slower(const Problem& problem, const Target&) {
  return channel_pairs(problem) > 64 * 128 ? kManyChannels : nullptr;
}

const char* grad_input_winners_is_slower(const Problem& problem, const Target&) {
  if (problem.geometry.in_channels < 8) return "fewer than 8 input channels leave lanes idle";
  return channel_pairs(problem) > 64 * 64 ? kManyChannels : nullptr;
}

}  // namespace fusedcnn::cuda
