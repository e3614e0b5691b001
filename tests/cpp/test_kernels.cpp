#include "test_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <string>

#include "cases.h"
#include "check.h"
#include "checked_calls.h"
#include "operands.h"
#include "reference.h"
#include "storage.h"

namespace selftest {
using fusedcnn::DataType;
using fusedcnn::Geometry;
using fusedcnn::Pass;
using fusedcnn::Problem;

void test_exact(const Backend& backend, bool quick) {
  std::vector<int> calls(backend.kernels.size());
  const int ways = static_cast<int>(backend.ways.size());
  for (const Case& one : cases()) {
    const Operands operands = integer_operands(one.geometry);
    const Forward want = forward(one.geometry, operands);
    const Gradients grads = backward(one.geometry, operands, want.code);
    int turn = 0;
    for_covering_kernels(backend, one.geometry, [&](const Problem& problem, int k) {
      ++calls[k];
      for (int layout = 0; layout < static_cast<int>(Layout::kCount); ++layout, ++turn) {
        for (int way = 0; way < ways; ++way) {
          if (quick && (turn + way) % ways != 0) continue;
          if (!in_share()) continue;
          const Call call{&backend.kernels[k], problem, static_cast<Layout>(layout), way};
          const std::string what = describe(backend, call, one.name);
          check_call(call, operands, want, grads, what);
          const std::string misuse = backend.misuse ? backend.misuse() : "";
          check(misuse.empty(), what + ": " + misuse);
        }
      }
    });
  }
  for (int k = 0; k < static_cast<int>(backend.kernels.size()); ++k) {
    const TestedKernel& kernel = backend.kernels[k];
    if (kernel.accumulates) continue;  // see test_dense_gradients.h
    std::printf("  %-8s %-11s %-12s %d problems\n", backend.name.c_str(), name(kernel.pass),
                kernel.name.c_str(), calls[k]);
    check(calls[k] > 0, backend.name + " " + name(kernel.pass) + " " + kernel.name +
                            ": no case is covered by this kernel; add one to cases.cpp");
  }
}

void test_special_values(const Backend& backend) {
  struct Data {
    const char* name;
    double rare;  // in one element of 20
  };
  constexpr Data kInputs[] = {
      {"NaN", kNan}, {"infinity", kInfinity}, {"-infinity", -kInfinity}, {"-0", -0.0}, {"ties", 1}};
  for (const char* case_name :
       {"block1", "block2", "channels8", "odd_map", "ceil", "pool2_padding1", "pool3_stride1",
        "depthwise", "dilation2x3", "large_overlapping", "large_dilated", "global_wide_code",
        "text_column"}) {
    const Geometry g = case_named(case_name).geometry;
    for (const Data& data : kInputs) {
      Random random(7);
      // Without zeros in the weight, infinity times weight has one right answer.
      Operands operands = draw_operands(
          g, [&] { return random.integer(0, 19) ? random.integer(-1, 1) : data.rare; },
          [&] { return random.integer(0, 1) ? 1 : -1; });
      operands.grad_output =
          draw(operands.grad_output.size(), [&] { return random.integer(-2, 2); });
      operands.bias[0] = -0.0;
      operands.bias.back() = data.rare;
      const Forward want = forward(g, operands);
      // No gradient flows where ReLU is off, not even a NaN.
      for (size_t i = 0; i < want.code.size(); ++i) {
        if (want.code[i] < 0) operands.grad_output[i] = i % 2 ? kNan : kInfinity;
      }
      const Gradients grads = backward(g, operands, want.code);
      const Gradients dense =
          convolution_backward(g, operands, convolution_gradient(g, operands, want.code));
      for_covering_kernels(backend, g, [&](const Problem& problem, int k) {
        for (const Layout layout :
             {Layout::kContiguous, Layout::kChannelsLast, Layout::kPermuted}) {
          if (!in_share()) continue;
          const Call call{&backend.kernels[k], problem, layout, 0};
          check_call(call, operands, want, grads,
                     describe(backend, call, std::string(case_name) + " with " + data.name),
                     &dense);
        }
      });
    }
    // NaN and infinite gradients reach grad_bias and grad_input at exactly the right elements.
    Random random(8);
    Operands operands = draw_operands(
        g, [&] { return random.integer(-1, 1); }, [&] { return random.integer(0, 1) ? 1 : -1; });
    const Forward want = forward(g, operands);
    for (size_t i = 0; i < operands.grad_output.size(); i += 31) {
      operands.grad_output[i] = i % 2 ? kNan : kInfinity;
    }
    const Gradients grads = backward(g, operands, want.code);
    for_covering_kernels(backend, g, [&](const Problem& problem, int k) {
      const Call call{&backend.kernels[k], problem, Layout::kContiguous, 0};
      const std::string what =
          describe(backend, call, std::string(case_name) + " with NaN and infinite gradients");
      if (call.kernel->pass == Pass::kForward || !in_share()) return;
      Gradients got;
      run_backward(call, operands, want.code, &got, what);
      if (call.kernel->pass == Pass::kGradInput) {
        check_values(problem.type, got.input, grads.input, what + ": grad_input");
      } else {
        check_values(problem.type, got.bias, grads.bias, what + ": grad_bias");
      }
    });
  }
  // Inputs just small enough for the transforms, while the sum of their squares is not.
  for (const char* case_name : {"block1", "odd_map", "channels8"}) {
    const Geometry g = case_named(case_name).geometry;
    Operands operands = integer_operands(g);
    for (double& value : operands.input) value *= 0x1p47;
    for (double& value : operands.bias) value *= 0x1p47;
    const Forward want = forward(g, operands);
    for_covering_kernels(backend, g, [&](const Problem& problem, int k) {
      const Call call{&backend.kernels[k], problem, Layout::kContiguous, 0};
      if (call.kernel->pass != Pass::kForward || !call.kernel->exact) return;
      if (problem.type == DataType::kFloat16 || !in_share()) return;
      const std::string what = describe(backend, call, std::string(case_name) + " up to 2^48");
      Forward got;
      run_forward(call, operands, &got, what);
      check_values(problem.type, got.output, want.output, what + ": output");
    });
  }
}

void test_optional_arguments(const Backend& backend) {
  for (const char* case_name :
       {"no_images", "odd_map", "block2", "pool3", "groups2", "window256"}) {
    const Geometry g = case_named(case_name).geometry;
    Operands operands = integer_operands(g);
    operands.bias.clear();
    const Forward want = forward(g, operands);
    const Gradients grads = backward(g, operands, want.code);
    for_covering_kernels(backend, g, [&](const Problem& problem, int k) {
      if (!in_share()) return;
      const Call call{&backend.kernels[k], problem, Layout::kContiguous,
                      static_cast<int>(backend.ways.size()) - 1};
      const DataType type = problem.type;
      if (call.kernel->pass == Pass::kForward) {
        const std::string what = describe(backend, call, std::string(case_name) + " without bias");
        Forward got;
        run_forward(call, operands, &got, what);
        const std::vector<double> with_code = got.output;
        if (call.kernel->exact) check_values(type, got.output, want.output, what + ": output");
        if (!call.kernel->exact) check_rounded(problem, operands, got, want, what);
        run_forward(call, operands, &got, what, /*want_code=*/false);
        check(got.output == with_code, what + ": the same output without code");
      } else if (call.kernel->pass == Pass::kGradWeight) {
        const std::string what = describe(backend, call, case_name);
        Gradients got;
        run_backward(call, operands, want.code, &got, what, true, false);
        check_values(type, got.weight, grads.weight, what + ": grad_weight without grad_bias");
        run_backward(call, operands, want.code, &got, what, false, true);
        check_values(type, got.bias, grads.bias, what + ": grad_bias without grad_weight");
      }
    });
  }
}

namespace {

double square(double value) { return value * value; }
double squares(const std::vector<double>& values, const std::vector<double>& exact) {
  double sum = 0;
  for (size_t i = 0; i < exact.size(); ++i) sum += square(values[i] - exact[i]);
  return sum;
}

// A sum of n products in chains of L errs in proportion to sqrt(L + n / L): 576 products in one
// chain 2.8 times as much as in chains of 64, in chains of 288 still twice.
void check_rounding(double errors, double in_chains, const std::string& what) {
  check(errors <= 4 * in_chains, what + ": errs " + std::to_string(std::sqrt(errors / in_chains)) +
                                     " times as much as sums in chains of 64");
}

// Exact kernels' in float32. Few channels of many, so that sums have many products: some 580 of
// grad_input's where a pixel meets all taps, some 1,000 of grad_weight's.
void test_rounding_of_gradients(const Backend& backend, Pass pass) {
  Geometry g = case_named(pass == Pass::kGradInput ? "channels8" : "block1").geometry;
  if (pass == Pass::kGradInput) {
    g.out_channels = 512;
  } else {
    g.batch = 8;
  }
  Random random(11);
  const auto real = [&] { return rounded(DataType::kFloat32, random.real()); };
  const Operands operands = draw_operands(g, real, real);
  const std::vector<int32_t> code = forward(g, operands).code;
  const Gradients want = backward(g, operands, code);
  const Gradients chains = backward_in_chains(g, operands, code, 64);
  for_covering_kernels(backend, g, [&](const Problem& problem, int k) {
    const Call call{&backend.kernels[k], problem, Layout::kContiguous, 0};
    if (call.kernel->pass != pass || !call.kernel->exact) return;
    if (problem.type != DataType::kFloat32) return;
    const std::string what = describe(backend, call, "rounding");
    Gradients got;
    run_backward(call, operands, code, &got, what);
    pass == Pass::kGradInput
        ? check_rounding(squares(got.input, want.input), squares(chains.input, want.input), what)
        : check_rounding(squares(got.weight, want.weight), squares(chains.weight, want.weight),
                         what);
  });
}

}  // namespace

void test_rounding(const Backend& backend) {
  test_rounding_of_gradients(backend, Pass::kGradWeight);
  test_rounding_of_gradients(backend, Pass::kGradInput);
  const Geometry g = case_named("channels64").geometry;
  Random random(10);
  const auto real = [&] { return rounded(DataType::kFloat32, random.real()); };
  Operands operands = draw_operands(g, real, real);
  operands.bias.clear();
  const Forward want = forward(g, operands);
  double chains = 0;  // the sum of squared errors of sums in chains of 64 products
  for (size_t i = 0; i < want.output.size(); ++i) {
    if (want.code[i] < 0) continue;
    const double value =
        window_element_in_chains(g, operands, static_cast<int64_t>(i), want.code[i], 64);
    chains += square(value - want.output[i]);
  }
  for_covering_kernels(backend, g, [&](const Problem& problem, int k) {
    const Call call{&backend.kernels[k], problem, Layout::kContiguous, 0};
    if (call.kernel->pass != Pass::kForward || !call.kernel->exact) return;
    if (problem.type != DataType::kFloat32) return;
    const std::string what = describe(backend, call, "rounding");
    Forward got;
    run_forward(call, operands, &got, what);
    double sum = 0;
    for (size_t i = 0; i < want.output.size(); ++i) {
      // What is off has no error of its own.
      if (want.code[i] >= 0) sum += square(got.output[i] - want.output[i]);
    }
    check_rounding(sum, chains, what);
  });
}

void test_stray_codes(const Backend& backend) {
  for (const char* case_name : {"block1", "block2", "channels8", "pool3"}) {
    const Geometry g = case_named(case_name).geometry;
    const Operands operands = integer_operands(g);
    const std::vector<int32_t> code(operands.grad_output.size(), 200);
    const auto zero = [](double value) { return value == 0; };
    for_covering_kernels(backend, g, [&](const Problem& problem, int k) {
      const Call call{&backend.kernels[k], problem, Layout::kContiguous, 0};
      if (call.kernel->pass == Pass::kForward || !in_share()) return;
      const std::string what = describe(backend, call, std::string(case_name) + ", stray codes");
      Gradients got;
      if (!run_backward(call, operands, code, &got, what)) return;
      const std::string misuse = backend.misuse ? backend.misuse() : "";
      check(misuse.empty(), what + ": " + misuse);
      const bool zeros = std::all_of(got.input.begin(), got.input.end(), zero) &&
                         std::all_of(got.weight.begin(), got.weight.end(), zero);
      check(zeros, what + ": expected no gradient");
    });
  }
}

void test_determinism(const Backend& backend) {
  for (const char* case_name :
       {"block1", "block2", "many_images", "pool3", "groups3_uneven", "overlapping_slices"}) {
    const Geometry g = case_named(case_name).geometry;
    Random random(9);
    const Operands operands =
        draw_operands(g, [&] { return random.real(); }, [&] { return random.real(); });
    const std::vector<int32_t> code = forward(g, operands).code;
    for_covering_kernels(backend, g, [&](const Problem& problem, int k) {
      if (!in_share()) return;
      const int ways = static_cast<int>(backend.ways.size());
      std::vector<Forward> forwards(ways);
      std::vector<Gradients> gradients(ways);
      for (int p = 0; p < ways; ++p) {
        const Call call{&backend.kernels[k], problem, Layout::kContiguous, p};
        const std::string what = describe(backend, call, std::string(case_name) + " in floats");
        if (call.kernel->pass == Pass::kForward) {
          run_forward(call, operands, &forwards[p], what);
        } else {
          run_backward(call, operands, code, &gradients[p], what);
        }
        check(forwards[p].output == forwards[0].output && forwards[p].code == forwards[0].code &&
                  gradients[p].input == gradients[0].input &&
                  gradients[p].weight == gradients[0].weight &&
                  gradients[p].bias == gradients[0].bias,
              what + ": differs from " + backend.ways[0]);
      }
    });
  }
}

}  // namespace selftest
