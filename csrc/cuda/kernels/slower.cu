// Where the specialised kernels lose to torch's convolution and the passes around it: they stage a
// few channels at a time and suit blocks of few, and cuDNN's products catch up with the plane that
// it writes and reads as channels grow. It does so sooner where the input is channels_last, which
// is how cuDNN multiplies.
//
// Measured on an H200 under torch 2.11 with cuDNN 9.19, before the forwards tc and cc were
// rewritten (see there), which may win farther than this says: microseconds of all launches of a
// pass, channels_last / contiguous. Images at 16x16, 32x32 for the third and the fifth, 56x56 for
// the last.
//
//                             16->32 1,024 / 64  32->32 256  32->64 1,024  64->64 256  64->128 64
//   forward      bfloat16  tc  26/22       8/8      42/36        77/67
//                     library  46/65       8/13     43/89        52/104      68/158      82/165
//                tf32      tc  51/40      16/12     88/65       229/156
//                     library  68/82      12/16     61/103       89/133     120/199     131/207
//                float32   cc  99/89      20/19    264/196      433/371     933/685   1,969/1,888
//                     library 154/120     19/15    235/201      344/290     580/509     818/752
//   both         bfloat16  tc  51/55      25/26     79/83       133/140     244/262     725/793
//   gradients         library 107/151     33/46    120/210      151/257     146/367     189/387
//                tf32      tc  75/73      32/33    131/131      228/244     512/529     928/961
//                     library 241/296     39/52    290/411      358/489     363/590     459/670
//                float32    w 353/350     83/83    671/625   1,138/1,095 2,560/2,467 4,172/4,195
//                     library 453/425     59/44    552/563   1,017/1,006 1,771/1,648 1,262/1,138
//
// tc: tensor cores; cc: CUDA cores; w: kernels by winners that both gradients had then. In float32,
// of the gradients by winners, grad_input alone took 148/142, 35/34, 243/235 and 317/312 of the
// first four, and won there but for few outputs. Those of now have a third of these times by count,
// so where one won, they do; that grad_input wins below 8 channels, too, is by count alone. In tf32
// and 3 -> 16 channels, CUDA cores take 1.02 (forward) and 0.90 (grad_weight) of the tensor cores'
// time, and round nothing. The bounds below are drawn through these.
#include "cuda/kernel.h"

namespace fusedcnn::cuda {
namespace {

constexpr const char* kManyChannels = "so many channels, which cuDNN multiplies faster";
constexpr const char* kFewOutputs = "so few outputs, which do not fill a GPU with blocks";
constexpr const char* kCudaCores = "so few input channels, for which CUDA cores are as quick";

bool few_in_float32(const Problem& problem) {
  return problem.type == DataType::kFloat32 && problem.geometry.in_channels <= 4;
}

// Whether there are more pairs of an input and an output channel than the bound of the layout.
bool more_pairs(const Problem& problem, int64_t channels_last, int64_t contiguous) {
  const int64_t pairs = problem.geometry.in_channels * problem.geometry.out_channels;
  return pairs > (problem.channels_last ? channels_last : contiguous);
}

// Of the convolution, in one channel.
bool fewer_outputs(const Problem& problem, int64_t bound) {
  const Geometry& g = problem.geometry;
  return g.batch * g.h.conv * g.w.conv < bound;
}

}  // namespace

const char* forward_tensor_cores_is_slower(const Problem& problem, const Target&) {
  if (few_in_float32(problem)) return kCudaCores;
  const bool tf32 = problem.type == DataType::kFloat32;
  // Of halves in contiguous memory, it wins wherever it serves.
  const bool many = tf32 ? more_pairs(problem, 16 * 32, 32 * 32)
                         : problem.channels_last && more_pairs(problem, 32 * 32, 0);
  return many ? kManyChannels : nullptr;
}

const char* forward_cuda_cores_is_slower(const Problem& problem, const Target&) {
  // Few output channels do not make up for many input channels.
  const bool many = problem.geometry.in_channels > 32 || more_pairs(problem, 16 * 32, 32 * 32);
  return many ? kManyChannels : nullptr;
}

const char* grad_weight_tensor_cores_is_slower(const Problem& problem, const Target&) {
  if (few_in_float32(problem)) return kCudaCores;
  return more_pairs(problem, 32 * 64, 64 * 64) ? kManyChannels : nullptr;
}

const char* grad_weight_winners_is_slower(const Problem& problem, const Target&) {
  if (problem.geometry.in_channels <= 4) return nullptr;
  if (more_pairs(problem, 16 * 32, 16 * 32)) return kManyChannels;
  return fewer_outputs(problem, 1 << 17) ? kFewOutputs : nullptr;
}

const char* grad_input_tensor_cores_is_slower(const Problem& problem, const Target&) {
  return more_pairs(problem, 32 * 64, 64 * 64) ? kManyChannels : nullptr;
}

const char* grad_input_cuda_cores_is_slower(const Problem& problem, const Target&) {
  // A warp's lanes cover 16 x 16 pixels.
  const Geometry& g = problem.geometry;
  if (2 * g.h.in * g.w.in < (g.h.in + 15) / 16 * 16 * ((g.w.in + 15) / 16 * 16)) {
    return "images that leave lanes idle";
  }
  if (more_pairs(problem, 32 * 64, 32 * 64)) return kManyChannels;
  return fewer_outputs(problem, 1 << 16) ? kFewOutputs : nullptr;
}

}  // namespace fusedcnn::cuda
