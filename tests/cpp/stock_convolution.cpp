#include "stock_convolution.h"

#include <vector>

#include "reference.h"
#include "storage.h"

namespace selftest {
namespace {

using fusedcnn::DataType;
using fusedcnn::Geometry;
using fusedcnn::Strides;

struct Sizes {
  int64_t n, c, h, w;
};

// body(place in a contiguous tensor, place in this one) for every element.
template <typename Body>
void for_elements(Sizes s, const Strides& strides, const Body& body) {
  for (int64_t i = 0; i < s.n * s.c * s.h * s.w; ++i) {
    body(i, i / (s.c * s.h * s.w) * strides.n + i / (s.h * s.w) % s.c * strides.c +
                i / s.w % s.h * strides.h + i % s.w * strides.w);
  }
}

// Empty for a null pointer.
std::vector<double> values(DataType type, const void* data, Sizes sizes, const Strides& strides) {
  std::vector<double> result;
  if (!data) return result;
  for_elements(sizes, strides,
               [&](int64_t, int64_t at) { result.push_back(read(type, data, at)); });
  return result;
}

void store(DataType type, void* data, Sizes sizes, const Strides& strides,
           const std::vector<double>& from) {
  if (!data) return;
  for_elements(sizes, strides, [&](int64_t i, int64_t at) { write(type, data, at, from[i]); });
}

Sizes input_sizes(const Geometry& g) { return {g.batch, g.in_channels, g.h.in, g.w.in}; }
Sizes weight_sizes(const Geometry& g) {
  return {g.out_channels, g.in_channels_per_group(), g.h.kernel, g.w.kernel};
}
Sizes plane_sizes(const Geometry& g) { return {g.batch, g.out_channels, g.h.conv, g.w.conv}; }
Strides plane_strides(const Geometry& g, bool channels_last) {
  const int64_t c = g.out_channels, w = g.w.conv, pixels = g.h.conv * w;
  return channels_last ? Strides{pixels * c, 1, w * c, c} : Strides{pixels * c, pixels, w, 1};
}

}  // namespace

void stock_convolution(const fusedcnn::ForwardArgs& args, void* plane) {
  const Geometry& g = args.geometry;
  Operands operands;
  operands.input = values(args.type, args.input, input_sizes(g), args.input_strides);
  operands.weight = values(args.type, args.weight, weight_sizes(g), args.weight_strides);
  operands.bias =
      values(args.type, args.bias, {1, g.out_channels, 1, 1}, {0, args.bias_stride, 0, 0});
  std::vector<double> sums;
  for_elements(plane_sizes(g), {}, [&](int64_t i, int64_t) {
    const int64_t pixel = i % (g.h.conv * g.w.conv), channel = i / (g.h.conv * g.w.conv);
    sums.push_back(convolution(g, operands, channel / g.out_channels, channel % g.out_channels,
                               pixel / g.w.conv, pixel % g.w.conv));
  });
  store(args.type, plane, plane_sizes(g), plane_strides(g, args.plane_channels_last), sums);
}

void stock_convolution_backward(const fusedcnn::BackwardArgs& args) {
  const Geometry& g = args.geometry;
  Operands operands;
  operands.input = values(args.type, args.input, input_sizes(g), args.input_strides);
  operands.weight = values(args.type, args.weight, weight_sizes(g), args.weight_strides);
  const Gradients gradients = convolution_backward(
      g, operands,
      values(args.type, args.plane, plane_sizes(g), plane_strides(g, args.plane_channels_last)));
  store(args.type, args.grad_input, input_sizes(g), args.grad_input_strides, gradients.input);
  store(args.type, args.grad_weight, weight_sizes(g), args.grad_weight_strides, gradients.weight);
  store(args.type, args.grad_bias, {1, g.out_channels, 1, 1}, {0, 1, 0, 0}, gradients.bias);
}

}  // namespace selftest
