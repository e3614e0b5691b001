#include "test_products.h"

#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <string>

#include "calls.h"
#include "cases.h"
#include "check.h"
#include "reference.h"
#include "storage.h"

namespace selftest {
namespace {

using fusedcnn::DataType;
using fusedcnn::Geometry;

constexpr double kLargest = std::numeric_limits<float>::max();
constexpr double kSmallest = std::numeric_limits<float>::denorm_min();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// How far a result may lie from the exact one: `relative` to the sum of its products' magnitudes.
struct Allowed {
  double relative;
  double absolute;
};

std::string text(double value) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.9g", value);
  return digits;
}

void check_forward(const Backend& backend, const char* case_name, const Operands& operands,
                   Allowed allowed, const std::string& data) {
  const Geometry& g = case_named(case_name).geometry;
  Operands magnitudes = operands;
  for (double& value : magnitudes.input) value = std::fabs(value);
  for (double& value : magnitudes.weight) value = std::fabs(value);
  const Forward want = forward(g, operands), scale = forward(g, magnitudes);
  for (const TestedKernel& kernel : backend.kernels) {
    const fusedcnn::Problem problem{g, DataType::kFloat32, false};
    if (kernel.pass != fusedcnn::Pass::kForward || kernel.tf32 || kernel.why_not(problem)) {
      continue;
    }
    const std::string what = kernel.name + " on " + case_name + " with " + data;
    Forward got;
    run_forward({&kernel, problem, Layout::kContiguous, 0}, operands, &got, what);
    std::string difference;
    for (size_t i = 0; difference.empty() && i < want.output.size(); ++i) {
      const double expected = rounded(DataType::kFloat32, want.output[i]), value = got.output[i];
      // Beside an infinite sum of magnitudes stand infinity and NaN, which have no distance.
      const bool same = value == expected || (std::isnan(value) && std::isnan(expected));
      const double room = allowed.relative * scale.output[i] + allowed.absolute;
      const bool near = std::isfinite(expected) && std::fabs(value - expected) <= room;
      if (same || near) continue;
      difference =
          " at " + std::to_string(i) + ": expected " + text(expected) + ", got " + text(value);
    }
    check(difference.empty(), what + difference);
  }
}

}  // namespace

void test_float32_products(const Backend& backend) {
  for (const char* case_name : {"block2", "channels15", "channels8"}) {
    const Geometry& g = case_named(case_name).geometry;
    const int64_t depth = g.in_channels * 9;
    std::mt19937 random(11);
    const auto integer = [&](int low, int high) {
      return low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1));
    };
    // A float of 24 significant bits in 0.5..1.
    const auto real = [&] { return (random() % (1u << 23) + (1u << 23)) * 0x1p-24; };
    const auto signed_real = [&] { return integer(0, 1) ? real() : -real(); };
    const auto fill = [](std::vector<double>* values, const std::function<double()>& one) {
      for (double& value : *values) value = one();
    };
    Operands dense;
    dense.input.resize(g.batch * g.in_channels * g.h.in * g.w.in);
    dense.weight.resize(g.out_channels * depth);
    fill(&dense.weight, signed_real);

    // Each of `depth` additions rounds by 2^-24 of a sum that is no larger than the magnitudes'.
    const double chain = static_cast<double>(depth) * 0x1p-24;
    fill(&dense.input, signed_real);
    check_forward(backend, case_name, dense, {chain, 0}, "reals");

    // One product an output: nothing hides what it has lost. 2^-21 is what three products in tf32
    // may lose of one, and 2^-136 what they may lose of an operand.
    Operands single = dense;
    fill(&single.weight, [] { return 0; });
    for (int64_t oc = 0; oc < g.out_channels; ++oc) {
      single.weight[oc * depth + oc * 7 % depth] = signed_real();
    }
    const Allowed one_product{0x1p-21, 0};
    fill(&single.input, signed_real);
    check_forward(backend, case_name, single, one_product, "single products");
    fill(&single.input, [&] { return signed_real() * 0x1p48; });
    check_forward(backend, case_name, single, one_product, "large operands");
    fill(&single.input, [&] {
      return std::ldexp(rounded(DataType::kFloat32, signed_real()), integer(-100, 127));
    });
    check_forward(backend, case_name, single, one_product, "operands of all magnitudes");
    fill(&single.input,
         [&] { return rounded(DataType::kFloat32, kLargest * (1 - integer(0, 3) * 0x1p-24)); });
    check_forward(backend, case_name, single, one_product, "the largest floats");
    fill(&single.input, [&] { return integer(-99999, 99999) * kSmallest; });
    check_forward(backend, case_name, single, {0x1p-21, 0x1p-136}, "subnormal operands");

    // Large weights bring out what is lost of small pixels.
    Operands uneven = single;
    for (double& value : uneven.weight) value *= 0x1p100;
    check_forward(backend, case_name, uneven, {0x1p-21, 0}, "subnormal times large");

    // Infinity times any number but zero is infinite, however few bits the number has, and however
    // small it is.
    for (const double rare : {kInfinity, -kInfinity}) {
      Operands special = dense;
      fill(&special.input, [&] { return integer(-1, 1); });
      special.input[special.input.size() / 3] = rare;
      fill(&special.weight, [&] {
        const double values[] = {1, -1, kSmallest, -kSmallest, 1 - 0x1p-24};
        return values[integer(0, 4)];
      });
      check_forward(backend, case_name, special, {chain, 0x1p-130}, "an infinite pixel");
      // Outside the image, where there is padding, it would meet zeros.
      if (g.h.padding) continue;
      special = dense;
      fill(&special.input, [&] { return integer(0, 1) ? 1 : -kSmallest; });
      special.weight[depth + 4] = rare;
      check_forward(backend, case_name, special, {chain, 0x1p-130}, "an infinite weight");
    }
  }
}

void test_tf32_rounding(const Backend& backend) {
  const Geometry& g = case_named("block2").geometry;
  std::mt19937 random(12);
  const auto fill = [&](int64_t count, int odd) {
    std::vector<double> values(static_cast<size_t>(count));
    for (double& value : values) {
      // -1, 0 or 1; or, of twelve significant bits with the last one set, +-2049 to +-4095.
      value = odd ? 2049. + 2 * static_cast<int>(random() % 1024) : random() % 3 - 1.;
      if (odd && random() % 2) value = -value;
    }
    return values;
  };
  // tf32 has eleven bits: between two numbers, away from zero.
  const auto round = [](std::vector<double> values) {
    for (double& value : values) value += value > 0 ? 1 : -1;
    return values;
  };
  enum { kInput, kWeight, kGradOutput };
  for (const int odd : {kInput, kWeight, kGradOutput}) {
    Operands operands;
    operands.input = fill(g.batch * g.in_channels * g.h.in * g.w.in, odd == kInput);
    operands.weight = fill(g.out_channels * g.in_channels * g.taps(), odd == kWeight);
    operands.bias.assign(static_cast<size_t>(g.out_channels), 1);
    operands.grad_output = fill(g.batch * g.out_channels * g.outputs(), odd == kGradOutput);
    Operands rounded = operands;
    for (auto* values : {&rounded.input, &rounded.weight, &rounded.grad_output}) {
      if (std::fabs(values->front()) > 1) *values = round(*values);
    }
    const Forward want = forward(g, rounded);
    const Gradients grads = backward(g, rounded, want.code);
    const std::vector<double> bias = backward(g, operands, want.code).bias;  // no product
    for (const TestedKernel& kernel : backend.kernels) {
      const fusedcnn::Problem problem{g, DataType::kFloat32, false};
      if (!kernel.tf32 || kernel.why_not(problem)) continue;
      // By rows, by pixels and word by word.
      for (const Layout layout : {Layout::kContiguous, Layout::kChannelsLast, Layout::kPermuted}) {
        const Call call{&kernel, problem, layout, 0};
        const std::string what = kernel.name + std::string(" rounds to tf32, operand ") +
                                 std::to_string(odd) + ": " + name(kernel.pass);
        if (kernel.pass == fusedcnn::Pass::kForward) {
          Forward got;
          run_forward(call, operands, &got, what);
          check(got.output == want.output && got.code == want.code, what);
          continue;
        }
        Gradients got;
        run_backward(call, operands, want.code, &got, what);
        if (kernel.pass == fusedcnn::Pass::kGradWeight) {
          check(got.weight == grads.weight, what);
          check(got.bias == bias, what + ", the bias's");
        } else {
          check(got.input == grads.input, what);
        }
      }
    }
  }
}

}  // namespace selftest
