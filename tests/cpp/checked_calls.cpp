#include "checked_calls.h"

#include <algorithm>
#include <cmath>

#include "check.h"
#include "operands.h"
#include "storage.h"

namespace selftest {

using fusedcnn::DataType;
using fusedcnn::Pass;
using fusedcnn::Problem;

namespace {

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

bool check_codes(const std::vector<int32_t>& got, const std::vector<int32_t>& want,
                 const std::string& what) {
  std::string difference;
  if (got.size() != want.size()) difference = ": wrong size";
  for (size_t i = 0; difference.empty() && i < want.size(); ++i) {
    if (got[i] == want[i]) continue;
    difference = " at " + std::to_string(i) + ": expected " + std::to_string(want[i]) + ", got " +
                 std::to_string(got[i]);
  }
  return check(difference.empty(), what + difference);
}

}  // namespace

bool check_values(DataType type, const std::vector<double>& got, const std::vector<double>& want,
                  const std::string& what) {
  std::string difference;
  if (got.size() != want.size()) difference = ": wrong size";
  for (size_t i = 0; difference.empty() && i < want.size(); ++i) {
    const double expected = rounded(type, want[i]);
    if (same(got[i], expected)) continue;
    difference = " at " + std::to_string(i) + ": expected " + std::to_string(expected) + ", got " +
                 std::to_string(got[i]);
  }
  return check(difference.empty(), what + difference);
}

void check_rounded(const Problem& problem, const Operands& operands, const Forward& got,
                   const Forward& want, const std::string& what) {
  double largest = 1;
  for (const double value : want.output) {
    if (std::isfinite(value)) largest = std::max(largest, std::fabs(value));
  }
  const double allowed = largest * 0x1p-18;
  std::string difference;
  for (size_t i = 0; difference.empty() && i < want.output.size(); ++i) {
    const double value = got.output[i], best = want.output[i];
    const bool close = same(value, best) || (value >= rounded(problem.type, best - allowed) &&
                                             value <= rounded(problem.type, best + allowed));
    // Where both are off, or name the same element, there is nothing to choose.
    bool winner = got.code[i] == want.code[i];
    if (!winner && std::isfinite(best)) {
      const double named = got.code[i] < 0 && problem.relu
                               ? 0
                               : window_element(problem.geometry, operands, i, got.code[i]);
      winner = std::fabs(named - best) <= allowed;
    }
    if (close && winner) continue;
    difference = " at " + std::to_string(i) + ": expected " + std::to_string(best) + " of " +
                 std::to_string(want.code[i]) + ", got " + std::to_string(value) + " of " +
                 std::to_string(got.code[i]);
  }
  check(difference.empty(), what + difference);
}

std::string describe(const Backend& backend, const Call& call, const std::string& data) {
  return backend.name + " " + name(call.kernel->pass) + " " + call.kernel->name + " " +
         name(call.problem.type) + (call.problem.wide_code ? " int32 code " : " byte code ") +
         (call.problem.relu ? "" : "without ReLU ") + name(call.layout) + ", " +
         backend.ways[call.way] + ", " + data;
}

void check_call(const Call& call, const Operands& operands, const Forward& want,
                const Gradients& all, const std::string& what, const Gradients* dense) {
  const DataType type = call.problem.type;
  const auto& stored = call.kernel->stored;
  if (call.kernel->pass == Pass::kForward) {
    Forward got;
    run_forward(call, operands, &got, what);
    if (!call.kernel->exact) return check_rounded(call.problem, operands, got, want, what);
    // What rounds before it pools sees other ties; of other types than halves nothing is rounded.
    const bool rounds = stored && (type == DataType::kBFloat16 || type == DataType::kFloat16);
    const Forward best =
        rounds ? forward(call.problem.geometry, operands,
                         [&](double sum, double bias) { return stored(type, sum, bias); })
               : want;
    check_values(type, got.output, best.output, what + ": output");
    check_codes(got.code, best.code, what + ": code");
    return;
  }
  Gradients got;
  run_backward(call, operands, want.code, &got, what);
  const Gradients& grads = stored && dense ? *dense : all;
  if (call.kernel->pass == Pass::kGradWeight) {
    std::vector<double> weight = grads.weight;
    for (size_t i = 0; call.kernel->dense && dense && i < weight.size(); ++i) {
      if (std::isnan(got.weight[i]) && std::isnan(dense->weight[i])) weight[i] = kNan;
    }
    check_values(type, got.weight, weight, what + ": grad_weight");
    check_values(type, got.bias, grads.bias, what + ": grad_bias");
  } else {
    check_values(type, got.input, grads.input, what + ": grad_input");
  }
}

}  // namespace selftest
