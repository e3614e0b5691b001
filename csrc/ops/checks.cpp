#include "ops/checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace fusedcnn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::runtime_error, which torch turns into RuntimeError: the class that its own layers
// raise for all of these. (STD_TORCH_CHECK would put a source path in front of the message.)
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << ']';
  return text.str();
}

const char* type_text(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::UInt32: return "uint32";
    case ScalarType::UInt64: return "uint64";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return "another type";
  }
}

// None passes for a Tensor in a schema, and arrives here as an undefined one.
void check_defined(const char* argument, const Tensor& tensor) {
  if (!tensor.defined()) fail(argument, ": expected a Tensor, got None");
}

struct Device {
  int32_t type, index;
};

Device device_of(const Tensor& tensor) {
  Device device{};
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device.type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
  return device;
}

std::string device_text(const Tensor& tensor) {
  const Device device = device_of(tensor);
  if (device.type == aoti_torch_device_type_cpu()) return "the CPU";
  return (device.type == aoti_torch_device_type_cuda() ? "CUDA device " : "another device, ") +
         std::to_string(device.index);
}

// a * b, or an error that names the tensor whose size does not fit.
int64_t checked_product(int64_t a, int64_t b, const char* what) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product)) fail(what, ": its size overflows 64 bits");
  return product;
}

int64_t checked_sum(int64_t a, int64_t b, const char* what) {
  int64_t sum;
  if (__builtin_add_overflow(a, b, &sum)) fail(what, ": its size overflows 64 bits");
  return sum;
}

// Sizes of the convolution's and the pool's output along one axis; `letter` is 'H' or 'W'.
void complete_axis(Axis& axis, bool ceil_mode, char letter) {
  if (axis.in < 1) fail("input: expected ", letter, " >= 1, got ", axis.in);
  if (axis.kernel < 1) fail("weight: expected kernel sizes >= 1, got ", axis.kernel);
  const auto positive = [](const char* argument, int64_t value) {
    if (value < 1) fail(argument, ": expected values >= 1, got ", value);
  };
  const auto not_negative = [](const char* argument, int64_t value) {
    if (value < 0) fail(argument, ": expected values >= 0, got ", value);
  };
  positive("stride", axis.stride);
  positive("dilation", axis.dilation);
  not_negative("padding", axis.padding);
  not_negative("padding", axis.padding_after);
  positive("pool_kernel_size", axis.pool_kernel);
  positive("pool_stride", axis.pool_stride);
  positive("pool_dilation", axis.pool_dilation);
  not_negative("pool_padding", axis.pool_padding);

  const int64_t padded =
      checked_sum(axis.in, checked_sum(axis.padding, axis.padding_after, "padding"), "padding");
  const int64_t extent =
      checked_sum(checked_product(axis.dilation, axis.kernel - 1, "dilation"), 1, "dilation");
  if (extent > padded) {
    fail("weight: expected a kernel no larger than the padded input, got ", extent,
         axis.dilation > 1 ? " (dilated)" : "", " over ", padded, " along ", letter);
  }
  axis.conv = (padded - extent) / axis.stride + 1;

  const int64_t window =
      checked_sum(checked_product(axis.pool_dilation, axis.pool_kernel - 1, "pool_dilation"), 1,
                  "pool_dilation");
  // Of the window's elements, not of their extent, as in torch.
  if (axis.pool_padding > axis.pool_kernel / 2) {
    fail("pool_padding: expected at most half of pool_kernel_size (", axis.pool_kernel / 2,
         "), got ", axis.pool_padding);
  }
  const int64_t pool_padded = axis.conv + 2 * axis.pool_padding;  // both at most 2^62
  int64_t room = pool_padded - window;
  if (ceil_mode) room = checked_sum(room, axis.pool_stride - 1, "pool_stride");
  // Round towards minus infinity: a window larger than the input has no output at all.
  axis.out = (room >= 0 ? room / axis.pool_stride : -1) + 1;
  // A window may not start in the padding after the input.
  if (ceil_mode && (axis.out - 1) * axis.pool_stride >= axis.conv + axis.pool_padding) --axis.out;
  if (axis.out < 1) {
    fail("pool_kernel_size: expected a window no larger than the padded convolution output, got ",
         window, " over ", pool_padded, " along ", letter);
  }
  checked_product(axis.out, axis.step(), "pool_stride");
}

}  // namespace

Geometry check_geometry(const Tensor& input, const Tensor& weight,
                        const std::vector<int64_t>& packed) {
  if (packed.size() != kPackedGeometrySize) {
    fail("geometry: expected ", kPackedGeometrySize, " integers, got ", packed.size());
  }
  const int64_t rank = input.dim();
  if (rank != 3 && rank != 4) {
    fail("input: expected [N, C, H, W] or [C, H, W], got ", shape_text(input));
  }
  if (weight.dim() != 4) {
    fail("weight: expected [out_channels, in_channels / groups, KH, KW], got ", shape_text(weight));
  }
  const int64_t* p = packed.data();
  Geometry g{};
  g.batch = rank == 4 ? input.size(0) : 1;
  g.in_channels = input.size(rank - 3);
  g.out_channels = weight.size(0);
  g.groups = p[8];
  g.ceil_mode = p[17] != 0;
  g.h = Axis{input.size(rank - 2),
             weight.size(2),
             p[0],
             p[2],
             p[3],
             p[6],
             p[9],
             p[11],
             p[13],
             p[15],
             0,
             0};
  g.w = Axis{input.size(rank - 1),
             weight.size(3),
             p[1],
             p[4],
             p[5],
             p[7],
             p[10],
             p[12],
             p[14],
             p[16],
             0,
             0};
  if (g.groups < 1) fail("groups: expected a value >= 1, got ", g.groups);
  if (g.out_channels < 1) fail("weight: expected out_channels >= 1, got ", shape_text(weight));
  if (g.in_channels < 1) fail("input: expected C >= 1, got ", shape_text(input));
  if (g.out_channels % g.groups != 0) {
    fail("groups: expected a divisor of out_channels (", g.out_channels, "), got ", g.groups);
  }
  if (g.in_channels % g.groups != 0) {
    fail("groups: expected a divisor of the input's channels (", g.in_channels, "), got ",
         g.groups);
  }
  if (weight.size(1) != g.in_channels / g.groups) {
    fail("weight: expected ", g.in_channels / g.groups, " input channels per group for input ",
         shape_text(input), " and groups ", g.groups, ", got ", shape_text(weight));
  }
  complete_axis(g.h, g.ceil_mode, 'H');
  complete_axis(g.w, g.ceil_mode, 'W');
  // Bytes of the largest tensor in play, at 8 a value.
  int64_t bytes = checked_product(g.h.out, g.w.out, "output");
  bytes = checked_product(bytes, g.out_channels, "output");
  bytes = checked_product(bytes, g.batch > 0 ? g.batch : 1, "output");
  checked_product(bytes, 8, "output");
  return g;
}

DataType check_type(const Tensor& input) {
  check_defined("input", input);
  switch (input.scalar_type()) {
    case ScalarType::Float: return DataType::kFloat32;
    case ScalarType::Double: return DataType::kFloat64;
    case ScalarType::BFloat16: return DataType::kBFloat16;
    case ScalarType::Half: return DataType::kFloat16;
    default:
      fail("input: expected float32, float64, bfloat16 or float16, got ",
           type_text(input.scalar_type()));
  }
}

bool same_device(const Tensor& a, const Tensor& b) {
  const Device first = device_of(a), second = device_of(b);
  return first.type == second.type && first.index == second.index;
}

void check_like_input(const char* argument, const Tensor& tensor, const Tensor& input) {
  check_defined(argument, tensor);
  if (!same_device(tensor, input)) {
    fail(argument, ": expected a tensor on ", device_text(input), " like input, got one on ",
         device_text(tensor));
  }
  if (tensor.scalar_type() != input.scalar_type()) {
    fail(argument, ": expected ", type_text(input.scalar_type()), " like input, got ",
         type_text(tensor.scalar_type()));
  }
}

void check_shape(const char* argument, const Tensor& tensor, const std::vector<int64_t>& expected) {
  check_defined(argument, tensor);
  const auto sizes = tensor.sizes();
  if (std::vector<int64_t>(sizes.begin(), sizes.end()) == expected) return;
  std::ostringstream text;
  for (size_t d = 0; d < expected.size(); ++d) text << (d ? ", " : "") << expected[d];
  fail(argument, ": expected [", text.str(), "], got ", shape_text(tensor));
}

Strides strides_of(const Tensor& tensor) {
  const auto s = tensor.strides();
  return s.size() == 4 ? Strides{s[0], s[1], s[2], s[3]} : Strides{0, s[0], s[1], s[2]};
}

bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4) return false;
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  if (strides[1] == 0) return false;
  int64_t least = 0;  // smallest stride that the next outer dimension may have
  for (const int d : {1, 3, 2, 0}) {
    if (sizes[d] == 0 || strides[d] < least) return false;
    // [N, 1, H, W] and [N, C, 1, 1] fit both formats; torch reads them as contiguous.
    if (d == 0 && least == strides[1]) return false;
    least = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
  }
  return true;
}

Tensor empty_image(const Tensor& like, bool batched, int64_t n, int64_t c, int64_t h, int64_t w,
                   ScalarType type, bool channels_last) {
  const int64_t sizes[] = {n, c, h, w};
  const int64_t contiguous[] = {c * h * w, h * w, w, 1};
  const int64_t last[] = {c * h * w, 1, w * c, c};
  const int skip = batched ? 0 : 1;
  const Device device = device_of(like);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      4 - skip, sizes + skip, (channels_last ? last : contiguous) + skip,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device.type,
      device.index, &handle));
  return Tensor(handle);
}

Tensor empty_vector(const Tensor& like, int64_t size, ScalarType type) {
  const int64_t stride = 1;
  const Device device = device_of(like);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      1, &size, &stride, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      device.type, device.index, &handle));
  return Tensor(handle);
}

}  // namespace fusedcnn
