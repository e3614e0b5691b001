#include "test_without_relu.h"

#include <string>

#include "cases.h"
#include "check.h"
#include "checked_calls.h"
#include "operands.h"
#include "reference.h"

namespace selftest {
namespace {

using fusedcnn::Geometry;
using fusedcnn::Pass;
using fusedcnn::Problem;

// body(problem, kernel) for every kernel and problem on `g` that leaves ReLU out.
template <typename Body>
void for_kernels_without_relu(const Backend& backend, const Geometry& g, const Body& body) {
  for_covering_kernels(backend, g, [&](Problem problem, int k) {
    const TestedKernel& kernel = backend.kernels[k];
    if (kernel.pass != Pass::kForward || !kernel.without_relu) return;
    problem.relu = false;
    body(problem, kernel);
  });
}

void check_misuse(const Backend& backend, const std::string& what) {
  const std::string misuse = backend.misuse ? backend.misuse() : "";
  check(misuse.empty(), what + ": " + misuse);
}

void test_values(const Backend& backend, bool quick) {
  const int ways = static_cast<int>(backend.ways.size());
  for (const Case& one : cases()) {
    const Operands operands = integer_operands(one.geometry);
    const Forward want = forward(one.geometry, operands, {}, /*relu=*/false);
    int turn = 0;
    for_kernels_without_relu(
        backend, one.geometry, [&](const Problem& problem, const TestedKernel& kernel) {
          for (int layout = 0; layout < static_cast<int>(Layout::kCount); ++layout, ++turn) {
            for (int way = 0; way < ways; ++way) {
              if (quick && (turn + way) % ways != 0) continue;
              if (!in_share()) continue;
              const Call call{&kernel, problem, static_cast<Layout>(layout), way};
              const std::string what = describe(backend, call, one.name);
              check_call(call, operands, want, {}, what);
              check_misuse(backend, what);
              Forward with_code, without;
              run_forward(call, operands, &with_code, what);
              run_forward(call, operands, &without, what, /*want_code=*/false);
              check(without.output == with_code.output, what + ": the same output without code");
              check_misuse(backend, what + " without code");
            }
          }
        });
  }
}

void test_special(const Backend& backend) {
  // All inputs: windows in which nothing is above minus infinity have a winner, too.
  for (const char* case_name :
       {"block1", "block2", "odd_map", "ceil", "pool1", "pool2_padding1", "pool3_stride1",
        "depthwise", "dilation2x3", "pool_dilation2", "large_overlapping", "large_dilated",
        "large_empty_windows", "empty_windows", "global_wide_code", "text_column"}) {
    const Geometry g = case_named(case_name).geometry;
    for (const double rare : {kNan, kInfinity, -kInfinity, -0.0}) {
      for (const int one_in : {1, 3, 20}) {
        Random random(11);
        // Without zeros in the weight, infinity times weight has one right answer.
        Operands operands = draw_operands(
            g, [&] { return random.integer(1, one_in) == 1 ? rare : random.integer(-1, 1); },
            [&] { return one_in == 1 || random.integer(0, 1) ? 1 : -1; });
        if (one_in == 20) operands.bias.clear();
        const Forward want = forward(g, operands, {}, /*relu=*/false);
        for_kernels_without_relu(
            backend, g, [&](const Problem& problem, const TestedKernel& kernel) {
              if (!in_share()) return;
              const Call call{&kernel, problem, Layout::kContiguous, 0};
              check_call(call, operands, want, {},
                         describe(backend, call,
                                  std::string(case_name) + " with " + std::to_string(rare) +
                                      " in one of " + std::to_string(one_in)));
            });
      }
    }
  }
}

}  // namespace

void test_without_relu(const Backend& backend, bool quick) {
  test_values(backend, quick);
  test_special(backend);
}

}  // namespace selftest
