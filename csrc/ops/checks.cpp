#include "ops/checks.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

// Of torch 2.13 and later; null elsewhere.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fusedcnn {
namespace {

constexpr int64_t kMostPadded = int64_t{1} << 28;
constexpr int64_t kMostGrowth = 8;

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

void check_on_device_of(const Tensor& input, const char* argument, const Tensor& tensor) {
  check_defined(argument, tensor);
  if (same_device(tensor, input)) return;
  fail(argument, ": expected a tensor on ", device_text(input), " like input, got one on ",
       device_text(tensor));
}

// Dense, on the device of `like`.
Tensor empty_strided(int64_t rank, const int64_t* sizes, const int64_t* strides, ScalarType type,
                     const Tensor& like) {
  const Device device = device_of(like);
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(rank, sizes, strides, dtype, device.type, device.index, &handle) !=
      TORCH_SUCCESS) {
    if (torch_exception_get_what_without_backtrace) {
      throw std::runtime_error(torch_exception_get_what_without_backtrace());
    }
    auto bytes = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
    for (int64_t d = 0; d < rank; ++d) bytes *= sizes[d];
    throw std::runtime_error(out_of_memory_text(bytes));
  }
  return Tensor(handle);
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
  return check_geometry({rank == 4 ? input.size(0) : 1, input.size(rank - 3), input.size(rank - 2),
                         input.size(rank - 1)},
                        weight, packed.data());
}

Geometry check_geometry(const int64_t (&input)[4], const Tensor& weight, const int64_t* packed) {
  if (weight.dim() != 4) {
    fail("weight: expected [out_channels, in_channels / groups, KH, KW], got ", shape_text(weight));
  }
  const Geometry g =
      unpack(input, {weight.size(0), weight.size(1), weight.size(2), weight.size(3)}, packed);
  // Images are laid out with their padding, which takes memory that no tensor of the call has.
  const int64_t pixels = g.h.padded() * g.w.padded();
  if (pixels / kMostGrowth > g.h.in * g.w.in && pixels * g.in_channels_per_group() > kMostPadded) {
    fail("padding: expected a padded image of at most 2^28 elements, or of at most ", kMostGrowth,
         " times the input's, got ", g.h.padded(), " * ", g.w.padded(), " pixels");
  }
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

void check_tensor(const char* argument, const Tensor& tensor, const Tensor& input,
                  std::initializer_list<ScalarType> types) {
  check_on_device_of(input, argument, tensor);
  std::string expected;
  for (const ScalarType type : types) {
    if (tensor.scalar_type() == type) return;
    expected += (expected.empty() ? "" : " or ") + std::string(type_text(type));
  }
  fail(argument, ": expected ", expected, ", got ", type_text(tensor.scalar_type()));
}

void check_like_input(const char* argument, const Tensor& tensor, const Tensor& input) {
  check_on_device_of(input, argument, tensor);
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

void check_storage(const char* argument, const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t held = 0, offset = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &held));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
  __int128 elements = offset + 1;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return;
    elements += static_cast<__int128>(sizes[d] - 1) * strides[d];
  }
  const auto size = static_cast<int64_t>(tensor.element_size());
  if (elements * size <= held) return;
  fail(argument, ": expected a storage that holds all elements of ", shape_text(tensor), ", got ",
       held, " bytes", held == 0 ? ": it was released" : "");
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
  for (const int64_t size : sizes) {
    if (size == 0) return false;  // strides of no elements can be anything
  }
  int64_t least = 0;  // smallest stride that the next outer dimension may have
  for (const int d : {1, 3, 2, 0}) {
    if (strides[d] < least) return false;
    // [N, 1, H, W] and [N, C, 1, 1] fit both formats; torch reads them as contiguous.
    if (d == 0 && least == strides[1]) return false;
    least = strides[d] * (sizes[d] > 1 ? sizes[d] : 1);
  }
  return true;
}

std::string out_of_memory_text(int64_t bytes) {
  return "DefaultCPUAllocator: can't allocate memory: you tried to allocate " +
         std::to_string(bytes) + " bytes.";
}

Tensor empty_image(const Tensor& like, bool batched, int64_t n, int64_t c, int64_t h, int64_t w,
                   ScalarType type, bool channels_last) {
  const int64_t sizes[] = {n, c, h, w};
  const int64_t contiguous[] = {c * h * w, h * w, w, 1};
  const int64_t last[] = {c * h * w, 1, w * c, c};
  const int skip = batched ? 0 : 1;
  return empty_strided(4 - skip, sizes + skip, (channels_last ? last : contiguous) + skip, type,
                       like);
}

Tensor empty_twin(const Tensor& like) {
  return empty_strided(like.dim(), like.sizes().data(), like.strides().data(), like.scalar_type(),
                       like);
}

Tensor empty_matrix(const Tensor& like, int64_t rows, int64_t columns, ScalarType type) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  return empty_strided(2, sizes, strides, type, like);
}

Tensor empty_vector(const Tensor& like, int64_t size, ScalarType type) {
  const int64_t stride = 1;
  return empty_strided(1, &size, &stride, type, like);
}

}  // namespace fusedcnn
