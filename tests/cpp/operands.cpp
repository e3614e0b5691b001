#include "operands.h"

namespace selftest {

using fusedcnn::Geometry;

std::vector<double> draw(int64_t count, const std::function<double()>& one) {
  std::vector<double> values(count);
  for (double& value : values) value = one();
  return values;
}

Operands draw_operands(const Geometry& g, const std::function<double()>& input,
                       const std::function<double()>& weight) {
  return {draw(g.batch * g.in_channels * g.h.in * g.w.in, input),
          draw(g.out_channels * g.in_channels_per_group() * g.taps(), weight),
          draw(g.out_channels, weight), draw(g.batch * g.out_channels * g.outputs(), input)};
}

Operands integer_operands(const Geometry& g) {
  Random random(g.out_channels * 1000 + g.w.in);
  return draw_operands(
      g, [&] { return random.integer(-2, 2); }, [&] { return random.integer(-2, 2); });
}

}  // namespace selftest
