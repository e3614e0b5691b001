#include "test_dense_gradients.h"

#include <cmath>
#include <cstdio>
#include <string>

#include "cases.h"
#include "check.h"
#include "checked_calls.h"
#include "operands.h"
#include "reference.h"
#include "storage.h"

namespace selftest {
namespace {

using fusedcnn::Axis;
using fusedcnn::BackwardArgs;
using fusedcnn::DataType;
using fusedcnn::Geometry;
using fusedcnn::Pass;
using fusedcnn::Problem;

Geometry without_pool(Geometry g) {
  for (Axis* const axis : {&g.h, &g.w}) {
    axis->pool_kernel = axis->pool_stride = axis->pool_dilation = 1;
    axis->pool_padding = 0;
    axis->out = axis->conv;
  }
  g.ceil_mode = false;
  return g;
}

// Every output's only element.
std::vector<int32_t> codes(const Geometry& g) {
  return std::vector<int32_t>(g.batch * g.out_channels * g.outputs());
}

// body(problem, kernel) for every grad_weight kernel and problem on `g`.
template <typename Body>
void for_dense_kernels(const Backend& backend, const Geometry& g, const Body& body) {
  for (const DataType type : kTypes) {
    Problem problem{g, type, /*wide_code=*/false};
    problem.dense = true;
    for (const TestedKernel& kernel : backend.kernels) {
      if (kernel.pass == Pass::kGradWeight && !kernel.why_not(problem)) body(problem, kernel);
    }
  }
}

// Calls the kernel twice on the same sums, which begin as numbers of their own.
void check_accumulation(const Call& call, const Operands& operands, const Gradients& grads,
                        const std::string& what) {
  const Problem& problem = call.problem;
  const Geometry& g = problem.geometry;
  const DataType type =
      problem.type == DataType::kFloat64 ? DataType::kFloat64 : DataType::kFloat32;
  const Shape shape{g.out_channels, g.in_channels, g.h.kernel, g.w.kernel};
  std::vector<double> want = grads.weight, begin(want.size());
  for (size_t i = 0; i < want.size(); ++i) {
    begin[i] = static_cast<double>(i % 7);
    want[i] = begin[i] + 2 * want[i];
  }
  Tensor sums = tensor_of(type, shape, strides_for(Layout::kContiguous, shape), begin);
  TestedKernel adding = *call.kernel;
  adding.backward = [&](BackwardArgs args, int way) {
    args.accumulate = true;
    args.grad_weight = sums.data();
    args.grad_weight_strides = {};
    call.kernel->backward(args, way);
    call.kernel->backward(args, way);
  };
  Gradients got;
  run_backward({&adding, problem, call.layout, call.way}, operands, codes(g), &got, what);
  check_values(type, values_of(type, sums), want, what + ", added: grad_weight");
  check_values(problem.type, got.bias, grads.bias, what + ", added: grad_bias");
}

void test_integers(const Backend& backend, bool quick) {
  const int ways = static_cast<int>(backend.ways.size());
  int problems = 0;
  for (const Case& one : cases()) {
    const Geometry g = without_pool(one.geometry);
    const Operands operands = integer_operands(g);
    const Gradients grads = backward(g, operands, codes(g));
    int turn = 0;
    for_dense_kernels(backend, g, [&](const Problem& problem, const TestedKernel& kernel) {
      problems += kernel.accumulates;
      for (int layout = 0; layout < static_cast<int>(Layout::kCount); ++layout, ++turn) {
        for (int way = 0; way < ways; ++way) {
          if (quick && (turn + way) % ways != 0) continue;
          if (!in_share()) continue;
          const Call call{&kernel, problem, static_cast<Layout>(layout), way};
          const std::string what = describe(backend, call, one.name + " without pool");
          Gradients got;
          run_backward(call, operands, codes(g), &got, what);
          check_values(problem.type, got.weight, grads.weight, what + ": grad_weight");
          check_values(problem.type, got.bias, grads.bias, what + ": grad_bias");
          const std::string misuse = backend.misuse ? backend.misuse() : "";
          check(misuse.empty(), what + ": " + misuse);
          // The first way calls a kernel several times, to watch its memory.
          if (kernel.accumulates && way > 0) check_accumulation(call, operands, grads, what);
        }
      }
      const Call call{&kernel, problem, Layout::kContiguous, ways - 1};
      const std::string what = describe(backend, call, one.name + " without pool");
      Gradients got;
      run_backward(call, operands, codes(g), &got, what, true, false);
      check_values(problem.type, got.weight, grads.weight, what + ": grad_weight alone");
      run_backward(call, operands, codes(g), &got, what, false, true);
      check_values(problem.type, got.bias, grads.bias, what + ": grad_bias alone");
    });
  }
  std::printf("  %-8s dense gradients, %d problems\n", backend.name.c_str(), problems);
}

// Neither operand is multiplied by zeros that stand for padding.
void test_not_finite(const Backend& backend) {
  for (const char* case_name :
       {"block1", "block2", "one_output", "outputs70", "kernel7_stride2", "stride_is_dilation",
        "padding_over_kernel", "padding3x4", "dilation2x3", "text_column", "unread_rows"}) {
    const Geometry g = without_pool(case_named(case_name).geometry);
    for (const double rare : {kNan, kInfinity, -kInfinity}) {
      for (const bool of_input : {false, true}) {
        Random random(12);
        const auto finite = [&] { return random.integer(0, 1) ? 1. : -1.; };
        const auto some = [&] { return random.integer(0, 60) ? finite() : rare; };
        Operands operands = draw_operands(g, some, finite);
        (of_input ? operands.grad_output : operands.input) =
            draw(of_input ? operands.grad_output.size() : operands.input.size(), finite);
        const Gradients grads = backward(g, operands, codes(g));
        for_dense_kernels(backend, g, [&](const Problem& problem, const TestedKernel& kernel) {
          if (!kernel.accumulates || !in_share()) return;
          const Call call{&kernel, problem, Layout::kContiguous, 0};
          const std::string what =
              describe(backend, call,
                       std::string(case_name) + " with " + std::to_string(rare) +
                           (of_input ? " in the input" : " in the gradient"));
          Gradients got;
          run_backward(call, operands, codes(g), &got, what);
          check_values(problem.type, got.weight, grads.weight, what + ": grad_weight");
          check_values(problem.type, got.bias, grads.bias, what + ": grad_bias");
        });
      }
    }
  }
}

// The sum of squared errors, in float, of sums over all outputs in chains of `chain`.
double error_in_chains(const Geometry& g, const Operands& operands, const Gradients& grads,
                       int64_t chain) {
  double errors = 0;
  const int64_t outputs = g.outputs(), count = g.batch * outputs;
  for (int64_t w = 0; w < static_cast<int64_t>(grads.weight.size()); ++w) {
    const int64_t oc = w / g.taps() / g.in_channels, c = w / g.taps() % g.in_channels;
    const int64_t kh = w / g.w.kernel % g.h.kernel, kw = w % g.w.kernel;
    float sum = 0, total = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t n = i / outputs, o = i % outputs;
      const int64_t y = o / g.w.conv + kh - g.h.padding, x = o % g.w.conv + kw - g.w.padding;
      if (y >= 0 && y < g.h.in && x >= 0 && x < g.w.in) {
        const int64_t pixel = ((n * g.in_channels + c) * g.h.in + y) * g.w.in + x;
        sum = std::fma(
            static_cast<float>(operands.grad_output[(n * g.out_channels + oc) * outputs + o]),
            static_cast<float>(operands.input[pixel]), sum);
      }
      if ((i + 1) % chain == 0) total += sum, sum = 0;
    }
    errors += std::pow(total + sum - grads.weight[w], 2);
  }
  return errors;
}

void test_real_numbers(const Backend& backend, const Geometry& g) {
  Random random(13);
  const auto real = [&] { return rounded(DataType::kFloat32, random.real()); };
  const Operands operands = draw_operands(g, real, real);
  const Gradients grads = backward(g, operands, codes(g));
  // A sum of n products in chains of L errs in proportion to sqrt(L + n / L): in one chain 4.2
  // times as much as in chains of 256.
  const double chains = error_in_chains(g, operands, grads, 256);
  for_dense_kernels(backend, g, [&](const Problem& problem, const TestedKernel& kernel) {
    if (!kernel.accumulates || problem.type != DataType::kFloat32) return;
    Gradients first;
    for (int way = 0; way < static_cast<int>(backend.ways.size()); ++way) {
      const Call call{&kernel, problem, Layout::kContiguous, way};
      const std::string what = describe(backend, call, "dense gradients in floats");
      Gradients got;
      run_backward(call, operands, codes(g), &got, what);
      if (way == 0) first = got;
      check(got.weight == first.weight && got.bias == first.bias,
            what + ": differs from " + backend.ways[0]);
    }
    double sum = 0;
    for (size_t w = 0; w < grads.weight.size(); ++w) {
      sum += std::pow(first.weight[w] - grads.weight[w], 2);
    }
    check(sum <= 2 * chains, backend.name + " " + kernel.name + ": errs " +
                                 std::to_string(std::sqrt(sum / chains)) +
                                 " times as much as sums in chains of 256");
  });
}

}  // namespace

void test_dense_gradients(const Backend& backend, bool quick) {
  test_integers(backend, quick);
  test_not_finite(backend);
  // Of 4,800 outputs, and of 5,000 in one column.
  const Geometry g = without_pool(case_named("bands_of_rows").geometry);
  test_real_numbers(backend, g);
  Geometry column = g;
  column.batch = 1;
  column.h.in = column.h.conv = column.h.out = 5000;
  column.w.in = column.w.conv = column.w.out = 1;
  test_real_numbers(backend, column);
}

}  // namespace selftest
