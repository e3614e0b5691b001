// The sizes of one conv2d + bias + ReLU + max_pool2d, free of torch and of any backend.
// All sizes and strides count elements, never bytes; `h` stands before `w` everywhere.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedcnn {

enum class DataType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

constexpr int64_t element_size(DataType type) {
  return type == DataType::kFloat64 ? 8 : type == DataType::kFloat32 ? 4 : 2;
}

constexpr const char* name(DataType type) {
  return type == DataType::kFloat32    ? "float32"
         : type == DataType::kFloat64  ? "float64"
         : type == DataType::kBFloat16 ? "bfloat16"
                                       : "float16";
}

// One spatial axis. Along it, pooled output o looks at convolution outputs
//   c = o * pool_stride - pool_padding + p * pool_dilation,   0 <= p < pool_kernel, 0 <= c < conv
// and convolution output c looks at input elements
//   i = c * stride - padding + k * dilation,                  0 <= k < kernel, zero outside [0, in)
struct Axis {
  int64_t in;      // input size
  int64_t kernel;  // taps of the convolution
  int64_t stride;
  int64_t padding;        // zeros before the first element
  int64_t padding_after;  // zeros after the last one; differs from `padding` for padding="same"
  int64_t dilation;
  int64_t pool_kernel;
  int64_t pool_stride;
  int64_t pool_padding;
  int64_t pool_dilation;
  int64_t conv;  // convolution output size
  int64_t out;   // pooled output size

  constexpr int64_t padded() const { return in + padding + padding_after; }
  // Input elements between neighbouring pooled outputs.
  constexpr int64_t step() const { return pool_stride * stride; }
  // First input element (counted from the first real one) of pooled output 0; may be negative.
  constexpr int64_t origin() const { return -pool_padding * stride - padding; }
  // Elements from the first to the last tap of one convolution output, and from the first to the
  // last element of one window.
  constexpr int64_t extent() const { return (kernel - 1) * dilation + 1; }
  constexpr int64_t window() const { return (pool_kernel - 1) * pool_dilation + 1; }
  // Places that all windows together span in the input, the two paddings included: no coordinate
  // along this axis is larger, whatever it counts from.
  constexpr int64_t reach() const {
    return ((out - 1) * pool_stride + window()) * stride + extent();
  }
};

struct Geometry {
  int64_t batch;
  int64_t in_channels;
  int64_t out_channels;
  int64_t groups;
  Axis h;
  Axis w;
  bool ceil_mode;
  // Whether images are tasks enough even of a small batch: the caller keeps other threads busy.
  bool undivided = false;

  constexpr int64_t in_channels_per_group() const { return in_channels / groups; }
  constexpr int64_t out_channels_per_group() const { return out_channels / groups; }
  constexpr int64_t taps() const { return h.kernel * w.kernel; }
  constexpr int64_t window() const { return h.pool_kernel * w.pool_kernel; }
  constexpr int64_t outputs() const { return h.out * w.out; }  // pooled pixels of one channel
  // Whether 32 bits count the elements of one group's padded image and of 16 channels more.
  constexpr bool places_fit_32_bits() const {
    return (in_channels_per_group() + 16) * h.padded() * w.padded() < int64_t{1} << 32;
  }
};

// The operators' `geometry` argument: one flat list, since a packed list costs half of what six
// small ones do at every call. Order: see unpack in geometry.cpp; written by _geometry.py.
constexpr size_t kPackedGeometrySize = 18;

// The geometry of an input [N, C, H, W], a weight [OC, C / groups, KH, KW] and packed arguments,
// checked, with its output sizes. Throws std::runtime_error with a message that names the argument.
//
// Arithmetic on sizes is checked for overflow here and nowhere else: of this geometry, kernels may
// form any of the quantities below, in elements or in bytes, without a check.
//
//   along one axis: padded sizes, extents, step, origin, reach          at most 2^46
//   elements of a group's padded image, of the output                   at most 2^54
//   elements of the weight, of a window, and one times the other        at most 2^54
//
// An argument that no output depends on may hold anything: the stride where there is one output,
// the dilation where there is one tap. It is replaced by a value that fits.
Geometry unpack(const int64_t (&input)[4], const int64_t (&weight)[4], const int64_t* packed);

// Element strides of an [N, C, H, W] tensor; any values, zero included.
struct Strides {
  int64_t n, c, h, w;
};

// The code of a pooled output says which element of its window won, counted row by row
// (p_h * pool_kernel_w + p_w), or that ReLU is off there and no gradient flows. It is all that the
// backward keeps of the convolution's output: one byte, or four for windows of more than 255.
template <typename Code>
inline constexpr Code kOff = static_cast<Code>(-1);
constexpr int64_t kLargestByteWindow = 255;

}  // namespace fusedcnn
