// Blocks in a row and the fully connected layers behind them, float32, forward only: inference of a
// small network in one call. Torch-free.
//
// What passes from layer to layer stays in working memory: a few images go through all layers, then
// the next few, so that nothing leaves a core's L2. Where there are too few images to share out,
// all go through a layer at a time, which its kernel shares out as it does by itself.
//
// Working memory, beside the kernels': two layers' outputs of a few images (of all in the second
// case) for each thread.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernel.h"

namespace fusedcnn::cpu {

struct ChainBlock {
  ForwardArgs args;  // geometry (of the whole batch), type, weight and bias; the rest is set here
  const Kernel* kernel;  // no library kernel
  ThreadPool pool;       // for the whole batch
};

struct ChainLayer {
  LinearArgs args;  // features, weight, bias, relu
  ThreadPool pool;
};

struct ChainArgs {
  std::vector<ChainBlock> blocks;  // at least one; each takes what the one before returns
  std::vector<ChainLayer> layers;  // the first takes an image's [C, H, W] as its features
  void (*linear)(const LinearArgs& args, const ThreadPool& pool);
  int64_t batch;
  const float* input;  // [N, C, H, W]
  Strides input_strides;
  float* output;  // of the last block or layer, contiguous
};

// pool: shares the images out; null: each layer's own shares its work out.
void chain_forward(const ChainArgs& args, const ThreadPool* pool);

}  // namespace fusedcnn::cpu
