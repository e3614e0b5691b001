#include "fuzz.h"

#include <algorithm>
#include <cstdio>
#include <stdexcept>
#include <string>

#include "check.h"
#include "checked_calls.h"
#include "operands.h"
#include "reference.h"

namespace selftest {
namespace {

using fusedcnn::DataType;
using fusedcnn::Geometry;
using fusedcnn::Problem;

// Multiply-adds of the reference: milliseconds.
constexpr double kMostWork = 2e6;

// The operators' arguments, as unpack takes them.
struct Arguments {
  int64_t input[4], weight[4], packed[fusedcnn::kPackedGeometrySize];
};

// One of the listed values.
int64_t one_of(Random& random, std::initializer_list<int64_t> values) {
  return values.begin()[random.integer(0, static_cast<int64_t>(values.size()) - 1)];
}

int64_t draw_channels(Random& random) {
  return random.integer(0, 1) ? random.integer(1, 9)
                              : one_of(random, {15, 16, 17, 24, 31, 32, 33, 48, 64, 65});
}

int64_t draw_size(Random& random) {
  return random.integer(0, 3) ? random.integer(1, 20) : random.integer(21, 70);
}

// The shapes that have kernels of their own: 3x3, stride 1, under a 2x2 pool.
Arguments draw_block(Random& random) {
  const int64_t c = draw_channels(random), oc = draw_channels(random);
  const int64_t ph = random.integer(0, 2), pw = random.integer(0, 2);
  return {{random.integer(0, 3), c, draw_size(random), draw_size(random)},
          {oc, c, 3, 3},
          {1, 1, ph, ph, pw, pw, 1, 1, 1, 2, 2, 2, 2, 0, 0, 1, 1, random.integer(0, 1)}};
}

Arguments draw_general(Random& random) {
  const int64_t groups = one_of(random, {1, 1, 1, 2, 3, 5});
  const int64_t c = draw_channels(random), oc = draw_channels(random);
  Arguments a{{random.integer(0, 3), groups * c, draw_size(random), draw_size(random)},
              {groups * oc, c, random.integer(1, 5), random.integer(1, 5)},
              {}};
  int64_t* const p = a.packed;
  p[8] = groups;
  p[17] = random.integer(0, 1);
  for (int i = 0; i < 2; ++i) {
    if (random.integer(0, 9) == 0) a.weight[2 + i] = one_of(random, {7, 8, 11});
    p[i] = one_of(random, {1, 1, 1, 2, 3, 4, 7});
    p[2 + 2 * i] = one_of(random, {0, 0, 1, 1, 2, 3, 9});
    p[3 + 2 * i] = random.integer(0, 4) ? p[2 + 2 * i] : random.integer(0, 3);
    p[6 + i] = one_of(random, {1, 1, 1, 2, 3, 5});
    p[9 + i] = one_of(random, {1, 2, 2, 2, 3, 3, 4, 5, 17});
    p[11 + i] = random.integer(0, 1) ? p[9 + i] : one_of(random, {1, 1, 2, 3, 4, 9});
    p[13 + i] = random.integer(0, 1) ? 0 : random.integer(0, p[9 + i] / 2);
    p[15 + i] = one_of(random, {1, 1, 1, 1, 2, 3, 6});
  }
  return a;
}

// Pools as large as the map, or larger where padding makes room.
Arguments draw_large_pool(Random& random) {
  Arguments a = draw_general(random);
  for (int i = 0; i < 2; ++i) {
    a.packed[i] = one_of(random, {1, 1, 2});
    a.packed[6 + i] = a.packed[15 + i] = 1;
    const int64_t conv =
        (a.input[2 + i] + a.packed[2 + 2 * i] + a.packed[3 + 2 * i] - a.weight[2 + i]) /
            a.packed[i] +
        1;
    const int64_t pool =
        random.integer(std::max<int64_t>(1, conv / 2), std::max<int64_t>(1, 2 * conv));
    a.packed[9 + i] = pool;
    a.packed[11 + i] = one_of(random, {1, pool, pool, pool / 2 + 1});
    a.packed[13 + i] = pool > conv || random.integer(0, 2) == 0 ? pool / 2 : 0;
  }
  return a;
}

Arguments draw_arguments(Random& random) {
  const int64_t kind = random.integer(0, 9);
  return kind < 4 ? draw_block(random) : kind < 8 ? draw_general(random) : draw_large_pool(random);
}

// Whether this geometry is right, and not too much work for the reference.
bool usable(const Arguments& a, Geometry* g) {
  try {
    *g = fusedcnn::unpack(a.input, a.weight, a.packed);
  } catch (const std::runtime_error&) {
    return false;
  }
  const double work = double(g->batch) * g->out_channels * g->in_channels_per_group() * g->taps() *
                      g->h.conv * g->w.conv;
  return work <= kMostWork &&
         double(g->batch) * g->out_channels * g->outputs() * g->window() <= kMostWork;
}

std::string text(const Arguments& a) {
  std::string result = "input [";
  for (const int64_t size : a.input) result += std::to_string(size) + ",";
  result += "] weight [";
  for (const int64_t size : a.weight) result += std::to_string(size) + ",";
  result += "] geometry [";
  for (const int64_t field : a.packed) result += std::to_string(field) + ",";
  return result + "]";
}

// Small integers, in which a rare one may be another value. Without zeros in the weight, a value
// that is not finite has one right effect.
Operands draw_data(Random& random, const Geometry& g, double rare, int one_in) {
  return draw_operands(
      g,
      [&] {
        if (one_in && random.integer(1, one_in) == 1) return rare;
        return static_cast<double>(random.integer(-2, 2));
      },
      [&] {
        return one_in ? random.integer(0, 1) * 2. - 1 : static_cast<double>(random.integer(-2, 2));
      });
}

}  // namespace

void fuzz(const Backend& backend, uint64_t seed, int64_t count) {
  Random random(seed);
  int64_t calls = 0;
  for (int64_t i = 0; i < count;) {
    const Arguments arguments = draw_arguments(random);
    Geometry g;
    if (!usable(arguments, &g)) continue;
    ++i;
    // Finite values in the first cases: 1000 stands out of its neighbours, and sums stay exact.
    const double rares[] = {0, 0, 0, 1000, -1000, -0.0, kNan, kInfinity, -kInfinity};
    const int64_t pick = random.integer(0, 8);
    const int one_in = pick < 3 ? 0 : static_cast<int>(random.integer(2, 60));
    Operands operands = draw_data(random, g, rares[pick], one_in);
    operands.grad_output = draw(static_cast<int64_t>(operands.grad_output.size()),
                                [&] { return static_cast<double>(random.integer(-2, 2)); });
    if (random.integer(0, 3) == 0) operands.bias.clear();
    const Forward want = forward(g, operands);
    const Gradients grads = backward(g, operands, want.code);
    const Gradients dense =
        convolution_backward(g, operands, convolution_gradient(g, operands, want.code));
    const std::string where =
        text(arguments) + ", seed " + std::to_string(seed) + ", geometry " + std::to_string(i);
    const DataType type = kTypes[random.integer(0, 3)];
    for_covering_kernels(backend, g, [&](const Problem& problem, int k) {
      if (problem.type != type) return;
      const auto layout =
          static_cast<Layout>(random.integer(0, static_cast<int64_t>(Layout::kCount) - 1));
      const int way =
          static_cast<int>(random.integer(0, static_cast<int64_t>(backend.ways.size()) - 1));
      const Call call{&backend.kernels[k], problem, layout, way};
      const std::string what = describe(backend, call, where);
      check_call(call, operands, want, grads, what, &dense);
      ++calls;
      if (pick > 5) return;  // NaN and infinity raise what tells of stale memory
      const std::string misuse = backend.misuse ? backend.misuse() : "";
      check(misuse.empty(), what + ": " + misuse);
    });
  }
  std::printf("  %-8s fuzz: %lld geometries, %lld calls, seed %llu\n", backend.name.c_str(),
              static_cast<long long>(count), static_cast<long long>(calls),
              static_cast<unsigned long long>(seed));
}

}  // namespace selftest
