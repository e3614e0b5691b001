#include "test_linear.h"

#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cpu_backend.h"
#include "tensor.h"

namespace selftest {
namespace {

using fusedcnn::DataType;
using fusedcnn::Strides;
using fusedcnn::cpu::LinearArgs;
using fusedcnn::cpu::ThreadPool;

using Values = std::vector<double>;

// Rows of `columns` elements with a gap of `gap` between them.
Tensor rows_of(int64_t rows, int64_t columns, int64_t gap, const Values* values) {
  const Shape shape{1, 1, rows, columns};
  const Strides strides{rows * (columns + gap), rows * (columns + gap), columns + gap, 1};
  return values ? tensor_of(DataType::kFloat32, shape, strides, *values)
                : Tensor(shape, strides, sizeof(float));
}

template <typename Draw>
Values drawn(int64_t count, const Draw& draw) {
  Values values(count);
  for (double& value : values) value = draw();
  return values;
}

struct Sizes {
  int64_t rows, in, out;
};

struct Operands {
  Values input, weight, bias;
};

Values run(const fusedcnn::cpu::Isa& isa, Sizes s, const Operands& operands, bool relu, int way,
           const std::string& what) {
  const Tensor input = rows_of(s.rows, s.in, 3, &operands.input);
  const Tensor weight = rows_of(s.out, s.in, 0, &operands.weight);
  const Tensor bias = rows_of(1, s.out, 0, &operands.bias);
  Tensor output = rows_of(s.rows, s.out, 5, nullptr);
  const auto floats = [](const Tensor& t) { return static_cast<const float*>(t.data()); };
  const LinearArgs args{s.rows,        s.in,     s.out,
                        floats(input), s.in + 3, floats(weight),
                        floats(bias),  relu,     static_cast<float*>(output.data()),
                        s.out + 5};
  const std::string misuse = run_watched(
      DataType::kFloat32, way, [&](const ThreadPool& pool) { isa.list.linear(args, pool); });
  check(misuse.empty(), what + ": " + misuse);
  check(output.gaps_intact(), what + ": wrote between elements");
  return values_of(DataType::kFloat32, output);
}

void test_integers(const fusedcnn::cpu::Isa& isa, Sizes s, int way) {
  const std::string what = std::string(isa.name) + " linear " + std::to_string(s.rows) + " x " +
                           std::to_string(s.in) + " -> " + std::to_string(s.out);
  std::mt19937 random(static_cast<unsigned>(s.rows * 1000003 + s.in * 1009 + s.out));
  const auto draw = [&] { return static_cast<int>(random() % 7) - 3; };
  const Operands operands{drawn(s.rows * s.in, draw), drawn(s.out * s.in, draw),
                          drawn(s.out, draw)};
  for (const bool relu : {false, true}) {
    const Values output = run(isa, s, operands, relu, way, what);
    bool exact = true;
    for (int64_t r = 0; r < s.rows; ++r) {
      for (int64_t o = 0; o < s.out; ++o) {
        double sum = operands.bias[o];
        for (int64_t k = 0; k < s.in; ++k) {
          sum += operands.input[r * s.in + k] * operands.weight[o * s.in + k];
        }
        exact = exact && output[r * s.out + o] == (relu && sum < 0 ? 0 : sum);
      }
    }
    check(exact, what + (relu ? ", ReLU" : "") + ": exact on integers");
  }
}

void test_bits(const fusedcnn::cpu::Isa& isa) {
  const std::string what = std::string(isa.name) + " linear";
  const Sizes s{11, 83, 21};
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  const auto draw = [&] { return normal(random); };
  const Operands operands{drawn(s.rows * s.in, draw), drawn(s.out * s.in, draw),
                          drawn(s.out, draw)};
  const Values together = run(isa, s, operands, false, 0, what);
  bool same = true;
  for (int64_t r = 0; r < s.rows; ++r) {
    for (int64_t o = 0; o < s.out; ++o) {
      const auto row = [&](const Values& values, int64_t i) {
        return Values(values.begin() + i * s.in, values.begin() + (i + 1) * s.in);
      };
      const Operands one{row(operands.input, r), row(operands.weight, o), {operands.bias[o]}};
      same = same && run(isa, {1, s.in, 1}, one, false, 0, what)[0] == together[r * s.out + o];
    }
  }
  check(same, what + ": an output's bits are those of the output on its own");
}

}  // namespace

void test_linear(const fusedcnn::cpu::Isa& isa) {
  if (!isa.list.linear) return;
  int way = 0;
  for (const int64_t rows : {0, 1, 2, 3, 4, 5, 9}) {
    for (const int64_t in : {1, 7, 16, 33, 128}) {
      for (const int64_t out : {1, 2, 3, 8, 13, 32}) {
        if (in_share()) test_integers(isa, {rows, in, out}, way++ % 3);
      }
    }
  }
  test_bits(isa);
}

}  // namespace selftest
