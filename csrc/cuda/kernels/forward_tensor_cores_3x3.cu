// The forward on tensor cores with one product: the half types, and float32 rounded to tf32.
#include "cuda/kernels/forward_tensor_cores.h"

namespace fusedcnn::cuda {

const char* why_not_tensor_cores_3x3(const Problem& problem, const Target& target) {
  if (problem.type == DataType::kFloat32 && !target.allow_tf32) return "tf32 is not allowed";
  if (const char* reason = why_not_sm_80(target.device)) return reason;
  return why_not_3x3_block(problem);
}

const char* forward_3x3_is_slower(const Problem& problem, const Target& target) {
  // Of a slice of 8 planes, sm_90's code has some 3,100 warp instructions that fetch pixels and
  // weights around 339 that multiply. Where a block's channels are many slices, that is a sixth of
  // the rate of cuDNN's convolutions on tensor cores, and the way of their outputs through memory
  // is short beside them. Float32 without tf32 has no such convolutions.
  const Geometry& g = problem.geometry;
  if (g.in_channels < 128 || g.out_channels < 128) return nullptr;
  const bool tf32 = target.allow_tf32 && target.device.capability >= 80;
  const bool tensor_cores = problem.type != DataType::kFloat32 || tf32;
  return tensor_cores ? "128 channels or more on both sides, which cuDNN multiplies faster"
                      : nullptr;
}

void forward_tensor_cores_3x3(const ForwardArgs& args, const Execution& execution) {
  for_block_storage(args.type, [&](auto storage) {
    using S = decltype(storage);
    constexpr int kFew = 4 / kPerWord<S>;  // planes of up to four channels
    if (args.geometry.in_channels <= 4) {
      forward_tensor_cores_planes<S, kFew, 1>(args, execution);
    } else {
      forward_tensor_cores_planes<S, 8, 1>(args, execution);
    }
  });
}

}  // namespace fusedcnn::cuda
