#include "cuda/kernels.h"

#include <initializer_list>

namespace fusedcnn::cuda {

KernelList kernels() {
  // name, pass, exact, why_not, workspace_bytes, forward, backward
  static constexpr Kernel list[] = {
      {"tensor_cores_3x3", Pass::kForward, true, why_not_tensor_cores_3x3, nullptr,
       forward_tensor_cores_3x3, nullptr},
      {"tensor_cores_3xtf32", Pass::kForward, true, why_not_tensor_cores_3xtf32, nullptr,
       forward_tensor_cores_3xtf32, nullptr},
      {"cuda_cores_3x3", Pass::kForward, true, why_not_cuda_cores_3x3, nullptr,
       forward_cuda_cores_3x3, nullptr},
      {"general", Pass::kForward, true, why_not_general, nullptr, forward_general, nullptr},
      {"tensor_cores_3x3", Pass::kGradWeight, true, why_not_tensor_cores_3x3,
       grad_weight_tensor_cores_3x3_workspace, nullptr, grad_weight_tensor_cores_3x3,
       /*dense=*/true},
      {"winners_3x3_few_channels", Pass::kGradWeight, true, why_not_winners_3x3_few_channels,
       grad_weight_winners_3x3_few_channels_workspace, nullptr,
       grad_weight_winners_3x3_few_channels},
      {"winners_3x3", Pass::kGradWeight, true, why_not_grad_weight_winners_3x3,
       grad_weight_winners_3x3_workspace, nullptr, grad_weight_winners_3x3},
      {"general", Pass::kGradWeight, true, why_not_general, grad_weight_general_workspace, nullptr,
       grad_weight_general},
      {"tensor_cores_3x3", Pass::kGradInput, true, why_not_tensor_cores_3x3, nullptr, nullptr,
       grad_input_tensor_cores_3x3},
      {"winners_3x3", Pass::kGradInput, true, why_not_grad_input_winners_3x3, nullptr, nullptr,
       grad_input_winners_3x3},
      {"general", Pass::kGradInput, true, why_not_general, nullptr, nullptr, grad_input_general},
  };
  return {list, sizeof list / sizeof *list};
}

const char* why_not_general(const Problem& problem, const Target&) {
  const Geometry& g = problem.geometry;
  // Coordinates along an axis are 32-bit, and so are places among an output channel's weights;
  // offsets and counts of elements are not. No coordinate is more than four extents away from 0.
  constexpr int64_t kLargest = int64_t{1} << 28;
  if (g.in_channels_per_group() * g.taps() >= kLargest) {
    return "an output channel has 2^28 weights or more";
  }
  if (g.outputs() >= kLargest) return "a channel has 2^28 pooled outputs or more";
  for (const Axis* axis : {&g.h, &g.w}) {
    for (const int64_t extent : {axis->in + axis->padding + axis->padding_after, axis->stride,
                                 axis->dilation, axis->pool_stride, axis->pool_dilation}) {
      if (extent >= kLargest) return "an axis reaches over 2^28 elements or more, padding included";
    }
  }
  return nullptr;
}

namespace {

// Whether the block is a 3x3 convolution of stride 1 under a 2x2 pool of stride 2.
const char* why_not_3x3_block(const Geometry& g) {
  for (const Axis* axis : {&g.h, &g.w}) {
    if (axis->kernel != 3 || axis->stride != 1 || axis->dilation != 1) {
      return "the convolution is not 3x3 with stride 1 and dilation 1";
    }
    if (axis->pool_kernel != 2 || axis->pool_stride != 2 || axis->pool_padding ||
        axis->pool_dilation != 1) {
      return "the pool is not 2x2 with stride 2, without padding";
    }
  }
  // They count images, and tiles of an image, in 32 bits.
  constexpr int64_t kLargest = int64_t{1} << 30;
  if (g.batch >= kLargest) return "2^30 images or more";
  if ((g.outputs() + g.h.out + g.w.out + 1) * g.out_channels >= kLargest) {
    return "an image has some 2^30 outputs or more";
  }
  return g.groups == 1 ? nullptr : "groups";
}

// Whether matrix instructions exist, on the GPU and in the code for it.
const char* why_not_sm_80(const Device& device) {
  if (device.capability < 80) return "the GPU is older than sm_80";
  return device.code < 80 ? "compiled for GPUs older than sm_80" : nullptr;
}

}  // namespace

const char* why_not_cuda_cores_3x3(const Problem& problem, const Target& target) {
  if (problem.type != DataType::kFloat32) return "not float32";
  if (problem.wide_code) return "int32 codes";
  if (const char* reason = why_not_3x3_block(problem.geometry)) return reason;
  return why_not_general(problem, target);
}

const char* why_not_winners_3x3_few_channels(const Problem& problem, const Target& target) {
  if (problem.type == DataType::kFloat64) return "float64";
  if (problem.wide_code) return "int32 codes";
  if (problem.geometry.in_channels > 4) return "more than 4 input channels";
  if (const char* reason = why_not_3x3_block(problem.geometry)) return reason;
  return why_not_general(problem, target);
}

const char* why_not_grad_weight_winners_3x3(const Problem& problem, const Target& target) {
  if (problem.type == DataType::kFloat64) return "float64";
  if (problem.wide_code) return "int32 codes";
  if (const char* reason = why_not_3x3_block(problem.geometry)) return reason;
  if (const char* reason = why_not_general(problem, target)) return reason;
  if (grad_weight_winners_3x3_shared(problem) > target.device.shared_bytes) {
    return "the GPU's blocks have too little shared memory";
  }
  return nullptr;
}

const char* why_not_grad_input_winners_3x3(const Problem& problem, const Target& target) {
  if (problem.type == DataType::kFloat64) return "float64";
  if (problem.wide_code) return "int32 codes";
  // Too few lanes work.
  if (problem.geometry.in_channels < 3) return "fewer than 3 input channels";
  if (const char* reason = why_not_3x3_block(problem.geometry)) return reason;
  if (const char* reason = why_not_general(problem, target)) return reason;
  if (grad_input_winners_3x3_shared(problem) > target.device.shared_bytes) {
    return "the GPU's blocks have too little shared memory";
  }
  return nullptr;
}

const char* why_not_tensor_cores_3x3(const Problem& problem, const Target& target) {
  if (problem.type == DataType::kFloat64) return "float64";
  if (problem.type == DataType::kFloat32 && !target.allow_tf32) return "tf32 is not allowed";
  if (const char* reason = why_not_sm_80(target.device)) return reason;
  if (problem.wide_code) return "int32 codes";
  if (const char* reason = why_not_3x3_block(problem.geometry)) return reason;
  return why_not_general(problem, target);
}

const char* why_not_tensor_cores_3xtf32(const Problem& problem, const Target& target) {
  if (problem.type != DataType::kFloat32) return "not float32";
  // Where tensor cores multiply tf32 at eight times the rate of CUDA cores. sm_86, sm_89 and sm_120
  // do so at the same rate; of others it is not known.
  if (target.device.capability != 80 && target.device.capability != 90) {
    return "neither sm_80 nor sm_90";
  }
  if (const char* reason = why_not_sm_80(target.device)) return reason;
  if (const char* reason = why_not_cuda_cores_3x3(problem, target)) return reason;
  if (forward_tensor_cores_3xtf32_shared(problem) > target.device.shared_bytes) {
    return "the GPU's blocks have too little shared memory";
  }
  // Counts, on either side: a margin for what they leave out.
  if (10 * forward_cuda_cores_3x3_cycles(problem) <
      13 * forward_tensor_cores_3xtf32_cycles(problem)) {
    return "CUDA cores take less than 1.3 times as long";
  }
  return nullptr;
}

}  // namespace fusedcnn::cuda
