#include "reference.h"

#include <cmath>
#include <limits>

namespace selftest {
namespace {

using fusedcnn::Axis;
using fusedcnn::Geometry;

bool inside(int64_t i, int64_t size) { return i >= 0 && i < size; }

int64_t conv_place(const Axis& a, int64_t o, int64_t p) {
  return o * a.pool_stride - a.pool_padding + p * a.pool_dilation;
}

int64_t input_place(const Axis& a, int64_t c, int64_t k) {
  return c * a.stride - a.padding + k * a.dilation;
}

// Calls body(input index, weight index) for every tap of one convolution output that lies inside
// the input.
template <typename Body>
void for_taps(const Geometry& g, int64_t n, int64_t oc, int64_t ch, int64_t cw, const Body& body) {
  const int64_t channels = g.in_channels_per_group();
  const int64_t group = oc / g.out_channels_per_group();
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t kh = 0; kh < g.h.kernel; ++kh) {
      for (int64_t kw = 0; kw < g.w.kernel; ++kw) {
        const int64_t h = input_place(g.h, ch, kh), w = input_place(g.w, cw, kw);
        if (!inside(h, g.h.in) || !inside(w, g.w.in)) continue;
        body(((n * g.in_channels + group * channels + c) * g.h.in + h) * g.w.in + w,
             ((oc * channels + c) * g.h.kernel + kh) * g.w.kernel + kw);
      }
    }
  }
}

}  // namespace

double convolution(const Geometry& g, const Operands& operands, int64_t n, int64_t oc, int64_t ch,
                   int64_t cw) {
  double sum = operands.bias.empty() ? 0 : operands.bias[oc];
  for_taps(g, n, oc, ch, cw, [&](int64_t input, int64_t weight) {
    sum += operands.input[input] * operands.weight[weight];
  });
  return sum;
}

double window_element(const Geometry& g, const Operands& operands, int64_t i, int64_t code) {
  const int64_t n = i / (g.outputs() * g.out_channels), oc = i / g.outputs() % g.out_channels;
  const int64_t o = i % g.outputs();
  const int64_t ch = conv_place(g.h, o / g.w.out, code / g.w.pool_kernel);
  const int64_t cw = conv_place(g.w, o % g.w.out, code % g.w.pool_kernel);
  if (code < 0 || code >= g.window() || !inside(ch, g.h.conv) || !inside(cw, g.w.conv)) {
    return std::numeric_limits<double>::quiet_NaN();
  }
  return convolution(g, operands, n, oc, ch, cw);
}

double window_element_in_chains(const Geometry& g, const Operands& operands, int64_t i,
                                int64_t code, int chain) {
  const int64_t n = i / (g.outputs() * g.out_channels), oc = i / g.outputs() % g.out_channels;
  const int64_t o = i % g.outputs();
  float sum = 0, total = 0;
  int length = 0;
  for_taps(g, n, oc, conv_place(g.h, o / g.w.out, code / g.w.pool_kernel),
           conv_place(g.w, o % g.w.out, code % g.w.pool_kernel),
           [&](int64_t input, int64_t weight) {
             sum = std::fma(static_cast<float>(operands.input[input]),
                            static_cast<float>(operands.weight[weight]), sum);
             if (++length % chain == 0) total += sum, sum = 0;
           });
  return total + sum;
}

Forward forward(const Geometry& g, const Operands& operands, const Stored& stored, bool relu) {
  Operands without_bias = operands;
  without_bias.bias.clear();
  Forward result;
  std::vector<double> map(g.h.conv * g.w.conv);
  for (int64_t i = 0; i < g.batch * g.out_channels; ++i) {
    const int64_t n = i / g.out_channels, oc = i % g.out_channels;
    for (int64_t c = 0; c < g.h.conv * g.w.conv; ++c) {
      map[c] = convolution(g, stored ? without_bias : operands, n, oc, c / g.w.conv, c % g.w.conv);
      if (stored) map[c] = stored(map[c], operands.bias.empty() ? 0 : operands.bias[oc]);
    }
    for (int64_t o = 0; o < g.outputs(); ++o) {
      double best = -std::numeric_limits<double>::infinity();
      int32_t code = -1;  // none yet
      for (int64_t e = 0; e < g.window(); ++e) {
        const int64_t ch = conv_place(g.h, o / g.w.out, e / g.w.pool_kernel);
        const int64_t cw = conv_place(g.w, o % g.w.out, e % g.w.pool_kernel);
        if (!inside(ch, g.h.conv) || !inside(cw, g.w.conv)) continue;
        const double value = map[ch * g.w.conv + cw];
        // The first maximum wins; a NaN beats everything, the last of several.
        if (code < 0 || value > best || std::isnan(value)) {
          best = value;
          code = static_cast<int32_t>(e);
        }
      }
      // ReLU comes before the pool, so a window without elements keeps its -infinity.
      const bool off = relu && code >= 0 && best <= 0;
      result.output.push_back(off ? 0 : best);
      result.code.push_back(off ? -1 : code);
    }
  }
  return result;
}

namespace {

// Calls gradient(output channel, gradient) for every window that has a winner, and product(input,
// weight, gradient) for every tap of it.
template <typename OfGradient, typename OfProduct>
void for_winners(const Geometry& g, const Operands& operands, const std::vector<int32_t>& code,
                 const OfGradient& gradient, const OfProduct& product) {
  for (int64_t i = 0; i < static_cast<int64_t>(code.size()); ++i) {
    if (code[i] < 0) continue;
    const int64_t n = i / (g.outputs() * g.out_channels), oc = i / g.outputs() % g.out_channels;
    const int64_t o = i % g.outputs();
    const int64_t ch = conv_place(g.h, o / g.w.out, code[i] / g.w.pool_kernel);
    const int64_t cw = conv_place(g.w, o % g.w.out, code[i] % g.w.pool_kernel);
    const double value = operands.grad_output[i];
    gradient(oc, value);
    for_taps(g, n, oc, ch, cw,
             [&](int64_t input, int64_t weight) { product(input, weight, value); });
  }
}

}  // namespace

Gradients backward(const Geometry& g, const Operands& operands, const std::vector<int32_t>& code) {
  Gradients grads{std::vector<double>(operands.input.size()),
                  std::vector<double>(operands.weight.size()), std::vector<double>(g.out_channels)};
  for_winners(
      g, operands, code, [&](int64_t oc, double gradient) { grads.bias[oc] += gradient; },
      [&](int64_t input, int64_t weight, double gradient) {
        grads.input[input] += gradient * operands.weight[weight];
        grads.weight[weight] += gradient * operands.input[input];
      });
  return grads;
}

Gradients backward_in_chains(const Geometry& g, const Operands& operands,
                             const std::vector<int32_t>& code, int chain) {
  struct Sum {
    float sum = 0, total = 0;
    int length = 0;
  };
  std::vector<Sum> input(operands.input.size()), weight(operands.weight.size());
  const auto add = [&](Sum* to, double a, double b) {
    to->sum = std::fma(static_cast<float>(a), static_cast<float>(b), to->sum);
    if (++to->length % chain == 0) to->total += to->sum, to->sum = 0;
  };
  for_winners(
      g, operands, code, [](int64_t, double) {},
      [&](int64_t i, int64_t w, double gradient) {
        add(&input[i], gradient, operands.weight[w]);
        add(&weight[w], gradient, operands.input[i]);
      });
  Gradients grads;
  for (const Sum& one : input) grads.input.push_back(one.total + one.sum);
  for (const Sum& one : weight) grads.weight.push_back(one.total + one.sum);
  return grads;
}

std::vector<double> convolution_gradient(const Geometry& g, const Operands& operands,
                                         const std::vector<int32_t>& code) {
  std::vector<double> plane(g.batch * g.out_channels * g.h.conv * g.w.conv);
  for (int64_t i = 0; i < static_cast<int64_t>(code.size()); ++i) {
    if (code[i] < 0) continue;
    const int64_t o = i % g.outputs();
    const int64_t ch = conv_place(g.h, o / g.w.out, code[i] / g.w.pool_kernel);
    const int64_t cw = conv_place(g.w, o % g.w.out, code[i] % g.w.pool_kernel);
    plane[(i / g.outputs() * g.h.conv + ch) * g.w.conv + cw] += operands.grad_output[i];
  }
  return plane;
}

Gradients convolution_backward(const Geometry& g, const Operands& operands,
                               const std::vector<double>& plane) {
  Gradients grads{std::vector<double>(g.batch * g.in_channels * g.h.in * g.w.in),
                  std::vector<double>(g.out_channels * g.in_channels_per_group() * g.taps()),
                  std::vector<double>(g.out_channels)};
  for (int64_t i = 0; i < static_cast<int64_t>(plane.size()); ++i) {
    const int64_t pixel = i % (g.h.conv * g.w.conv), channel = i / (g.h.conv * g.w.conv);
    grads.bias[channel % g.out_channels] += plane[i];
    for_taps(g, channel / g.out_channels, channel % g.out_channels, pixel / g.w.conv,
             pixel % g.w.conv, [&](int64_t input, int64_t weight) {
               if (!operands.weight.empty()) {
                 grads.input[input] += plane[i] * operands.weight[weight];
               }
               if (!operands.input.empty()) {
                 grads.weight[weight] += plane[i] * operands.input[input];
               }
             });
  }
  return grads;
}

}  // namespace selftest
