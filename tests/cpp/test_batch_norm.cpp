#include "test_batch_norm.h"

#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "cases.h"
#include "check.h"
#include "checked_calls.h"
#include "cpu/batch_norm.h"
#include "cpu_backend.h"
#include "operands.h"
#include "reference.h"
#include "storage.h"
#include "tensor.h"

namespace selftest {
namespace {

using fusedcnn::Affine;
using fusedcnn::DataType;
using fusedcnn::Geometry;
using fusedcnn::NormBackwardArgs;
using fusedcnn::NormForwardArgs;
using fusedcnn::Pass;
using fusedcnn::Problem;
using fusedcnn::statistics_type;
using fusedcnn::Strides;
using Values = std::vector<double>;

constexpr double kEps = 1e-3;

// Half a unit in the last place of 1.
double rounding(DataType type) {
  switch (type) {
    case DataType::kFloat32: return 0x1p-24;
    case DataType::kFloat64: return 0x1p-53;
    case DataType::kBFloat16: return 0x1p-8;
    default: return 0x1p-11;
  }
}

struct Affines {
  Values weight, bias;
};

// Both signs, and zeros if wanted.
Affines draw_affine(const Geometry& g, DataType type, bool zeros) {
  const double weights[] = {1, -1.5, 0.5, zeros ? 0 : 2.0, -0.25};
  Random random(12);
  Affines affine;
  for (int64_t c = 0; c < g.out_channels; ++c) {
    affine.weight.push_back(weights[c % 5]);
    affine.bias.push_back(rounded(type, random.real()));
  }
  return affine;
}

// What the forward returns, from the definition in core/batch_norm.h.
struct Normalised {
  Values plane;  // [N, OC, conv h, conv w], as the type holds it
  Values output, extremum, mean, var;
  std::vector<int32_t> code;
};

// Calls body(channel, index into [N, OC, size]) for all of them.
template <typename Body>
void for_channels(const Geometry& g, int64_t size, const Body& body) {
  for (int64_t i = 0; i < g.batch * g.out_channels * size; ++i) {
    body(i / size % g.out_channels, i);
  }
}

Normalised normalised(const Geometry& g, DataType type, const Operands& operands,
                      const Affines& affine) {
  Normalised want;
  const int64_t conv = g.h.conv * g.w.conv;
  const auto count = static_cast<long double>(g.batch * conv);
  // In more than double, which is one of the types.
  std::vector<long double> mean(g.out_channels), squares(g.out_channels);
  for_channels(g, conv, [&](int64_t c, int64_t i) {
    const double sum =
        convolution(g, operands, i / conv / g.out_channels, c, i % conv / g.w.conv, i % g.w.conv);
    want.plane.push_back(rounded(type, sum));
    mean[c] += want.plane[i] / count;
  });
  for_channels(g, conv, [&](int64_t c, int64_t i) {
    squares[c] += (want.plane[i] - mean[c]) * (want.plane[i] - mean[c]) / count;
  });
  want.mean.assign(mean.begin(), mean.end());
  want.var.assign(squares.begin(), squares.end());
  for_channels(g, g.outputs(), [&](int64_t c, int64_t i) {
    const double gamma = affine.weight[c];
    const int64_t oh = i % g.outputs() / g.w.out, ow = i % g.w.out;
    double best = -kInfinity, extremum = -kInfinity;
    int32_t code = -1;
    for (int32_t e = 0; e < g.window(); ++e) {
      const int64_t ch =
          oh * g.h.pool_stride - g.h.pool_padding + e / g.w.pool_kernel * g.h.pool_dilation;
      const int64_t cw =
          ow * g.w.pool_stride - g.w.pool_padding + e % g.w.pool_kernel * g.w.pool_dilation;
      if (ch < 0 || ch >= g.h.conv || cw < 0 || cw >= g.w.conv) continue;
      const double y = want.plane[(i / g.outputs()) * conv + ch * g.w.conv + cw];
      const double normal = (y - want.mean[c]) * gamma / std::sqrt(want.var[c] + kEps);
      if (normal > best) best = normal, extremum = y, code = e;
    }
    const double shifted = code < 0 ? best : best + affine.bias[c];
    if (code >= 0 && shifted <= 0) code = -1;
    want.output.push_back(best == -kInfinity ? best : std::max(shifted, 0.0));
    want.extremum.push_back(best == -kInfinity ? 0 : extremum);
    want.code.push_back(code);
  });
  return want;
}

// The backward's results, and what bounds their errors: the same sums of magnitudes.
struct NormGradients {
  Gradients conv;
  Values bn_weight, bn_bias;
};

NormGradients gradients(const Geometry& g, const Operands& operands, const Affines& affine,
                        const Normalised& at, bool magnitudes) {
  const auto term = [&](double value) { return magnitudes ? std::abs(value) : value; };
  NormGradients result;
  result.bn_weight.assign(g.out_channels, 0);
  result.bn_bias.assign(g.out_channels, 0);
  const auto invstd = [&](int64_t c) { return 1 / std::sqrt(at.var[c] + kEps); };
  for_channels(g, g.outputs(), [&](int64_t c, int64_t i) {
    if (at.code[i] < 0) return;
    const double grad = operands.grad_output[i];
    result.bn_bias[c] += term(grad);
    result.bn_weight[c] +=
        magnitudes ? std::abs(grad) *
                         (std::abs(at.extremum[i] - at.mean[c]) + std::abs(at.mean[c])) * invstd(c)
                   : grad * (at.extremum[i] - at.mean[c]) * invstd(c);
  });
  // Of the normalised outputs, then of the convolution's.
  Operands terms = operands;
  if (magnitudes) {
    for (Values* values : {&terms.input, &terms.weight, &terms.grad_output}) {
      for (double& value : *values) value = std::abs(value);
    }
  }
  Values plane = convolution_gradient(g, terms, at.code);
  const int64_t conv = g.h.conv * g.w.conv;
  const auto count = static_cast<double>(g.batch * conv);
  for_channels(g, conv, [&](int64_t c, int64_t i) {
    const double normal = (at.plane[i] - at.mean[c]) * invstd(c);
    const double scale = term(affine.weight[c]) * invstd(c);
    const double mean = term(-result.bn_bias[c] / count);
    plane[i] = scale * (plane[i] + mean + term(-normal * result.bn_weight[c] / count));
  });
  result.conv = convolution_backward(g, terms, plane);
  return result;
}

// |got - want| <= factor * rounding * magnitude, element by element; what is not finite agrees.
void check_near(const Values& got, const Values& want, const Values& magnitude, double allowed,
                const std::string& what) {
  for (size_t i = 0; i < want.size(); ++i) {
    const bool same = got[i] == want[i] || std::abs(got[i] - want[i]) <= allowed * magnitude[i];
    if (same) continue;
    check(false, what + ": element " + std::to_string(i) + " is " + std::to_string(got[i]) +
                     ", expected " + std::to_string(want[i]) + " within " +
                     std::to_string(allowed * magnitude[i]));
    return;
  }
  check(true, what);
}

const fusedcnn::cpu::Kernel& choose(Pass pass, const Problem& problem) {
  const fusedcnn::cpu::Kernel* const kernel = fusedcnn::cpu::select(pass, problem);
  if (!kernel) std::abort();
  return *kernel;
}

struct NormCall {
  const Geometry& g;
  DataType type;
  Layout layout;
  int way;
  bool wide;

  Shape input() const { return {g.batch, g.in_channels, g.h.in, g.w.in}; }
  Shape weight() const {
    return {g.out_channels, g.in_channels_per_group(), g.h.kernel, g.w.kernel};
  }
  Shape pooled() const { return {g.batch, g.out_channels, g.h.out, g.w.out}; }
  Shape channels() const { return {1, g.out_channels, 1, 1}; }

  Tensor with(Shape shape, const Values& values) const {
    return tensor_of(type, shape, strides_for(layout, shape), values);
  }
  // What the operator allocates.
  Strides pooled_strides() const {
    return strides_for(
        layout == Layout::kChannelsLast ? Layout::kChannelsLast : Layout::kContiguous, pooled());
  }
  Tensor row(DataType of, const Values& values) const {
    return tensor_of(of, channels(), strides_for(Layout::kContiguous, channels()), values);
  }
};

void check_forward(const NormCall& call, const Operands& operands, const Affines& affine,
                   const Normalised& want, bool with_code, const std::string& what) {
  const Geometry& g = call.g;
  const DataType statistics = statistics_type(call.type);
  const int64_t element = element_size(call.type);
  const Tensor input = call.with(call.input(), operands.input);
  const Tensor weight = call.with(call.weight(), operands.weight);
  const Tensor bn_weight = call.row(statistics, affine.weight);
  const Tensor bn_bias = call.row(statistics, affine.bias);
  const Strides strides = call.pooled_strides();
  Tensor output(call.pooled(), strides, element), extremum(call.pooled(), strides, element);
  Tensor code(call.pooled(), strides, call.wide ? 4 : 1);
  const Strides dense = strides_for(Layout::kContiguous, call.channels());
  Tensor mean(call.channels(), dense, element_size(statistics));
  Tensor var(call.channels(), dense, element_size(statistics));

  NormForwardArgs args{};
  args.block.geometry = g;
  args.block.type = call.type;
  args.block.wide_code = call.wide;
  args.block.input = input.data();
  args.block.input_strides = input.strides();
  args.block.weight = weight.data();
  args.block.weight_strides = weight.strides();
  args.block.output = output.data();
  args.block.output_strides = strides;
  args.block.code = with_code ? code.data() : nullptr;
  args.affine = {statistics, bn_weight.data(), 1, bn_bias.data(), 1};
  args.eps = kEps;
  args.extremum = with_code ? extremum.data() : nullptr;
  args.mean = mean.data();
  args.var = var.data();
  const std::string misuse =
      run_watched(call.type, call.way, [&](const fusedcnn::cpu::ThreadPool& pool) {
        fusedcnn::cpu::norm_forward(args, pool, choose);
      });
  check(misuse.empty(), what + ": " + misuse);

  // A mean of small integers errs by its own rounding; a variance by a few, of sums in float.
  Values magnitude(g.out_channels, 1);
  for (int64_t c = 0; c < g.out_channels; ++c)
    magnitude[c] = std::abs(want.mean[c]) + std::sqrt(want.var[c]);
  const double unit = rounding(statistics);
  check_near(values_of(statistics, mean), want.mean, magnitude, 4 * unit, what + ": mean");
  check_near(values_of(statistics, var), want.var, want.var, 16 * unit, what + ": var");
  // An output: the roundings of three operations, of the variance's root and of the result; and the
  // error of the mean as above, but in double, however close to the mean the element is.
  Values range;
  const double mean_unit = rounding(DataType::kFloat64) / unit;
  for_channels(g, g.outputs(), [&](int64_t c, int64_t i) {
    const double normal = want.code[i] < 0 ? 1 : std::abs(want.extremum[i] - want.mean[c]);
    range.push_back((normal + mean_unit * magnitude[c]) * std::abs(affine.weight[c]) /
                        std::sqrt(want.var[c] + kEps) +
                    std::abs(affine.bias[c]));
  });
  check_near(values_of(call.type, output), want.output, range, 16 * unit + rounding(call.type),
             what + ": output");
  if (!with_code) return;
  const std::vector<int32_t> codes = code_values_of(call.wide, code);
  const Values extrema = values_of(call.type, extremum);
  int wrong = 0;
  for (size_t i = 0; i < codes.size(); ++i) {
    // Whether it is off may be a matter of rounding.
    const bool near_zero = want.output[i] < 1e-4;
    wrong += codes[i] != want.code[i] && !(near_zero && (codes[i] < 0 || want.code[i] < 0));
    wrong += extrema[i] != want.extremum[i];
  }
  check(wrong == 0, what + ": " + std::to_string(wrong) + " wrong codes or extrema");
}

void check_backward(const NormCall& call, const Operands& operands, const Affines& affine,
                    const Normalised& at, bool expanded, const std::string& what) {
  const Geometry& g = call.g;
  const DataType type = call.type, statistics = statistics_type(type);
  const NormGradients want = gradients(g, operands, affine, at, false);
  const NormGradients magnitude = gradients(g, operands, affine, at, true);
  const Tensor input = call.with(call.input(), operands.input);
  const Tensor weight = call.with(call.weight(), operands.weight);
  const Tensor grad_output = call.with(call.pooled(), operands.grad_output);
  const Tensor extremum = call.with(call.pooled(), at.extremum);
  const Tensor code =
      codes_of(call.wide, call.pooled(), strides_for(call.layout, call.pooled()), at.code);
  const Tensor mean = call.row(statistics, at.mean), var = call.row(statistics, at.var);
  const Tensor bn_weight = call.row(statistics, affine.weight);
  Tensor grad_input(call.input(),
                    strides_for(call.layout == Layout::kChannelsLast ? Layout::kChannelsLast
                                                                     : Layout::kContiguous,
                                call.input()),
                    element_size(type));
  Tensor grad_weight(call.weight(), strides_for(call.layout, call.weight()), element_size(type));
  const Strides dense = strides_for(Layout::kContiguous, call.channels());
  Tensor grad_bn_weight(call.channels(), dense, element_size(statistics));
  Tensor grad_bn_bias(call.channels(), dense, element_size(statistics));

  NormBackwardArgs args{};
  args.block.geometry = g;
  args.block.type = type;
  args.block.wide_code = call.wide;
  args.block.grad_output = grad_output.data();
  args.block.grad_output_strides = expanded ? Strides{0, 0, 0, 0} : grad_output.strides();
  args.block.code = code.data();
  args.block.code_strides = code.strides();
  args.block.input = input.data();
  args.block.input_strides = input.strides();
  args.block.weight = weight.data();
  args.block.weight_strides = weight.strides();
  args.block.grad_input = grad_input.data();
  args.block.grad_input_strides = grad_input.strides();
  args.block.grad_weight = grad_weight.data();
  args.block.grad_weight_strides = grad_weight.strides();
  args.affine = {statistics, bn_weight.data(), 1, nullptr, 0};
  args.eps = kEps;
  args.extremum = extremum.data();
  args.extremum_strides = extremum.strides();
  args.mean = mean.data();
  args.mean_stride = 1;
  args.var = var.data();
  args.var_stride = 1;
  args.grad_bn_weight = grad_bn_weight.data();
  args.grad_bn_bias = grad_bn_bias.data();
  const std::string misuse =
      run_watched(type, call.way, [&](const fusedcnn::cpu::ThreadPool& pool) {
        fusedcnn::cpu::norm_backward(args, pool, choose);
      });
  check(misuse.empty(), what + ": " + misuse);
  check(grad_input.gaps_intact() && grad_weight.gaps_intact(), what + ": wrote between elements");

  // Sums err by some roundings of their terms' magnitudes. A half type's also by one of each
  // output's gradient, and by its own.
  const double unit = 64 * rounding(statistics);
  const double stored = unit + (type == statistics ? 0 : 2 * rounding(type));
  check_near(values_of(statistics, grad_bn_bias), want.bn_bias, magnitude.bn_bias, unit,
             what + ": grad_bn_bias");
  check_near(values_of(statistics, grad_bn_weight), want.bn_weight, magnitude.bn_weight, unit,
             what + ": grad_bn_weight");
  check_near(values_of(type, grad_input), want.conv.input, magnitude.conv.input, stored,
             what + ": grad_input");
  check_near(values_of(type, grad_weight), want.conv.weight, magnitude.conv.weight, stored,
             what + ": grad_weight");
}

}  // namespace

void test_batch_norm(const fusedcnn::cpu::Isa& isa, bool quick) {
  fusedcnn::cpu::force(isa.name, "");
  fusedcnn::cpu::allow_winograd(false);  // small integers tie in exact kernels alone
  int turn = 0;
  for (const Case& one : cases()) {
    const Geometry& g = one.geometry;
    if (g.batch == 0) continue;
    Operands operands = integer_operands(g);
    operands.bias.clear();
    for (const DataType type : kTypes) {
      // Without zeros, kernels that take the moments on the way serve, of half types before they
      // are rounded; the reference rounds first.
      const bool zeros = type != statistics_type(type) || (turn / 4 + turn / 16) % 2 == 0;
      const Affines affine = draw_affine(g, type, zeros);
      const Normalised want = normalised(g, type, operands, affine);
      for (int layout = 0; layout < static_cast<int>(Layout::kCount); ++layout, ++turn) {
        for (int way = 0; way < 3; ++way) {
          if (quick && (turn + way) % 3 != 0) continue;
          if (!in_share()) continue;
          const NormCall call{g, type, static_cast<Layout>(layout), way,
                              g.window() > fusedcnn::kLargestByteWindow || turn % 5 == 0};
          const std::string what = std::string(isa.name) + " batch norm, " + one.name + ", " +
                                   name(type) + ", " + name(call.layout) + ", way " +
                                   std::to_string(way);
          check_forward(call, operands, affine, want, turn % 4 != 3, what);
          Operands given = operands;
          const bool expanded = turn % 7 == 0;
          if (expanded) given.grad_output.assign(given.grad_output.size(), given.grad_output[0]);
          check_backward(call, given, affine, want, expanded, what);
        }
      }
    }
  }
  fusedcnn::cpu::allow_winograd(true);
  fusedcnn::cpu::force("", "");
}

}  // namespace selftest
