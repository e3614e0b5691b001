#include "storage.h"

#include <cmath>
#include <cstring>
#include <limits>

namespace selftest {

using fusedcnn::DataType;

double decode(Format format, uint16_t bits) {
  const int mantissa_bits = format.precision - 1;
  const int exponent_mask = (1 << (15 - mantissa_bits)) - 1;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const int exponent = (bits >> mantissa_bits) & exponent_mask;
  double magnitude;
  if (exponent == exponent_mask) {
    magnitude = mantissa ? std::numeric_limits<double>::quiet_NaN()
                         : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    magnitude = std::ldexp(mantissa, format.min_exponent - mantissa_bits);
  } else {
    magnitude = std::ldexp(mantissa + (1 << mantissa_bits),
                           exponent - 1 + format.min_exponent - mantissa_bits);
  }
  return bits & 0x8000 ? -magnitude : magnitude;
}

uint16_t encode(Format format, double value) {
  const int mantissa_bits = format.precision - 1;
  const int exponent_mask = (1 << (15 - mantissa_bits)) - 1;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const auto infinity = static_cast<uint16_t>(exponent_mask << mantissa_bits);
  if (std::isnan(value)) {
    return static_cast<uint16_t>(sign | infinity | (1 << (mantissa_bits - 1)));
  }
  if (std::isinf(value)) return sign | infinity;
  // The spacing of the format's numbers around `value`, then the nearest multiple of it.
  const int exponent =
      value == 0 ? format.min_exponent : std::max(std::ilogb(value), format.min_exponent);
  const int spacing = exponent - mantissa_bits;
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(std::fabs(value), -spacing)));
  // Patterns count steps: the smallest normal number is 2^mantissa_bits of them, and every binade
  // has as many again, so a carry into the next one needs no care.
  const uint32_t binades = static_cast<uint32_t>(exponent - format.min_exponent);
  const uint32_t pattern = (binades << mantissa_bits) + steps;
  return static_cast<uint16_t>(sign | (pattern > infinity ? infinity : pattern));
}

double read(DataType type, const void* data, int64_t index) {
  const char* at = static_cast<const char*>(data) + index * element_size(type);
  const auto as = [at]<typename T>(T value) {
    std::memcpy(&value, at, sizeof value);
    return value;
  };
  switch (type) {
    case DataType::kFloat32: return as(float{});
    case DataType::kFloat64: return as(double{});
    case DataType::kBFloat16: return decode(kBFloat16Format, as(uint16_t{}));
    case DataType::kFloat16: return decode(kFloat16Format, as(uint16_t{}));
  }
  return 0;
}

void write(DataType type, void* data, int64_t index, double value) {
  char* at = static_cast<char*>(data) + index * element_size(type);
  const auto put = [at](auto stored) { std::memcpy(at, &stored, sizeof stored); };
  switch (type) {
    case DataType::kFloat32: return put(static_cast<float>(value));
    case DataType::kFloat64: return put(value);
    case DataType::kBFloat16: return put(encode(kBFloat16Format, value));
    case DataType::kFloat16: return put(encode(kFloat16Format, value));
  }
}

uint64_t signalling_nan(DataType type) {
  switch (type) {
    case DataType::kFloat64: return 0x7ff400017fa00001;
    // As a float, too, a signalling NaN and two halves that are none: kernels widen before they
    // compute.
    case DataType::kBFloat16: return 0x7fa17fa17fa17fa1;
    case DataType::kFloat16: return 0x7fa17d017fa17d01;
    default: return 0x7fa000017fa00001;
  }
}

void fill_memory(void* data, int64_t bytes, uint64_t pattern) {
  auto* to = static_cast<unsigned char*>(data);
  for (int64_t b = 0; b < bytes; ++b) to[b] = static_cast<unsigned char>(pattern >> (b % 8 * 8));
}

double rounded(DataType type, double value) {
  double stored[1];
  write(type, stored, 0, value);
  return read(type, stored, 0);
}

}  // namespace selftest
