#include "test_batch_norm.h"

#include <algorithm>
#include <cmath>
#include <exception>

#include "cases.h"
#include "check.h"
#include "operands.h"
#include "storage.h"
#include "tensor.h"

namespace selftest {
namespace {

using fusedcnn::Axis;
using fusedcnn::DataType;
using fusedcnn::element_size;
using fusedcnn::Geometry;
using fusedcnn::NormBackwardArgs;
using fusedcnn::NormForwardArgs;
using fusedcnn::statistics_type;
using fusedcnn::Strides;

using Values = std::vector<double>;

constexpr DataType kTypes[] = {DataType::kFloat32, DataType::kFloat64, DataType::kBFloat16,
                               DataType::kFloat16};

// ---- the answer, in double ----------------------------------------------------------------------

// The block's operands, in the sizes of the geometry. What is empty is null.
struct Block {
  Geometry g;
  DataType type;
  double eps;
  Values plane;  // [N, OC, conv h, conv w]
  Values weight, bias, conv_bias;
  Values grad_output;  // [N, OC, OH, OW]

  double factor(int64_t c) const { return weight.empty() ? 1 : weight[c]; }
  double shift(int64_t c) const { return bias.empty() ? 0 : bias[c]; }
  int64_t pixels() const { return g.h.conv * g.w.conv; }
};

struct Answer {
  Values mean, var;
  Values extremum;              // NaN for a window without elements
  Values value;                 // before ReLU
  Values allowed;               // what a value may err by
  std::vector<int32_t> winner;  // -1: none
  // -1 where ReLU is off, too.
  std::vector<int32_t> code() const {
    std::vector<int32_t> result = winner;
    for (size_t i = 0; i < result.size(); ++i) {
      if (value[i] <= 0) result[i] = -1;
    }
    return result;
  }
};

// A few roundings of the type that sums are taken in.
double roundings(DataType type) { return type == DataType::kFloat64 ? 0x1p-49 : 0x1p-21; }

int64_t place(const Axis& a, int64_t o, int64_t p) {
  const int64_t at = o * a.pool_stride - a.pool_padding + p * a.pool_dilation;
  return at < a.conv ? at : -1;
}

// body(number, place in the image) for the elements of pooled output o that there are.
template <typename Body>
void for_window(const Geometry& g, int64_t o, const Body& body) {
  for (int64_t number = 0; number < g.window(); ++number) {
    const int64_t h = place(g.h, o / g.w.out, number / g.w.pool_kernel);
    const int64_t w = place(g.w, o % g.w.out, number % g.w.pool_kernel);
    if (h >= 0 && w >= 0) body(static_cast<int32_t>(number), h * g.w.conv + w);
  }
}

Answer answer(const Block& block) {
  const Geometry& g = block.g;
  Answer result;
  for (int64_t c = 0; c < g.out_channels; ++c) {
    const auto for_all = [&](const auto& body) {
      for (int64_t n = 0; n < g.batch; ++n) {
        for (int64_t i = 0; i < block.pixels(); ++i) {
          body(block.plane[(n * g.out_channels + c) * block.pixels() + i]);
        }
      }
    };
    const auto count = static_cast<double>(g.batch * block.pixels());
    long double sum = 0, squares = 0;  // a reference for double
    for_all([&](double y) { sum += y; });
    const long double mean = sum / count;
    for_all([&](double y) { squares += (y - mean) * (y - mean); });
    const double nothing = block.conv_bias.empty() ? 0 : 0 * block.conv_bias[c];
    result.mean.push_back(static_cast<double>(mean) + nothing);
    result.var.push_back(static_cast<double>(squares / count) + nothing);
  }
  for (int64_t i = 0; i < g.batch * g.out_channels * g.outputs(); ++i) {
    const int64_t image = i / g.outputs(), c = image % g.out_channels;
    const double sign = block.factor(c) < 0 ? -1 : 1;
    int32_t winner = -1;
    double best = kNan;
    for_window(g, i % g.outputs(), [&](int32_t number, int64_t at) {
      const double y = block.plane[image * block.pixels() + at];
      const bool wins = block.factor(c) == 0 ? false : sign * y > sign * best || std::isnan(y);
      if (winner < 0 || wins) best = y, winner = number;
    });
    const double scale = block.factor(c) / std::sqrt(result.var[c] + block.eps);
    result.winner.push_back(winner);
    result.extremum.push_back(best);
    result.value.push_back(winner < 0 ? -kInfinity
                                      : (best - result.mean[c]) * scale + block.shift(c));
    result.allowed.push_back(roundings(block.type) * ((std::fabs(best) + std::fabs(result.mean[c]) +
                                                       std::sqrt(result.var[c])) *
                                                          std::fabs(scale) +
                                                      std::fabs(block.shift(c))));
  }
  return result;
}

struct NormGradients {
  Values weight, bias, plane;
  Values allowed_weight, allowed_bias, allowed_plane;
};

// mean, var and extremum: as the kernel is given them, rounded.
NormGradients gradients(const Block& block, const Answer& given) {
  const Geometry& g = block.g;
  const auto count = static_cast<double>(g.batch * block.pixels());
  const double unit = roundings(block.type);
  const std::vector<int32_t> code = given.code();
  NormGradients result;
  Values won(block.plane.size());
  Values weight_sizes(g.out_channels), bias_sizes(g.out_channels);
  result.weight.resize(g.out_channels), result.bias.resize(g.out_channels);
  for (size_t i = 0; i < code.size(); ++i) {
    if (code[i] < 0) continue;
    const auto image = static_cast<int64_t>(i) / g.outputs(), c = image % g.out_channels;
    const double grad = block.grad_output[i];
    const double x_hat = (given.extremum[i] - given.mean[c]) / std::sqrt(given.var[c] + block.eps);
    result.bias[c] += grad, result.weight[c] += grad * x_hat;
    bias_sizes[c] += std::fabs(grad), weight_sizes[c] += std::fabs(grad * x_hat);
    for_window(g, static_cast<int64_t>(i) % g.outputs(), [&](int32_t number, int64_t at) {
      if (number == code[i]) won[image * block.pixels() + at] += grad;
    });
  }
  for (size_t i = 0; i < won.size(); ++i) {
    const auto c = static_cast<int64_t>(i) / block.pixels() % g.out_channels;
    const double invstd = 1 / std::sqrt(given.var[c] + block.eps), scale = block.factor(c) * invstd;
    const double y = block.plane[i];
    // As a max-pool of the type does, the sum of windows is rounded.
    const double sent = scale * rounded(block.type, won[i]);
    const double slope = scale * invstd / count;
    result.plane.push_back(sent - scale * result.bias[c] / count -
                           slope * result.weight[c] * (y - given.mean[c]));
    result.allowed_plane.push_back(
        unit * (std::fabs(sent) + std::fabs(scale) * bias_sizes[c] / count +
                std::fabs(slope) * weight_sizes[c] * (std::fabs(y) + std::fabs(given.mean[c]))));
  }
  for (int64_t c = 0; c < g.out_channels; ++c) {
    result.allowed_weight.push_back(unit * weight_sizes[c]);
    result.allowed_bias.push_back(unit * bias_sizes[c]);
  }
  return result;
}

// ---- calls --------------------------------------------------------------------------------------

struct Way {
  bool plane_channels_last, output_channels_last;
  bool wide_code;
  bool own_affine;  // of the block's type, where that is not the statistics'
  Layout grads;     // of grad_output; code and extremum are as outputs
  int way;
  int64_t stride = 1;  // of vectors
};

Shape plane_shape(const Geometry& g) { return {g.batch, g.out_channels, g.h.conv, g.w.conv}; }
Shape output_shape(const Geometry& g) { return {g.batch, g.out_channels, g.h.out, g.w.out}; }
Strides order(bool channels_last, Shape shape) {
  return strides_for(channels_last ? Layout::kChannelsLast : Layout::kContiguous, shape);
}
DataType affine_type(const Block& block, const Way& way) {
  return way.own_affine ? block.type : statistics_type(block.type);
}
Tensor vector_of(DataType type, const Values& values, int64_t stride) {
  return tensor_of(type, {1, 1, 1, static_cast<int64_t>(values.size())}, {0, 0, 0, stride}, values);
}
Tensor new_tensor(DataType type, Shape shape, Strides strides) {
  return Tensor(shape, strides, element_size(type), signalling_nan(type));
}
const void* or_null(const Tensor& tensor) {
  return tensor.places().empty() ? nullptr : tensor.data();
}

template <typename Body>
void counted(const std::string& what, const Body& body) {
  try {
    body();
  } catch (const std::exception& error) {
    check(false, what + ": " + error.what());
  }
}

struct Result {
  Values output, extremum, mean, var;
  std::vector<int32_t> code;
};

Result run_forward(const NormBackend& backend, const Block& block, const Way& way,
                   const std::string& what, bool with_code = true) {
  const Geometry& g = block.g;
  const DataType type = block.type, statistics = statistics_type(type);
  const Strides strides = order(way.output_channels_last, output_shape(g));
  const Tensor plane =
      tensor_of(type, plane_shape(g), order(way.plane_channels_last, plane_shape(g)), block.plane);
  const Tensor weight = vector_of(affine_type(block, way), block.weight, way.stride);
  const Tensor bias = vector_of(affine_type(block, way), block.bias, 2 * way.stride);
  const Tensor conv_bias = vector_of(type, block.conv_bias, 3);
  Tensor output = new_tensor(type, output_shape(g), strides);
  Tensor extremum = new_tensor(type, output_shape(g), strides);
  Tensor code(output_shape(g), strides, way.wide_code ? 4 : 1, 0xeeeeeeeeeeeeeeee);
  Tensor mean = new_tensor(statistics, {1, 1, 1, g.out_channels}, {0, 0, 0, 1});
  Tensor var = new_tensor(statistics, {1, 1, 1, g.out_channels}, {0, 0, 0, 1});
  NormForwardArgs args{};
  args.block.geometry = g;
  args.block.type = type;
  args.block.wide_code = way.wide_code;
  args.block.plane = plane.data();
  args.block.plane_channels_last = way.plane_channels_last;
  args.block.bias = or_null(conv_bias);
  args.block.bias_stride = 3;
  args.block.output = output.data();
  args.block.output_strides = strides;
  args.affine = {affine_type(block, way), or_null(weight), way.stride, or_null(bias),
                 2 * way.stride};
  args.eps = block.eps;
  args.mean = mean.data();
  args.var = var.data();
  if (with_code) args.block.code = code.data(), args.extremum = extremum.data();
  counted(what, [&] { backend.forward(args, way.way); });
  return {values_of(type, output), values_of(type, extremum), values_of(statistics, mean),
          values_of(statistics, var), code_values_of(way.wide_code, code)};
}

struct Wanted {
  bool affine = true, plane = true;
};

NormGradients run_backward(const NormBackend& backend, const Block& block, const Answer& given,
                           const Way& way, const std::string& what, Wanted wanted = {}) {
  const Geometry& g = block.g;
  const DataType type = block.type, statistics = statistics_type(type);
  const DataType affine = affine_type(block, way);
  const Shape shape = output_shape(g);
  const Strides strides = order(way.output_channels_last, shape);
  const Strides grad_strides = strides_for(way.grads, shape);
  const Strides extremum_strides =
      way.grads == Layout::kPermuted ? strides_for(Layout::kPadded, shape) : strides;
  const Tensor grad_output = tensor_of(type, shape, grad_strides, block.grad_output);
  const Tensor code = codes_of(way.wide_code, shape, strides, given.code());
  const Tensor extremum = tensor_of(type, shape, extremum_strides, given.extremum);
  const Tensor mean = vector_of(statistics, given.mean, way.stride);
  const Tensor var = vector_of(statistics, given.var, 2 * way.stride);
  const Tensor weight = vector_of(affine, block.weight, 3 * way.stride);
  Tensor plane =
      tensor_of(type, plane_shape(g), order(way.plane_channels_last, plane_shape(g)), block.plane);
  Tensor grad_weight = new_tensor(affine, {1, 1, 1, g.out_channels}, {0, 0, 0, 1});
  Tensor grad_bias = new_tensor(affine, {1, 1, 1, g.out_channels}, {0, 0, 0, 1});
  NormBackwardArgs args{};
  args.block.geometry = g;
  args.block.type = type;
  args.block.wide_code = way.wide_code;
  args.block.grad_output = grad_output.data();
  args.block.grad_output_strides = grad_strides;
  args.block.code = code.data();
  args.block.code_strides = strides;
  args.block.plane = wanted.plane ? plane.data() : nullptr;
  args.block.plane_channels_last = way.plane_channels_last;
  args.affine = {affine, or_null(weight), 3 * way.stride, nullptr, 0};
  args.eps = block.eps;
  args.extremum = extremum.data();
  args.extremum_strides = extremum_strides;
  args.mean = mean.data();
  args.mean_stride = way.stride;
  args.var = var.data();
  args.var_stride = 2 * way.stride;
  if (wanted.affine) {
    args.grad_bn_weight = grad_weight.data(), args.grad_bn_bias = grad_bias.data();
  }
  counted(what, [&] { backend.backward(args, way.way); });
  return {values_of(affine, grad_weight),
          values_of(affine, grad_bias),
          values_of(type, plane),
          {},
          {},
          {}};
}

// ---- checks -------------------------------------------------------------------------------------

// Whether `got` is what values within `allowed` of `want` are rounded to.
bool near(DataType type, double got, double want, double allowed) {
  if (std::isnan(want) || std::isnan(got)) return std::isnan(want) && std::isnan(got);
  if (std::isinf(want)) return got == want;
  return got >= rounded(type, want - allowed) && got <= rounded(type, want + allowed);
}

void check_near(DataType type, const Values& got, const Values& want, const Values& allowed,
                const std::string& what) {
  std::string difference;
  for (size_t i = 0; difference.empty() && i < want.size(); ++i) {
    if (near(type, got[i], want[i], allowed[i])) continue;
    difference = " at " + std::to_string(i) + ": expected " + std::to_string(want[i]) + ", got " +
                 std::to_string(got[i]);
  }
  check(difference.empty() && got.size() == want.size(), what + difference);
}

void check_statistics(const Block& block, const Result& got, const Answer& want,
                      const std::string& what) {
  const double unit = roundings(block.type);
  Values mean_allowed, var_allowed;
  for (size_t c = 0; c < want.mean.size(); ++c) {
    mean_allowed.push_back(unit * (std::fabs(want.mean[c]) + std::sqrt(want.var[c])));
    // Of elements' distances, their squares, and the chains of a thread and a tile; and of tiles'
    // means, which are doubles.
    var_allowed.push_back(10 * unit * want.var[c] +
                          0x1p-50 * std::fabs(want.mean[c]) * std::sqrt(want.var[c]));
  }
  const DataType type = statistics_type(block.type);
  check_near(type, got.mean, want.mean, mean_allowed, what + ": mean");
  check_near(type, got.var, want.var, var_allowed, what + ": var");
}

void check_forward(const NormBackend& backend, const Block& block, const Way& way,
                   const std::string& what) {
  const Result got = run_forward(backend, block, way, what);
  const Answer want = answer(block);
  check_statistics(block, got, want, what);
  const std::vector<int32_t> code = want.code();
  std::string difference;
  for (size_t i = 0; difference.empty() && i < code.size(); ++i) {
    const double value = want.value[i] <= 0 && want.winner[i] >= 0 ? 0 : want.value[i];
    const bool close = near(block.type, got.output[i], value, want.allowed[i]);
    // Near zero it may be either.
    const bool winner =
        got.code[i] == code[i] || (std::fabs(want.value[i]) <= want.allowed[i] &&
                                   (got.code[i] == -1 || got.code[i] == want.winner[i]));
    const bool extremum =
        want.winner[i] < 0 || near(block.type, got.extremum[i], want.extremum[i], 0);
    if (close && winner && extremum) continue;
    difference = " at " + std::to_string(i) + ": expected " + std::to_string(value) + " from " +
                 std::to_string(want.extremum[i]) + " of " + std::to_string(code[i]) + ", got " +
                 std::to_string(got.output[i]) + " from " + std::to_string(got.extremum[i]) +
                 " of " + std::to_string(got.code[i]);
  }
  check(difference.empty(), what + difference);
}

// What the backward is given of a forward.
Answer saved(const Block& block) {
  Answer given = answer(block);
  for (Values* statistics : {&given.mean, &given.var}) {
    for (double& value : *statistics) value = rounded(statistics_type(block.type), value);
  }
  return given;
}

void check_backward(const NormBackend& backend, const Block& block, const Way& way,
                    const std::string& what, Wanted wanted = {}) {
  const Answer given = saved(block);
  const NormGradients got = run_backward(backend, block, given, way, what, wanted);
  const NormGradients want = gradients(block, given);
  const DataType affine = affine_type(block, way);
  if (wanted.affine) {
    check_near(affine, got.weight, want.weight, want.allowed_weight, what + ": grad_bn_weight");
    check_near(affine, got.bias, want.bias, want.allowed_bias, what + ": grad_bn_bias");
  }
  if (wanted.plane) {
    check_near(block.type, got.plane, want.plane, want.allowed_plane, what + ": plane");
  }
}

// ---- data ---------------------------------------------------------------------------------------

// Small integers, so that all sums are exact and elements tie; bn_weights of both signs and zero.
Block integers(const Geometry& g, DataType type) {
  Random random(g.out_channels * 1000 + g.w.in);
  Block block{g, type, 0.25, {}, {}, {}, {}, {}};
  block.plane = draw(g.batch * g.out_channels * g.h.conv * g.w.conv,
                     [&] { return static_cast<double>(random.integer(-3, 3)); });
  block.grad_output = draw(g.batch * g.out_channels * g.outputs(),
                           [&] { return static_cast<double>(random.integer(-2, 2)); });
  constexpr double kWeights[] = {1.5, -0.75, 0, -2, 0.5};
  for (int64_t c = 0; c < g.out_channels; ++c) {
    block.weight.push_back(kWeights[(c + g.w.in + static_cast<int>(type)) % 5]);
    block.bias.push_back(static_cast<double>(random.integer(-2, 4)) / 4);
  }
  return block;
}

Block reals(const Geometry& g, DataType type, double offset) {
  Random random(7);
  Block block = integers(g, type);
  for (double& value : block.plane) value = rounded(type, offset + random.real());
  for (double& value : block.grad_output) value = rounded(type, random.real());
  return block;
}

std::string describe(const NormBackend& backend, const Block& block, const Way& way,
                     const std::string& data) {
  const auto layout = [](bool last) { return last ? "channels_last" : "contiguous"; };
  return backend.name + " batch norm " + name(block.type) +
         (way.wide_code ? " int32 code, plane " : " byte code, plane ") +
         layout(way.plane_channels_last) + ", outputs " + layout(way.output_channels_last) +
         ", gradients " + name(way.grads) + ", " + backend.ways[way.way] + ", " + data;
}

void test_cases(const NormBackend& backend, bool quick) {
  int turn = 0;
  for (const Case& one : cases()) {
    const Geometry& g = one.geometry;
    if (!g.batch) continue;
    for (const DataType type : kTypes) {
      ++turn;
      for (int combination = 0; combination < 4; ++combination) {
        if (quick && combination != turn % 4) continue;
        const int mixed = turn + combination;
        Way way{combination % 2 == 1,
                combination / 2 == 1,
                g.window() > fusedcnn::kLargestByteWindow || mixed % 3 == 0,
                mixed % 5 < 2,
                static_cast<Layout>(mixed / 4 % static_cast<int>(Layout::kCount)),
                mixed / 2 % static_cast<int>(backend.ways.size()),
                1 + mixed % 2};
        const Block block = integers(g, type);
        const std::string what = describe(backend, block, way, one.name);
        if (in_share()) check_forward(backend, block, way, what);
        if (in_share()) check_backward(backend, block, way, what);
      }
    }
  }
}

// The ways that the kernels distinguish, by few.
std::vector<Way> orders() {
  return {{false, false, false, false, Layout::kContiguous, 0},
          {true, true, false, false, Layout::kChannelsLast, 1},
          {true, false, false, false, Layout::kContiguous, 0}};
}

// As exact far from zero as near it, for windows large and small.
void test_offsets(const NormBackend& backend) {
  for (const char* name : {"block1", "ceil_pool3_stride2", "global_pool", "many_images"}) {
    for (const double offset : {0., 1e4}) {
      for (const DataType type : {DataType::kFloat32, DataType::kFloat64}) {
        for (const Way& way : orders()) {
          if (!in_share()) continue;
          const Block block = reals(case_named(name).geometry, type, offset);
          const std::string what =
              describe(backend, block, way, std::string(name) + " from " + std::to_string(offset));
          check_statistics(block, run_forward(backend, block, way, what), answer(block), what);
        }
      }
    }
  }
}

// An element that is not finite, or a convolution bias, makes its channel NaN and no other, and
// where a window has no elements changes nothing.
void test_special_values(const NormBackend& backend) {
  for (const char* name : {"block1", "pool3_stride1", "empty_windows"}) {
    for (const Way& way : orders()) {
      for (const double special : {kNan, kInfinity, -kInfinity}) {
        if (!in_share()) continue;
        Block block = integers(case_named(name).geometry, DataType::kFloat32);
        block.plane[static_cast<size_t>(block.pixels()) + 3] = special;
        block.conv_bias.assign(static_cast<size_t>(block.g.out_channels), 1e30);
        block.conv_bias[3] = special;
        const std::string what = describe(backend, block, way, std::string(name) + " special");
        const Result got = run_forward(backend, block, way, what);
        const Answer want = answer(block);
        const Values none(want.mean.size());
        check(std::isnan(got.var[1]) && std::isnan(got.var[3]) && !std::isnan(got.var[0]),
              what + ": var");
        check((std::isnan(special) ? std::isnan(got.mean[1]) : got.mean[1] == special) &&
                  std::isnan(got.mean[3]),
              what + ": mean");
        bool right = true;
        for (size_t i = 0; i < want.value.size(); ++i) {
          const auto c = static_cast<int64_t>(i) / block.g.outputs() % block.g.out_channels;
          if (want.winner[i] < 0) {
            right &= got.output[i] == -kInfinity && got.code[i] == -1;
          } else if (c == 1 || c == 3) {
            right &= std::isnan(got.output[i]) && got.code[i] >= 0;
          } else {
            right &= std::isfinite(got.output[i]);
          }
        }
        check(right, what + ": outputs");
      }
    }
  }
  // No gradient comes from where ReLU is off, whatever it is.
  for (const Way& way : orders()) {
    if (!in_share()) continue;
    Block block = integers(case_named("block1").geometry, DataType::kFloat32);
    const std::vector<int32_t> code = answer(block).code();
    Block dead = block;
    for (size_t i = 0; i < code.size(); ++i) {
      if (code[i] < 0) block.grad_output[i] = kNan, dead.grad_output[i] = 0;
    }
    const std::string what = describe(backend, block, way, "NaN where ReLU is off");
    const NormGradients got = run_backward(backend, block, saved(block), way, what);
    const NormGradients want = run_backward(backend, dead, saved(dead), way, what);
    check(got.plane == want.plane && got.weight == want.weight && got.bias == want.bias, what);
  }
}

void test_optional_arguments(const NormBackend& backend) {
  const Geometry& g = case_named("pool2_padding1").geometry;
  for (const Way& way : orders()) {
    for (const DataType type : kTypes) {
      if (!in_share()) continue;
      Block block = integers(g, type);
      const std::string what = describe(backend, block, way, "optional arguments");
      // Without code and extremum, the same output.
      const Result all = run_forward(backend, block, way, what);
      const Result less = run_forward(backend, block, way, what + ", no code", false);
      check(all.output == less.output && all.mean == less.mean && all.var == less.var,
            what + ": differs without code");
      check_backward(backend, block, way, what + ", affine gradients alone", {true, false});
      check_backward(backend, block, way, what + ", plane alone", {false, true});
      block.bias.clear();
      check_forward(backend, block, way, what + ", no bn_bias");
      block.weight.clear();
      check_forward(backend, block, way, what + ", no bn_weight");
      check_backward(backend, block, way, what + ", no bn_weight");
    }
  }
}

void test_determinism(const NormBackend& backend) {
  for (const char* name : {"block2", "many_images", "pool3_stride1", "channels15"}) {
    for (Way way : orders()) {
      for (const DataType type : {DataType::kFloat32, DataType::kBFloat16}) {
        if (!in_share()) continue;
        const Block block = reals(case_named(name).geometry, type, 0);
        const Answer given = saved(block);
        Result first;
        NormGradients first_gradients;
        for (int i = 0; i < static_cast<int>(backend.ways.size()); ++i) {
          way.way = i;
          const std::string what = describe(backend, block, way, std::string(name) + " in reals");
          const Result got = run_forward(backend, block, way, what);
          const NormGradients back = run_backward(backend, block, given, way, what);
          if (i == 0) first = got, first_gradients = back;
          check(got.output == first.output && got.code == first.code && got.mean == first.mean &&
                    got.var == first.var && back.plane == first_gradients.plane &&
                    back.weight == first_gradients.weight && back.bias == first_gradients.bias,
                what + ": differs from " + backend.ways[0]);
        }
      }
    }
  }
}

}  // namespace

void test_batch_norm(const NormBackend& backend, bool quick) {
  test_optional_arguments(backend);
  test_special_values(backend);
  test_offsets(backend);
  test_determinism(backend);
  test_cases(backend, quick);
}

}  // namespace selftest
