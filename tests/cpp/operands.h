// Operands drawn at random, the same in every run.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "core/geometry.h"
#include "reference.h"

namespace selftest {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// The same numbers in every run (splitmix64).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  // Uniform over low..high.
  int64_t integer(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
  }
  // Uniform over (-1, 1), of many bits.
  double real() { return static_cast<double>(next() >> 11) * 0x1p-52 - 1; }

 private:
  uint64_t next() {
    state_ += 0x9e3779b97f4a7c15;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  uint64_t state_;
};

std::vector<double> draw(int64_t count, const std::function<double()>& one);

// The bias is drawn like the weight, grad_output like the input.
Operands draw_operands(const fusedcnn::Geometry& g, const std::function<double()>& input,
                       const std::function<double()>& weight);

// Small integers: every product and every partial sum is exact in float, whatever the order, so a
// result is the exact one, rounded once to the element type. They also tie all the time.
Operands integer_operands(const fusedcnn::Geometry& g);

}  // namespace selftest
