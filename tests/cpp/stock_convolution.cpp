#include "stock_convolution.h"

#include <vector>

#include "storage.h"

namespace selftest {
namespace {

using fusedcnn::Axis;
using fusedcnn::Geometry;
using fusedcnn::Strides;

int64_t place(const Strides& s, int64_t n, int64_t c, int64_t h, int64_t w) {
  return n * s.n + c * s.c + h * s.h + w * s.w;
}

// body(oc, place in the plane) for every convolution output of image n.
template <typename Body>
void for_outputs(const Geometry& g, int64_t n, const Body& body) {
  for (int64_t y = 0; y < g.h.conv; ++y) {
    for (int64_t x = 0; x < g.w.conv; ++x) {
      for (int64_t oc = 0; oc < g.out_channels; ++oc) {
        body(oc, y, x, ((n * g.h.conv + y) * g.w.conv + x) * g.out_channels + oc);
      }
    }
  }
}

// body(c in the group, kh, kw, c, ih, iw) for every product of one convolution output.
template <typename Body>
void for_products(const Geometry& g, int64_t oc, int64_t y, int64_t x, const Body& body) {
  const int64_t channels = g.in_channels_per_group();
  const int64_t first = oc / g.out_channels_per_group() * channels;
  for (int64_t kh = 0; kh < g.h.kernel; ++kh) {
    const int64_t ih = y * g.h.stride - g.h.padding + kh * g.h.dilation;
    if (ih < 0 || ih >= g.h.in) continue;
    for (int64_t kw = 0; kw < g.w.kernel; ++kw) {
      const int64_t iw = x * g.w.stride - g.w.padding + kw * g.w.dilation;
      if (iw < 0 || iw >= g.w.in) continue;
      for (int64_t c = 0; c < channels; ++c) body(c, kh, kw, first + c, ih, iw);
    }
  }
}

}  // namespace

void stock_convolution(const fusedcnn::ForwardArgs& args, void* plane) {
  const Geometry& g = args.geometry;
  for (int64_t n = 0; n < g.batch; ++n) {
    for_outputs(g, n, [&](int64_t oc, int64_t y, int64_t x, int64_t at) {
      double sum = args.bias ? read(args.type, args.bias, oc * args.bias_stride) : 0;
      for_products(g, oc, y, x,
                   [&](int64_t k, int64_t kh, int64_t kw, int64_t c, int64_t ih, int64_t iw) {
                     sum += read(args.type, args.input, place(args.input_strides, n, c, ih, iw)) *
                            read(args.type, args.weight, place(args.weight_strides, oc, k, kh, kw));
                   });
      write(args.type, plane, at, sum);
    });
  }
}

void stock_convolution_backward(const fusedcnn::BackwardArgs& args, const void* plane) {
  const Geometry& g = args.geometry;
  const Strides weight{g.in_channels_per_group() * g.taps(), g.taps(), g.w.kernel, 1};
  const Strides image{g.in_channels * g.h.in * g.w.in, g.h.in * g.w.in, g.w.in, 1};
  std::vector<double> grad_weight(g.out_channels * weight.n), grad_input(g.batch * image.n),
      grad_bias(g.out_channels);
  for (int64_t n = 0; n < g.batch; ++n) {
    for_outputs(g, n, [&](int64_t oc, int64_t y, int64_t x, int64_t at) {
      const double grad = read(args.type, plane, at);
      grad_bias[oc] += grad;
      for_products(
          g, oc, y, x, [&](int64_t k, int64_t kh, int64_t kw, int64_t c, int64_t ih, int64_t iw) {
            if (args.grad_weight) {
              grad_weight[place(weight, oc, k, kh, kw)] +=
                  grad * read(args.type, args.input, place(args.input_strides, n, c, ih, iw));
            }
            if (args.grad_input) {
              grad_input[place(image, n, c, ih, iw)] +=
                  grad * read(args.type, args.weight, place(args.weight_strides, oc, k, kh, kw));
            }
          });
    });
  }
  // Sums of [n, c, h, w] into a strided tensor.
  const auto put = [&](void* to, const Strides& strides, const Strides& dense, int64_t n, int64_t c,
                       int64_t h, int64_t w, const std::vector<double>& sums) {
    for (int64_t i = 0; to && i < n * c * h * w; ++i) {
      const int64_t at = place(strides, i / dense.n, i / dense.c % c, i / dense.h % h, i % w);
      write(args.type, to, at, sums[i]);
    }
  };
  put(args.grad_weight, args.grad_weight_strides, weight, g.out_channels, g.in_channels_per_group(),
      g.h.kernel, g.w.kernel, grad_weight);
  put(args.grad_input, args.grad_input_strides, image, g.batch, g.in_channels, g.h.in, g.w.in,
      grad_input);
  put(args.grad_bias, {0, 1, 0, 0}, {g.out_channels, 1, 1, 1}, 1, g.out_channels, 1, 1, grad_bias);
}

}  // namespace selftest
