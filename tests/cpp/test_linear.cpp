#include "test_linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/linear.h"
#include "tensor.h"

namespace selftest {
namespace {

using fusedcnn::DataType;
using fusedcnn::cpu::LinearArgs;
using fusedcnn::cpu::LinearBackwardArgs;
using fusedcnn::cpu::LinearShape;
using fusedcnn::cpu::ThreadPool;
using Values = std::vector<double>;

constexpr ThreadPool kForwards = {[](int64_t tasks, void (*body)(int64_t, int64_t, void*),
                                     void* context) { body(0, tasks, context); }};
constexpr ThreadPool kBackwards = {
    [](int64_t tasks, void (*body)(int64_t, int64_t, void*), void* context) {
      for (int64_t task = tasks - 1; task >= 0; --task) body(task, task + 1, context);
    }};

Tensor matrix(DataType type, int64_t rows, int64_t cols, const Values& values) {
  const Shape shape{1, 1, rows, cols};
  return tensor_of(type, shape, strides_for(Layout::kContiguous, shape), values);
}

struct Problem {
  LinearShape shape;
  Values input, weight, bias, kept, grad;
  bool relu, drop;
  static constexpr double keep = 0.5;

  // Small integers: every sum of a few hundred products is exact in float32.
  Problem(LinearShape s, bool relu, bool drop, unsigned seed) : shape(s), relu(relu), drop(drop) {
    std::mt19937 random(seed);
    const auto draw = [&](int64_t count, int low, int high) {
      Values values(static_cast<size_t>(count));
      for (double& value : values) {
        value = low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1));
      }
      return values;
    };
    input = draw(s.rows * s.in, -8, 8);
    weight = draw(s.out * s.in, -8, 8);
    bias = draw(s.out, -8, 8);
    kept = draw(s.rows * s.out, 0, 1);
    grad = draw(s.rows * s.out, -8, 8);
  }

  double output(int64_t r, int64_t o) const {
    double sum = bias[o];
    for (int64_t k = 0; k < shape.in; ++k)
      sum += input[r * shape.in + k] * weight[o * shape.in + k];
    return relu && sum < 0 ? 0 : sum;
  }
};

// output, dropped, grad_input, grad_weight, grad_bias; empty where not wanted.
using Results = std::vector<Values>;

Results expected(const Problem& p, int mask) {
  const LinearShape& s = p.shape;
  Results all(5);
  Values arriving(p.grad.size());
  for (int64_t i = 0; i < s.rows * s.out; ++i) {
    const double value = p.output(i / s.out, i % s.out);
    const double noise = p.drop ? p.kept[i] / Problem::keep : 1;
    all[0].push_back(value);
    if (p.drop) all[1].push_back(value * noise);
    arriving[i] = p.relu && value <= 0 ? 0 : p.grad[i] * noise;
  }
  if (mask & 1) all[2].assign(p.input.size(), 0);
  if (mask & 2) all[3].assign(p.weight.size(), 0);
  if (mask & 4) all[4].assign(p.bias.size(), 0);
  for (int64_t r = 0; r < s.rows; ++r) {
    for (int64_t o = 0; o < s.out; ++o) {
      const double g = arriving[r * s.out + o];
      if (mask & 4) all[4][o] += g;
      for (int64_t k = 0; k < s.in; ++k) {
        if (mask & 1) all[2][r * s.in + k] += g * p.weight[o * s.in + k];
        if (mask & 2) all[3][o * s.in + k] += g * p.input[r * s.in + k];
      }
    }
  }
  return all;
}

// Tensors lie against pages that nobody may touch.
Results computed(const fusedcnn::cpu::Isa& isa, const Problem& p, int mask,
                 const ThreadPool& pool) {
  const LinearShape& s = p.shape;
  const Tensor input = matrix(s.type, s.rows, s.in, p.input);
  const Tensor weight = matrix(s.type, s.out, s.in, p.weight);
  const Tensor bias = matrix(s.type, 1, s.out, p.bias);
  const Tensor kept = matrix(s.type, s.rows, s.out, p.kept);
  const Tensor grad = matrix(s.type, s.rows, s.out, p.grad);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  std::vector<Tensor> results;
  for (const auto& [rows, cols] : {std::pair{s.rows, s.out},
                                   {s.rows, s.out},
                                   {s.rows, s.in},
                                   {s.out, s.in},
                                   {int64_t{1}, s.out}}) {
    results.push_back(matrix(s.type, rows, cols, Values(static_cast<size_t>(rows * cols), nan)));
  }
  const auto wanted = [&](int bit, int at) { return mask & bit ? results[at].data() : nullptr; };
  isa.list.linear->forward(
      {s, input.data(), weight.data(), bias.data(), p.relu, p.drop ? kept.data() : nullptr,
       Problem::keep, results[0].data(), p.drop ? results[1].data() : nullptr},
      pool);
  isa.list.linear->backward(
      {s, grad.data(), input.data(), weight.data(), p.relu ? results[0].data() : nullptr,
       p.drop ? kept.data() : nullptr, Problem::keep, wanted(1, 2), wanted(2, 3), wanted(4, 4)},
      pool);
  Results values;
  for (int i = 0; i < 5; ++i) {
    const bool there = i == 0 || (i == 1 ? p.drop : mask >> (i - 2) & 1);
    values.push_back(there ? values_of(s.type, results[i]) : Values());
  }
  return values;
}

// Output of the first `rows` rows, row by row.
Values by_rows(const fusedcnn::cpu::Isa& isa, const Problem& p, int64_t rows) {
  LinearShape s = p.shape;
  const Tensor input = matrix(s.type, s.rows, s.in, p.input);
  const Tensor weight = matrix(s.type, s.out, s.in, p.weight);
  const Tensor bias = matrix(s.type, 1, s.out, p.bias);
  s.rows = rows;
  Tensor output = matrix(s.type, rows, s.out, Values(static_cast<size_t>(rows * s.out)));
  isa.list.linear->by_rows(
      {s, input.data(), weight.data(), bias.data(), p.relu, nullptr, 1, output.data(), nullptr},
      kForwards);
  return values_of(s.type, output);
}

std::string describe(const fusedcnn::cpu::Isa& isa, const Problem& p) {
  const LinearShape& s = p.shape;
  return std::string("linear on ") + isa.name + ", " + std::to_string(s.rows) + " x " +
         std::to_string(s.in) + " -> " + std::to_string(s.out) +
         (s.type == DataType::kFloat64 ? ", float64" : ", float32");
}

}  // namespace

void test_linear(const fusedcnn::cpu::Isa& isa) {
  unsigned seed = 0;
  for (const DataType type : {DataType::kFloat32, DataType::kFloat64}) {
    // Around the rows of a dot's tile, of a panel on each ISA, of a chunk, and of one sum.
    for (const int64_t rows : {0, 1, 2, 5, 7, 12, 16, 23, 24, 33, 64, 130, 300}) {
      for (const int64_t in : {1, 7, 32, 70, 300}) {
        for (const int64_t out : {1, 5, 13, 24}) {
          ++seed;
          const Problem p({type, rows, in, out}, seed % 2 == 0, seed % 3 == 0, seed);
          const int mask = seed % 5 == 0 ? 1 << seed / 5 % 3 : 7;
          const std::string what = describe(isa, p);
          const Results got = computed(isa, p, mask, kForwards);
          check(got == expected(p, mask), what);
          check(got == computed(isa, p, mask, kBackwards), what + ", tasks from the last on");
          check(got[0] == by_rows(isa, p, rows), what + ", by rows");
        }
      }
    }
  }
  // A row's bits do not depend on how many rows there are.
  Problem reals({DataType::kFloat32, 9, 300, 13}, true, false, 1);
  for (double& value : reals.input) value *= 0.3;
  const Values all = by_rows(isa, reals, 9);
  for (const int64_t rows : {1, 2, 3, 5, 8}) {
    const Values some = by_rows(isa, reals, rows);
    check(std::equal(some.begin(), some.end(), all.begin()),
          describe(isa, reals) + ", " + std::to_string(rows) + " of its rows");
  }
  // NaN reaches the outputs and gradients that it belongs to, and no others.
  for (const int64_t rows : {3, 40}) {
    Problem p({DataType::kFloat32, rows, 70, 13}, true, false, 1);
    p.input[70 + 69] = std::numeric_limits<double>::quiet_NaN();
    const Results got = computed(isa, p, 7, kForwards);
    bool right = true;
    for (int64_t i = 0; i < rows * 13; ++i) right &= std::isnan(got[0][i]) == (i / 13 == 1);
    for (const double value : got[2]) right &= std::isfinite(value);
    for (int64_t i = 0; i < 13 * 70; ++i) right &= std::isnan(got[3][i]) == (i % 70 == 69);
    check(right, describe(isa, p) + ", NaN");
  }
}

}  // namespace selftest
