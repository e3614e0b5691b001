#include "tensor.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <new>

#include "storage.h"

namespace selftest {
namespace {

using Memory = std::unique_ptr<unsigned char[], std::function<void(unsigned char*)>>;

#if defined(__SANITIZE_ADDRESS__)
Memory guarded(int64_t size) {
  return {new unsigned char[size], [](unsigned char* data) { delete[] data; }};
}
#else
// `size` bytes that end at, or every fourth time begin behind, a page that nobody may touch.
Memory guarded(int64_t size) {
  static int turn = 0;
  const bool at_begin = ++turn % 4 == 0;
  const int64_t page = sysconf(_SC_PAGESIZE);
  const int64_t room = (size + page - 1) / page * page;
  const auto whole = static_cast<size_t>(room + 2 * page);
  void* const mapped = mmap(nullptr, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  unsigned char* const first = static_cast<unsigned char*>(mapped) + page;
  if (room > 0 && mprotect(first, static_cast<size_t>(room), PROT_READ | PROT_WRITE) != 0) {
    throw std::bad_alloc();
  }
  return {at_begin ? first : first + room - size,
          [mapped, whole](unsigned char*) { munmap(mapped, whole); }};
}
#endif

}  // namespace

using fusedcnn::DataType;
using fusedcnn::Strides;

const char* name(Layout layout) {
  switch (layout) {
    case Layout::kContiguous: return "contiguous";
    case Layout::kChannelsLast: return "channels_last";
    case Layout::kPadded: return "padded";
    default: return "permuted";
  }
}

Strides strides_for(Layout layout, Shape s) {
  switch (layout) {
    case Layout::kContiguous: return {s.c * s.h * s.w, s.h * s.w, s.w, 1};
    case Layout::kChannelsLast: return {s.c * s.h * s.w, 1, s.w * s.c, s.c};
    case Layout::kPadded: {
      const int64_t row = s.w + 3, plane = s.h * row + 1;
      return {s.c * plane + 5, plane, row, 1};
    }
    default: {
      const int64_t c = 2 * s.h + 1, w = s.c * c + 1;
      return {s.w * w + 3, c, 2, w};
    }
  }
}

Tensor::Tensor(Shape s, Strides strides, int64_t element_bytes, uint64_t fill)
    : strides_(strides), element_bytes_(element_bytes), fill_(fill) {
  int64_t elements = 0;
  places_.reserve(s.elements());
  for (int64_t n = 0; n < s.n; ++n) {
    for (int64_t c = 0; c < s.c; ++c) {
      for (int64_t h = 0; h < s.h; ++h) {
        for (int64_t w = 0; w < s.w; ++w) {
          places_.push_back(n * strides.n + c * strides.c + h * strides.h + w * strides.w);
          if (places_.back() >= elements) elements = places_.back() + 1;
        }
      }
    }
  }
  size_ = elements * element_bytes;
  bytes_ = guarded(size_);
  fill_memory(bytes_.get(), size_, fill);
}

bool Tensor::gaps_intact() const {
  std::vector<bool> owned(size_);
  for (const int64_t place : places_) {
    for (int64_t b = 0; b < element_bytes_; ++b) owned[place * element_bytes_ + b] = true;
  }
  for (int64_t b = 0; b < size_; ++b) {
    const auto began = static_cast<unsigned char>(fill_ >> (b % 8 * 8));
    if (!owned[b] && bytes_[b] != began) return false;
  }
  return true;
}

Tensor tensor_of(DataType type, Shape shape, Strides strides, const std::vector<double>& values) {
  Tensor tensor(shape, strides, element_size(type), signalling_nan(type));
  for (size_t i = 0; i < values.size(); ++i) {
    write(type, tensor.data(), tensor.places()[i], values[i]);
  }
  return tensor;
}

Tensor codes_of(bool wide, Shape shape, Strides strides, const std::vector<int32_t>& codes) {
  Tensor tensor(shape, strides, wide ? 4 : 1);
  for (size_t i = 0; i < codes.size(); ++i) {
    char* at = static_cast<char*>(tensor.data()) + tensor.places()[i] * (wide ? 4 : 1);
    if (wide) {
      std::memcpy(at, &codes[i], 4);
    } else {
      *at = static_cast<char>(codes[i]);
    }
  }
  return tensor;
}

std::vector<double> values_of(DataType type, const Tensor& tensor) {
  std::vector<double> values;
  values.reserve(tensor.places().size());
  for (const int64_t place : tensor.places()) values.push_back(read(type, tensor.data(), place));
  return values;
}

std::vector<int32_t> code_values_of(bool wide, const Tensor& tensor) {
  std::vector<int32_t> codes;
  codes.reserve(tensor.places().size());
  for (const int64_t place : tensor.places()) {
    const char* at = static_cast<const char*>(tensor.data()) + place * (wide ? 4 : 1);
    int32_t code;
    if (wide) {
      std::memcpy(&code, at, 4);
    } else {
      code = static_cast<unsigned char>(*at);
      if (code == 0xff) code = -1;
    }
    codes.push_back(code);
  }
  return codes;
}

}  // namespace selftest
