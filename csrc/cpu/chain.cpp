#include "cpu/chain.h"

#include <algorithm>

#include "cpu/scratch.h"

namespace fusedcnn::cpu {
namespace {

// Images that go through the layers together: a weight of a fully connected layer is read once for
// all of them, and their activations share L2 with it.
constexpr int64_t kImages = 16;
constexpr int64_t kImageBytes = int64_t{512} << 10;  // of the two largest activations

const ThreadPool kSerial = {[](int64_t tasks, void (*body)(int64_t, int64_t, void*),
                               void* context) { body(0, tasks, context); }};

int64_t features(const Geometry& g) { return g.out_channels * g.outputs(); }

// `count` images from `first` on through all layers.
void run_images(const ChainArgs& args, int64_t first, int64_t count, bool own_pools) {
  const float* input = args.input + first * args.input_strides.n;
  Strides strides = args.input_strides;
  size_t stage = 0;
  const size_t last = args.blocks.size() + args.layers.size() - 1;
  // Where a stage writes an image's `size` elements: by turns, since it reads the stage before.
  const auto output_of = [&](int64_t size) {
    float* const to =
        stage == last ? args.output + first * size
                      : static_cast<float*>(scratch(stage % 2 ? Slot::kChainOdd : Slot::kChainEven,
                                                    count * size * int64_t{sizeof(float)}));
    ++stage;
    return to;
  };
  for (const ChainBlock& block : args.blocks) {
    ForwardArgs call = block.args;
    Geometry& g = call.geometry;
    g.batch = count;
    g.undivided = !own_pools;
    call.input = input;
    call.input_strides = strides;
    float* const output = output_of(features(g));
    call.output = output;
    call.output_strides = {features(g), g.outputs(), g.w.out, 1};
    block.kernel->forward(call, own_pools ? block.pool : kSerial);
    input = output;
    strides = call.output_strides;
  }
  for (const ChainLayer& layer : args.layers) {
    LinearArgs call = layer.args;
    call.rows = count;
    call.input = input;
    call.input_stride = call.in_features;
    call.output = output_of(call.out_features);
    call.output_stride = call.out_features;
    args.linear(call, own_pools ? layer.pool : kSerial);
    input = call.output;
  }
}

}  // namespace

void chain_forward(const ChainArgs& args, const ThreadPool* pool) {
  if (!pool) return run_images(args, 0, args.batch, /*own_pools=*/true);
  int64_t bytes = 1;
  for (const ChainBlock& block : args.blocks) {
    bytes = std::max(bytes, 2 * features(block.args.geometry) * int64_t{sizeof(float)});
  }
  const int64_t images = std::clamp<int64_t>(kImageBytes / bytes, 1, kImages);
  struct Context {
    const ChainArgs& args;
    int64_t images;
  } context{args, images};
  const auto body = [](int64_t begin, int64_t end, void* opaque) {
    const auto [args, images] = *static_cast<const Context*>(opaque);
    for (int64_t first = begin; first < end; first += images) {
      run_images(args, first, std::min(images, end - first), /*own_pools=*/false);
    }
  };
  pool->run(args.batch, body, &context);
}

}  // namespace fusedcnn::cpu
