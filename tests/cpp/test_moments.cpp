#include "test_moments.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cases.h"
#include "check.h"
#include "checked_calls.h"
#include "operands.h"
#include "reference.h"
#include "storage.h"

namespace selftest {
namespace {

using fusedcnn::DataType;
using fusedcnn::Geometry;
using fusedcnn::Moments;
using fusedcnn::Pass;
using fusedcnn::Problem;

Geometry plane_of(Geometry g) {
  for (fusedcnn::Axis* axis : {&g.h, &g.w}) {
    axis->pool_kernel = axis->pool_stride = axis->pool_dilation = 1;
    axis->pool_padding = 0;
    axis->out = axis->conv;
  }
  return g;
}

// Of outputs [N, OC, conv h, conv w], by channel.
std::vector<Moments> moments_of(const Geometry& g, const std::vector<double>& outputs) {
  const int64_t pixels = g.h.conv * g.w.conv;
  std::vector<Moments> result(g.out_channels);
  for (int64_t oc = 0; oc < g.out_channels; ++oc) {
    const auto for_outputs = [&](const auto& body) {
      for (int64_t n = 0; n < g.batch; ++n) {
        for (int64_t i = 0; i < pixels; ++i) body(outputs[(n * g.out_channels + oc) * pixels + i]);
      }
    };
    Moments& m = result[oc];
    m.count = static_cast<double>(g.batch * pixels);
    for_outputs([&](double y) { m.mean += y / m.count; });
    for_outputs([&](double y) { m.squares += (y - m.mean) * (y - m.mean); });
  }
  return result;
}

std::vector<double> outputs_of(const Geometry& g, const Operands& operands) {
  std::vector<double> outputs;
  for (int64_t n = 0; n < g.batch; ++n) {
    for (int64_t oc = 0; oc < g.out_channels; ++oc) {
      for (int64_t i = 0; i < g.h.conv * g.w.conv; ++i) {
        outputs.push_back(convolution(g, operands, n, oc, i / g.w.conv, i % g.w.conv));
      }
    }
  }
  return outputs;
}

// Slots put together, in order.
std::vector<Moments> joined(const Geometry& g, const std::vector<Moments>& slots) {
  std::vector<Moments> result(g.out_channels);
  for (int pass = 0; pass < 2; ++pass) {
    for (size_t i = 0; i < slots.size(); ++i) {
      Moments& m = result[i % g.out_channels];
      const Moments& part = slots[i];
      if (pass == 0) {
        m.count += part.count;
        m.mean += part.count * part.mean;
      } else {
        m.squares += part.squares + part.count * (part.mean - m.mean) * (part.mean - m.mean);
      }
    }
    for (Moments& m : result) m.mean = pass == 0 ? m.mean / m.count : m.mean;
  }
  return result;
}

bool near(double got, double want, double allowed) {
  return got == want || (std::isnan(got) && std::isnan(want)) || std::fabs(got - want) <= allowed;
}

// error: of an output, at most; relative: of a root of squares, beside. Roots of sums of squares
// are lengths, and outputs that err by e have one that errs by at most sqrt(count) e.
void check_moments(const std::vector<Moments>& got, const std::vector<Moments>& want, double error,
                   double relative, const std::string& what) {
  std::string difference;
  for (size_t i = 0; difference.empty() && i < want.size(); ++i) {
    const double length = std::sqrt(want[i].squares), root = std::sqrt(want[i].count);
    const double of_mean = error + relative * (std::fabs(want[i].mean) * 1e-3 + length / root);
    if (got[i].count == want[i].count && near(got[i].mean, want[i].mean, of_mean) &&
        near(std::sqrt(got[i].squares), length, root * error + relative * length)) {
      continue;
    }
    char text[300];
    std::snprintf(text, sizeof text,
                  " of channel %zu: expected %.17g with %.17g of %g, got %.17g with %.17g of %g", i,
                  want[i].mean, want[i].squares, want[i].count, got[i].mean, got[i].squares,
                  got[i].count);
    difference = text;
  }
  check(difference.empty(), what + difference);
}

// body(problem, kernel) for every kernel and problem on `g` that writes moments.
template <typename Body>
void for_kernels_with_moments(const Backend& backend, const Geometry& g, const Body& body) {
  for_covering_kernels(backend, g, [&](Problem problem, int k) {
    const TestedKernel& kernel = backend.kernels[k];
    problem.relu = false;
    problem.moments = true;
    if (kernel.moment_slots && !kernel.why_not(problem)) body(problem, kernel);
  });
}

// What sums of chunks in float err by, relative to a root of squares: csrc/cpu/kernels/moments.h's
// 3 a u for chunks whose first window is as good as any other. Small integers are exact where the
// shift is: where the window has 4 outputs, or another power of two.
constexpr double kFloatChunks = 3 * (32 + 4) * 0x1p-24;

double relative_error(const Problem& problem, int offset) {
  const int64_t window = problem.geometry.window();
  const bool exact = problem.type == DataType::kFloat64 || (!offset && !(window & (window - 1)));
  return exact ? 1e-12 : kFloatChunks;
}

double largest(const std::vector<double>& values) {
  double result = 0;
  for (const double value : values) result = std::fmax(result, std::fabs(value));
  return result;
}

void test_integers(const Backend& backend) {
  for (const Case& one : cases()) {
    const Geometry& g = one.geometry;
    if (g.batch == 0) continue;
    for (const int offset : {0, 1 << 11}) {
      // Far from zero outputs are integers that a float still holds, unlike their squares.
      if (offset && g.in_channels_per_group() * g.taps() > 160) continue;
      Operands operands = integer_operands(g);
      for (double& value : operands.input) value += offset;
      for (double& weight : operands.weight) weight = offset ? std::fabs(weight) : weight;
      const std::vector<double> outputs = outputs_of(g, operands);
      const std::vector<Moments> want = moments_of(g, outputs);
      const Forward block = forward(g, operands, {}, /*relu=*/false);
      for_kernels_with_moments(backend, g, [&](const Problem& problem, const TestedKernel& kernel) {
        if (offset && (problem.type == DataType::kBFloat16 || problem.type == DataType::kFloat16)) {
          return;
        }
        for (const Layout layout : {Layout::kContiguous, Layout::kChannelsLast}) {
          for (int way = 0; way < static_cast<int>(backend.ways.size()); ++way) {
            if (!in_share()) continue;
            const Call call{&kernel, problem, layout, way};
            const std::string what = describe(backend, call, one.name + " with moments");
            Forward got;
            std::vector<Moments> slots;
            run_forward(call, operands, &got, what, /*want_code=*/true, &slots);
            const std::string misuse = backend.misuse ? backend.misuse() : "";
            check(misuse.empty(), what + ": " + misuse);
            if (kernel.exact) check_values(problem.type, got.output, block.output, what);
            check_moments(joined(g, slots), want, kernel.exact ? 0 : largest(outputs) * 0x1p-18,
                          relative_error(problem, offset), what);
          }
        }
      });
    }
  }
}

// Case names: of blocks that kernels of each kind cover.
constexpr const char* kBlocks[] = {"block1",     "block2",          "channels64", "bands",
                                   "no_padding", "wide_pooled_map", "pool3_cover"};

// Floats near 1e4, whose squares hide what they vary by.
void test_floats(const Backend& backend) {
  for (const char* case_name : kBlocks) {
    const Geometry g = case_named(case_name).geometry, plane = plane_of(g);
    Random random(12);
    const auto real = [&] { return rounded(DataType::kFloat32, random.real()); };
    Operands operands = draw_operands(g, real, real);
    for (int64_t i = 0; i < g.out_channels; ++i) operands.bias[i] = 1e4;
    for_kernels_with_moments(backend, g, [&](const Problem& problem, const TestedKernel& kernel) {
      Problem alone = problem;
      alone.geometry = plane;
      alone.moments = false;
      if (problem.type != DataType::kFloat32 || kernel.why_not(alone) || !in_share()) return;
      const Call call{&kernel, problem, Layout::kContiguous, 0};
      const std::string what = describe(backend, call, std::string(case_name) + " near 1e4");
      Forward got, outputs;
      std::vector<Moments> slots;
      run_forward(call, operands, &got, what, /*want_code=*/true, &slots);
      // The kernel's own outputs, without the bias where it comes last.
      run_forward({&kernel, alone, Layout::kContiguous, 0}, operands, &outputs, what);
      // A bias that is added after the statistics rounds an output.
      const double rounding = largest(outputs.output) * 0x1p-23;
      check_moments(joined(g, slots), moments_of(g, outputs.output), rounding, kFloatChunks, what);
    });
  }
}

void test_not_finite(const Backend& backend) {
  constexpr double kHuge = 0x1p60;  // beyond what the Winograd kernels transform
  for (const char* case_name : kBlocks) {
    const Geometry g = case_named(case_name).geometry;
    for (const double rare : {kNan, kInfinity, -kInfinity, kHuge}) {
      Random random(13);
      Operands operands =
          draw_operands(g, [&] { return random.integer(-1, 1); }, [&] { return 1; });
      for (int i = 0; i < 3; ++i) {
        operands.input[random.integer(0, static_cast<int64_t>(operands.input.size()) - 1)] = rare;
      }
      const std::vector<Moments> want = moments_of(g, outputs_of(g, operands));
      for_kernels_with_moments(backend, g, [&](const Problem& problem, const TestedKernel& kernel) {
        if (problem.type == DataType::kFloat16 || !in_share()) return;
        const Call call{&kernel, problem, Layout::kContiguous, 0};
        const std::string what =
            describe(backend, call, std::string(case_name) + " with " + std::to_string(rare));
        Forward got;
        std::vector<Moments> slots;
        run_forward(call, operands, &got, what, /*want_code=*/true, &slots);
        check_moments(joined(g, slots), want, 0, rare == kHuge ? kFloatChunks : 1e-12, what);
      });
    }
  }
}

void test_ways(const Backend& backend) {
  for (const char* case_name : kBlocks) {
    const Geometry g = case_named(case_name).geometry;
    Random random(14);
    const Operands operands =
        draw_operands(g, [&] { return random.real(); }, [&] { return random.real(); });
    for_kernels_with_moments(backend, g, [&](const Problem& problem, const TestedKernel& kernel) {
      if (!in_share()) return;
      std::vector<Moments> first;
      for (int way = 0; way < static_cast<int>(backend.ways.size()); ++way) {
        const Call call{&kernel, problem, Layout::kContiguous, way};
        const std::string what = describe(backend, call, std::string(case_name) + " in floats");
        Forward got;
        std::vector<Moments> slots;
        run_forward(call, operands, &got, what, /*want_code=*/true, &slots);
        if (way == 0) first = slots;
        const size_t bytes = slots.size() * sizeof(Moments);
        check(slots.size() == first.size() && !std::memcmp(slots.data(), first.data(), bytes),
              what + ": moments differ from " + backend.ways[0]);
      }
    });
  }
}

}  // namespace

void test_moments(const Backend& backend) {
  test_integers(backend);
  test_floats(backend);
  test_not_finite(backend);
  test_ways(backend);
}

}  // namespace selftest
