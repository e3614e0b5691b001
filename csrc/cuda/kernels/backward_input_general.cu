// The general grad_input kernel, for every geometry.
//
// A thread owns one input pixel (n, h, w) and kR channels of one group, and gathers: for every tap
// that reaches the pixel it finds the convolution output, then the windows that hold it, and asks
// the code of each output channel whether this is the winner. Nothing is scattered, so no sum
// depends on the order in which threads run. Weights come through shared memory, a slice of output
// channels and taps at a time.

#include "cuda/device.h"
#include "cuda/kernel.h"
#include "cuda/kernels/sizes.h"
#include "cuda/launch.h"

namespace fusedcnn::cuda {
namespace {

constexpr int kInputThreads = 256;
// Weights in shared memory, and output channels of a slice at most. The products of one slice make
// one chain of additions; chains are then added up, to round no more than the stock layers do.
constexpr int kWeightSlice = 2048;
constexpr int kSliceChannels = 64;

struct InputSizes {
  AxisSizes h, w;
  int channels, out_channels;  // of a group
  int groups, channel_blocks;
  int slice_channels, slice_taps;
  int64_t pixels, pixel_blocks;  // of all images
};

// Pooled outputs first..last of an axis are those whose windows may hold convolution output `conv`.
struct WindowRange {
  int first, last;
};
FUSEDCNN_DEVICE WindowRange windows_of(const AxisSizes& axis, int conv) {
  const int top = conv + axis.pool_padding;
  const int bottom = top - (axis.pool_kernel - 1) * axis.pool_dilation;
  const int first = bottom <= 0 ? 0 : (bottom + axis.pool_stride - 1) / axis.pool_stride;
  const int last = top / axis.pool_stride;
  return {first, last < axis.out ? last : axis.out - 1};
}

// The element of pooled output o's window that convolution output `conv` is; -1: between two.
FUSEDCNN_DEVICE int element_of(const AxisSizes& axis, int conv, int o) {
  const int distance = conv + axis.pool_padding - o * axis.pool_stride;
  return distance % axis.pool_dilation ? -1 : distance / axis.pool_dilation;
}

// The convolution output whose tap at distance `reach` is input element i; -1: none.
FUSEDCNN_DEVICE int conv_reaching(const AxisSizes& axis, int i, int reach) {
  const int distance = i + axis.padding - reach;
  if (distance < 0 || distance % axis.stride) return -1;
  const int conv = distance / axis.stride;
  return conv < axis.conv ? conv : -1;
}

template <typename S, typename C, int kR>
FUSEDCNN_KERNEL(kInputThreads)
grad_input_general_kernel(BackwardArgs args, InputSizes sizes) {
  using T = Accumulator<S>;
  SharedMemory memory;
  const Shared<T> weights = memory.array<T>(kWeightSlice);  // [slice_taps][slice_channels][kR]
  const AxisSizes &h = sizes.h, &w = sizes.w;
  const int taps = h.kernel * w.kernel;
  const int64_t tasks = sizes.pixel_blocks * sizes.groups * sizes.channel_blocks;

  for (int64_t task = block_index(); task < tasks; task += grid_blocks()) {
    int64_t rest = task;
    const int first_channel = static_cast<int>(rest % sizes.channel_blocks) * kR;
    rest /= sizes.channel_blocks;
    const int64_t group = rest % sizes.groups;
    const int64_t pixel = rest / sizes.groups * kInputThreads + thread_index();
    const bool real = pixel < sizes.pixels;
    const int iw = static_cast<int>(pixel % w.in), ih = static_cast<int>(pixel / w.in % h.in);
    const int64_t n = pixel / w.in / h.in;
    const int64_t first_oc = group * sizes.out_channels;
    const C* const codes =
        static_cast<const C*>(args.code) + n * args.code_strides.n + first_oc * args.code_strides.c;
    const S* const grads = static_cast<const S*>(args.grad_output) +
                           n * args.grad_output_strides.n + first_oc * args.grad_output_strides.c;

    T total[kR];
    FUSEDCNN_UNROLL
    for (int i = 0; i < kR; ++i) total[i] = 0;
    for (int oc0 = 0; oc0 < sizes.out_channels; oc0 += sizes.slice_channels) {
      const int slice_channels = oc0 + sizes.slice_channels <= sizes.out_channels
                                     ? sizes.slice_channels
                                     : sizes.out_channels - oc0;
      for (int tap0 = 0; tap0 < taps; tap0 += sizes.slice_taps) {
        const int slice_taps = tap0 + sizes.slice_taps <= taps ? sizes.slice_taps : taps - tap0;
        sync_threads();  // the slice before is no longer read
        for (int i = thread_index(); i < slice_taps * slice_channels * kR; i += kInputThreads) {
          const int c = first_channel + i % kR, r = oc0 + i / kR % slice_channels;
          const int tap = tap0 + i / kR / slice_channels;
          T value = 0;
          if (c < sizes.channels) {
            value = widen(load_constant(
                static_cast<const S*>(args.weight) + (first_oc + r) * args.weight_strides.n +
                c * args.weight_strides.c + tap / w.kernel * args.weight_strides.h +
                tap % w.kernel * args.weight_strides.w));
          }
          weights[i] = value;
        }
        sync_threads();

        T acc[kR];
        FUSEDCNN_UNROLL
        for (int i = 0; i < kR; ++i) acc[i] = 0;
        for (int t = 0; t < slice_taps; ++t) {
          const int kh = (tap0 + t) / w.kernel, kw = (tap0 + t) % w.kernel;
          const int ch = conv_reaching(h, ih, kh * h.dilation);
          const int cw = conv_reaching(w, iw, kw * w.dilation);
          if (!real || ch < 0 || cw < 0) continue;
          const WindowRange range_h = windows_of(h, ch), range_w = windows_of(w, cw);
          for (int oh = range_h.first; oh <= range_h.last; ++oh) {
            const int ph = element_of(h, ch, oh);
            if (ph < 0) continue;
            for (int ow = range_w.first; ow <= range_w.last; ++ow) {
              const int pw = element_of(w, cw, ow);
              if (pw < 0) continue;
              const int element = ph * w.pool_kernel + pw;
              const C* code = codes + oc0 * args.code_strides.c + oh * args.code_strides.h +
                              ow * args.code_strides.w;
              const S* grad = grads + oc0 * args.grad_output_strides.c +
                              oh * args.grad_output_strides.h + ow * args.grad_output_strides.w;
              for (int r = 0; r < slice_channels; ++r) {
                if (load_code(code + r * args.code_strides.c) != element) continue;
                const T gradient = widen(load_constant(grad + r * args.grad_output_strides.c));
                T weight[kR];
                load_row(weights + (t * slice_channels + r) * kR, weight);
                FUSEDCNN_UNROLL
                for (int i = 0; i < kR; ++i) acc[i] = multiply_add(gradient, weight[i], acc[i]);
              }
            }
          }
        }
        FUSEDCNN_UNROLL
        for (int i = 0; i < kR; ++i) total[i] += acc[i];
      }
    }
    if (!real) continue;
    FUSEDCNN_UNROLL
    for (int i = 0; i < kR; ++i) {
      if (first_channel + i >= sizes.channels) continue;
      const int64_t c = group * sizes.channels + first_channel + i;
      const Strides& to = args.grad_input_strides;
      static_cast<S*>(args.grad_input)[n * to.n + c * to.c + ih * to.h + iw * to.w] =
          narrow<S>(total[i]);
    }
  }
}

// ---- host ---------------------------------------------------------------------------------------

template <typename S, typename C, int kR>
void launch_grad_input_general(const BackwardArgs& args, InputSizes sizes,
                               const Execution& execution) {
  const int taps = sizes.h.kernel * sizes.w.kernel;
  sizes.channel_blocks = (sizes.channels + kR - 1) / kR;
  sizes.slice_channels = sizes.out_channels < kSliceChannels ? sizes.out_channels : kSliceChannels;
  sizes.slice_taps = kWeightSlice / (sizes.slice_channels * kR);
  if (sizes.slice_taps > taps) sizes.slice_taps = taps;
  const int64_t tasks = sizes.pixel_blocks * sizes.groups * sizes.channel_blocks;
  launch("grad_input_general", grad_input_general_kernel<S, C, kR>, blocks_for(tasks),
         kInputThreads, shared_bytes<Accumulator<S>>(kWeightSlice), execution, args, sizes);
}

template <typename S, typename C>
void grad_input_general_typed(const BackwardArgs& args, const Execution& execution) {
  const Geometry& g = args.geometry;
  InputSizes sizes{};
  sizes.h = sizes_of(g.h);
  sizes.w = sizes_of(g.w);
  sizes.channels = static_cast<int>(g.in_channels_per_group());
  sizes.out_channels = static_cast<int>(g.out_channels_per_group());
  sizes.groups = static_cast<int>(g.groups);
  sizes.pixels = g.batch * g.h.in * g.w.in;
  sizes.pixel_blocks = (sizes.pixels + kInputThreads - 1) / kInputThreads;
  if (sizes.channels <= 2) {
    launch_grad_input_general<S, C, 2>(args, sizes, execution);
  } else {
    launch_grad_input_general<S, C, 8>(args, sizes, execution);
  }
}

}  // namespace

void grad_input_general(const BackwardArgs& args, const Execution& execution) {
  for_storage(args.type, [&](auto storage) {
    using S = decltype(storage);
    args.wide_code ? grad_input_general_typed<S, int32_t>(args, execution)
                   : grad_input_general_typed<S, uint8_t>(args, execution);
  });
}

}  // namespace fusedcnn::cuda
