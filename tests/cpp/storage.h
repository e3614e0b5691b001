// The four element types as doubles, stated independently of the kernels' own conversions.
#pragma once

#include <cstdint>
#include <string>

#include "core/geometry.h"

namespace selftest {

// A binary floating-point format: `precision` bits of significand, the implied one included, and
// the exponents of its smallest and largest normal numbers.
struct Format {
  int precision;
  int min_exponent;
  int max_exponent;
};
inline constexpr Format kFloat16Format{11, -14, 15};
inline constexpr Format kBFloat16Format{8, -126, 127};

// The value of a 16-bit pattern, from the definition of the format.
double decode(Format format, uint16_t bits);

// The 16-bit pattern nearest to `value`, ties to even, infinity past the largest; any NaN gives one
// quiet NaN.
uint16_t encode(Format format, double value);

double read(fusedcnn::DataType type, const void* data, int64_t index);
// Rounds to nearest, ties to even.
void write(fusedcnn::DataType type, void* data, int64_t index, double value);

// Eight bytes that are a signalling NaN wherever a kernel for `type` may take them for one of its
// numbers: in the type itself, and in the type that it computes in. Taken for a place in a list,
// they lead far outside of any tensor.
uint64_t signalling_nan(fusedcnn::DataType type);
// The low byte first, whatever the machine's order, over and over.
void fill_memory(void* data, int64_t bytes, uint64_t pattern);

// `value` as `type` would hold it.
double rounded(fusedcnn::DataType type, double value);

}  // namespace selftest
