// What kernels know of a geometry on the device: 32-bit coordinates, 64-bit offsets.
#pragma once

#include <initializer_list>

#include "cuda/device.h"
#include "cuda/kernel.h"

namespace fusedcnn::cuda {

// See Axis in core/geometry.h.
struct AxisSizes {
  int in, kernel, stride, padding, dilation;
  int pool_kernel, pool_stride, pool_padding, pool_dilation;
  int conv, out;
};

inline AxisSizes sizes_of(const Axis& axis) {
  const auto i = [](int64_t value) { return static_cast<int>(value); };
  return {i(axis.in),          i(axis.kernel),       i(axis.stride),
          i(axis.padding),     i(axis.dilation),     i(axis.pool_kernel),
          i(axis.pool_stride), i(axis.pool_padding), i(axis.pool_dilation),
          i(axis.conv),        i(axis.out)};
}

// Whether 0 <= i < size.
FUSEDCNN_DEVICE bool inside(int i, int size) {
  return static_cast<unsigned>(i) < static_cast<unsigned>(size);
}

// Winners as the kernels handle them: -1 for "off", whatever the width of the stored code.
FUSEDCNN_DEVICE int load_code(const uint8_t* from) {
  const int code = load_constant(from);
  return code == kOff<uint8_t> ? -1 : code;
}
FUSEDCNN_DEVICE int load_code(const int32_t* from) { return load_constant(from); }

// N neighbouring elements of shared memory, `from` aligned to 16 bytes or, for fewer, to all N.
template <int N, typename T>
FUSEDCNN_DEVICE void load_row(Shared<T> from, T (&to)[N]) {
  constexpr int kPack = N * sizeof(T) < 16 ? N : static_cast<int>(16 / sizeof(T));
  static_assert(N % kPack == 0);
  FUSEDCNN_UNROLL
  for (int i = 0; i < N; i += kPack) {
    const Pack<kPack, T> pack = load_pack<kPack, T>(from + i);
    FUSEDCNN_UNROLL
    for (int j = 0; j < kPack; ++j) to[i + j] = pack.values[j];
  }
}

// Whether vector accesses of `bytes` bytes may be made at `pointer` and every multiple of `strides`
// (of elements of `element` bytes) from it.
inline bool aligned(const void* pointer, int64_t element, int64_t bytes,
                    std::initializer_list<int64_t> strides) {
  if (reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes)) return false;
  for (const int64_t stride : strides) {
    if (stride * element % bytes) return false;
  }
  return true;
}

// Calls body(S{}) with the storage type of `type`.
template <typename Body>
void for_storage(DataType type, const Body& body) {
  switch (type) {
    case DataType::kFloat32: return body(float{});
    case DataType::kFloat64: return body(double{});
    case DataType::kBFloat16: return body(BFloat16{});
    case DataType::kFloat16: return body(Float16{});
  }
}

}  // namespace fusedcnn::cuda
