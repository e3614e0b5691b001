#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "conversions_isa.h"
#include "storage.h"
#include "test_select.h"

namespace fusedcnn::cpu {
#define X(isa)                         \
  namespace isa {                      \
  selftest::Conversions conversions(); \
  }
FUSEDCNN_ISA_LIST
#undef X
}  // namespace fusedcnn::cpu

namespace selftest {
namespace {

Conversions conversions_of(const std::string& isa) {
#define X(name) \
  if (isa == #name) return fusedcnn::cpu::name::conversions();
  FUSEDCNN_ISA_LIST
#undef X
  return {};
}

bool same_value(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

std::vector<uint16_t> all_patterns() {
  std::vector<uint16_t> patterns(65536);
  for (int i = 0; i < 65536; ++i) patterns[i] = static_cast<uint16_t>(i);
  return patterns;
}

// Every value of the format; between every two neighbours the midpoint and the floats either side
// of it, where the rounding turns; and the ends of the float range.
std::vector<float> floats_around(Format format) {
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> values;
  for (const uint16_t bits : all_patterns()) {
    const auto value = static_cast<float>(decode(format, bits));
    values.push_back(value);
    if (!std::isfinite(value)) continue;
    double next = decode(format, static_cast<uint16_t>(bits + 1));  // away from zero
    // Past the largest value the next one would be a power of two.
    if (std::isinf(next)) next = std::copysign(std::ldexp(1.0, format.max_exponent + 1), value);
    const double middle = (value + next) / 2;
    if (std::fabs(middle) > std::numeric_limits<float>::max()) continue;
    const auto midpoint = static_cast<float>(middle);
    for (const float one : {std::nextafter(midpoint, 0.0f), midpoint,
                            std::nextafter(midpoint, std::copysign(infinity, midpoint))}) {
      values.push_back(one);
    }
  }
  for (const float one : {std::numeric_limits<float>::max(), std::numeric_limits<float>::min(),
                          std::numeric_limits<float>::denorm_min(), 1e-30f, 65520.0f}) {
    values.push_back(one);
    values.push_back(-one);
  }
  for (const uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu, 0x7f80ffffu}) {
    float nan;  // NaNs whose top mantissa bits are zero or all ones
    std::memcpy(&nan, &bits, sizeof nan);
    values.push_back(nan);
  }
  return values;
}

void test_format(const std::string& what, Format format,
                 void (*widen)(const uint16_t*, float*, int64_t),
                 void (*narrow)(const float*, uint16_t*, int64_t)) {
  const std::vector<uint16_t> patterns = all_patterns();
  std::vector<float> widened(patterns.size());
  widen(patterns.data(), widened.data(), static_cast<int64_t>(patterns.size()));
  int wrong = 0;
  for (size_t i = 0; i < patterns.size(); ++i) {
    wrong += !same_value(widened[i], decode(format, patterns[i]));
  }
  check(wrong == 0, what + " widen: " + std::to_string(wrong) + " of 65536 patterns are wrong");

  const std::vector<float> values = floats_around(format);
  std::vector<uint16_t> narrowed(values.size());
  narrow(values.data(), narrowed.data(), static_cast<int64_t>(values.size()));
  wrong = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const double got = decode(format, narrowed[i]);
    wrong += !same_value(got, decode(format, encode(format, values[i]))) &&
             !(std::isnan(values[i]) && std::isnan(got));
  }
  check(wrong == 0, what + " narrow: " + std::to_string(wrong) + " of " +
                        std::to_string(values.size()) + " values are wrong");
}

#if defined(FUSEDCNN_HAS_FLOAT16)
// The reference itself, against the compiler's half type.
void test_reference() {
  int wrong = 0;
  for (const uint16_t bits : all_patterns()) {
    _Float16 half;
    std::memcpy(&half, &bits, sizeof half);
    wrong += !same_value(decode(kFloat16Format, bits), static_cast<float>(half));
  }
  for (const float value : floats_around(kFloat16Format)) {
    const auto half = static_cast<_Float16>(value);
    wrong += !same_value(decode(kFloat16Format, encode(kFloat16Format, value)),
                         static_cast<float>(half));
  }
  check(wrong == 0,
        "reference float16: " + std::to_string(wrong) + " values differ from the compiler's");
}
#else
void test_reference() {}
#endif

}  // namespace

void test_conversions(const fusedcnn::cpu::Isa& isa) {
  test_reference();
  const Conversions c = conversions_of(isa.name);
  test_format(std::string(isa.name) + " bfloat16", kBFloat16Format, c.widen_bfloat16,
              c.narrow_bfloat16);
  test_format(std::string(isa.name) + " float16", kFloat16Format, c.widen_float16,
              c.narrow_float16);
}

}  // namespace selftest
