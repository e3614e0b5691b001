// The general grad_weight and grad_bias kernel, for every geometry.
//
// A pooled output passes its gradient to one convolution output, or to none where ReLU is off. So a
// warp takes one output channel, lists 32 pooled outputs at a time in shared memory, the live ones
// only, and walks the list: every lane owns kTaps of the channel's weights (c, kh, kw) and adds
// gradient x input. All lanes are at the same entry, so dead outputs cost nothing.
//
// Sums run over a slab of the pooled outputs of all images; a second kernel adds up the slabs in
// order. How many slabs there are depends on the geometry alone.

#include "cuda/kernels/backward_weight_slabs.h"

namespace fusedcnn::cuda {
namespace {

// partial: [slabs][OC][row].
template <typename S, typename C>
FUSEDCNN_KERNEL(kWeightThreads)
grad_weight_general_kernel(BackwardArgs args, WeightSizes sizes, Accumulator<S>* partial) {
  using T = Accumulator<S>;
  SharedMemory memory;
  // One list per warp: where the input under tap (0, 0) of channel 0 lies, and the gradient.
  const Shared<int64_t> offsets = memory.array<int64_t>(kWeightThreads);
  const Shared<int> rows = memory.array<int>(kWeightThreads);
  const Shared<int> cols = memory.array<int>(kWeightThreads);
  const Shared<T> gradients = memory.array<T>(kWeightThreads);

  const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
  const int list = warp * kWarp;
  const AxisSizes &h = sizes.h, &w = sizes.w;
  const int taps = h.kernel * w.kernel, weights = sizes.row - 1;
  const bool want_weight = args.grad_weight != nullptr;
  const int tap_blocks = want_weight ? sizes.tap_blocks : 1;
  const int64_t tasks =
      sizes.slabs * sizes.groups * sizes.channel_blocks * static_cast<int64_t>(tap_blocks);

  for (int64_t task = block_index(); task < tasks; task += grid_blocks()) {
    int64_t rest = task;
    const int tap_block = static_cast<int>(rest % tap_blocks);
    rest /= tap_blocks;
    const int r = static_cast<int>(rest % sizes.channel_blocks) * kWeightChannels + warp;
    rest /= sizes.channel_blocks;
    const int64_t group = rest % sizes.groups, slab = rest / sizes.groups;
    const bool real = r < sizes.out_channels;
    const int64_t oc = group * sizes.out_channels + r;

    int64_t tap_offset[kTaps];
    int tap_h[kTaps], tap_w[kTaps];
    T acc[kTaps], total[kTaps];
    FUSEDCNN_UNROLL
    for (int i = 0; i < kTaps; ++i) {
      const int k = tap_block * kTapBlock + i * kWarp + lane;
      const int c = k / taps, dh = k % taps / w.kernel * h.dilation,
                dw = k % taps % w.kernel * w.dilation;
      tap_h[i] = want_weight && k < weights ? dh : kOutside;
      tap_w[i] = dw;
      tap_offset[i] =
          c * args.input_strides.c + dh * args.input_strides.h + dw * args.input_strides.w;
      acc[i] = total[i] = 0;
    }
    T bias = 0, bias_total = 0;

    const int64_t last = (slab + 1) * sizes.units / sizes.slabs;
    for (int64_t unit = slab * sizes.units / sizes.slabs; unit < last; ++unit) {
      const int64_t n = unit / sizes.units_per_image;
      const int first = static_cast<int>(unit % sizes.units_per_image) * kUnit;
      const S* const image = static_cast<const S*>(args.input) + n * args.input_strides.n +
                             group * sizes.channels * args.input_strides.c;
      for (int begin = first; begin < first + kUnit && begin < sizes.outputs; begin += kWarp) {
        const int o = begin + lane;
        const int oh = o / w.out, ow = o % w.out;
        int code = -1;
        if (real && o < sizes.outputs) {
          code = load_code(static_cast<const C*>(args.code) + n * args.code_strides.n +
                           oc * args.code_strides.c + oh * args.code_strides.h +
                           ow * args.code_strides.w);
        }
        const uint32_t live = ballot(code >= 0);
        if (code >= 0) {
          const T gradient = widen(
              load_constant(static_cast<const S*>(args.grad_output) +
                            n * args.grad_output_strides.n + oc * args.grad_output_strides.c +
                            oh * args.grad_output_strides.h + ow * args.grad_output_strides.w));
          bias += gradient;
          const int ch =
              oh * h.pool_stride - h.pool_padding + code / w.pool_kernel * h.pool_dilation;
          const int cw =
              ow * w.pool_stride - w.pool_padding + code % w.pool_kernel * w.pool_dilation;
          const int ih = ch * h.stride - h.padding, iw = cw * w.stride - w.padding;
          const int entry = list + count_bits(live & ((1u << lane) - 1));
          offsets[entry] = ih * args.input_strides.h + iw * args.input_strides.w;
          rows[entry] = ih;
          cols[entry] = iw;
          gradients[entry] = gradient;
        }
        sync_warp();
        const int end = list + (want_weight ? count_bits(live) : 0);
        for (int entry = list; entry < end; ++entry) {
          const int64_t offset = offsets[entry];
          const int ih = rows[entry], iw = cols[entry];
          const T gradient = gradients[entry];
          FUSEDCNN_UNROLL
          for (int i = 0; i < kTaps; ++i) {
            if (inside(ih + tap_h[i], h.in) && inside(iw + tap_w[i], w.in)) {
              const T pixel = widen(load_constant(image + offset + tap_offset[i]));
              acc[i] = multiply_add(gradient, pixel, acc[i]);
            }
          }
        }
        sync_warp();  // the next list overwrites this one
      }
      FUSEDCNN_UNROLL
      for (int i = 0; i < kTaps; ++i) total[i] += acc[i], acc[i] = 0;
      bias_total += bias, bias = 0;
    }

    FUSEDCNN_UNROLL
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      bias_total += shuffle_xor(bias_total, lanes);
    }
    if (!real) continue;
    T* const to = partial + (slab * sizes.groups * sizes.out_channels + oc) * sizes.row;
    if (tap_block == 0 && lane == 0) to[weights] = bias_total;
    if (!want_weight) continue;
    FUSEDCNN_UNROLL
    for (int i = 0; i < kTaps; ++i) {
      const int k = tap_block * kTapBlock + i * kWarp + lane;
      if (k < weights) to[k] = total[i];
    }
  }
}

// ---- host ---------------------------------------------------------------------------------------

template <typename S, typename C>
void grad_weight_general_typed(const BackwardArgs& args, const Execution& execution) {
  using T = Accumulator<S>;
  const WeightSizes sizes = weight_sizes(args.geometry, sizeof(T));
  T* const partial = static_cast<T*>(execution.workspace);
  const int tap_blocks = args.grad_weight ? sizes.tap_blocks : 1;
  const int64_t tasks = sizes.slabs * sizes.groups * sizes.channel_blocks * tap_blocks;
  const int64_t shared = shared_bytes<int64_t>(kWeightThreads) +
                         2 * shared_bytes<int>(kWeightThreads) + shared_bytes<T>(kWeightThreads);
  launch("grad_weight_general", grad_weight_general_kernel<S, C>, blocks_for(tasks), kWeightThreads,
         shared, execution, args, sizes, partial);
  launch_grad_weight_finish<S>(args, sizes, partial, execution);
}

}  // namespace

int64_t grad_weight_general_workspace(const Problem& problem) {
  const int64_t element = problem.type == DataType::kFloat64 ? 8 : 4;  // of an accumulator
  const WeightSizes sizes = weight_sizes(problem.geometry, element);
  return sizes.slabs * problem.geometry.out_channels * sizes.row * element;
}

void grad_weight_general(const BackwardArgs& args, const Execution& execution) {
  for_storage(args.type, [&](auto storage) {
    using S = decltype(storage);
    args.wide_code ? grad_weight_general_typed<S, int32_t>(args, execution)
                   : grad_weight_general_typed<S, uint8_t>(args, execution);
  });
}

}  // namespace fusedcnn::cuda
