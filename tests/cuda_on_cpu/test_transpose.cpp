#include "test_transpose.h"

#include <cstdint>
#include <cstring>
#include <exception>

#include "check.h"
#include "tensor.h"

namespace selftest {
namespace {

using fusedcnn::cuda::matrices;
using fusedcnn::cuda::TransposeArgs;

constexpr Shape kShapes[] = {
    {1, 1, 1, 1},      // one element
    {2, 1, 3, 5},      // one channel
    {3, 5, 1, 1},      // one pixel
    {2, 2, 1, 2},      // the least that moves in pairs
    {2, 64, 8, 8},     // a tile to the last element, or several
    {2, 66, 4, 33},    // one of pairs, and a rest on either side
    {3, 64, 3, 3},     // a convolution's taps
    {2, 63, 5, 13},    // odd, and not a tile each way
    {1, 130, 1, 129},  // odd pixels alone
    {1, 129, 10, 13},  // odd channels alone
    {2, 3, 30, 29},    // few channels, more pixels than a tile has
    {1, 700, 1, 3},    // the other way round
};
const char* const kKinds[] = {"contiguous", "back to contiguous", "padded", "permuted"};

// Elements in a row behind `shift` others, which nobody may write.
struct Elements {
  Elements(int64_t count, int64_t size, int64_t shift, uint64_t fill)
      : memory({1, 1, 1, shift + count}, {0, 0, 0, 1}, size, fill), ahead(shift * size) {}
  unsigned char* data() { return static_cast<unsigned char*>(memory.data()) + ahead; }

  Tensor memory;
  int64_t ahead;  // bytes
};

// Of an element of 8 bytes or fewer, by its place in the source.
uint64_t value_at(int64_t place) {
  return (static_cast<uint64_t>(place) + 1) * 0x9e3779b97f4a7c15u >> 8;
}

// Where [n, c, h, w] of such a source lies, and the number of elements from the first to the last.
int64_t place_of(const fusedcnn::Strides& s, int64_t n, int64_t c, int64_t h, int64_t w) {
  return n * s.n + c * s.c + h * s.h + w * s.w;
}

bool right(const TransposeBackend& backend, const TransposeArgs& shape, int64_t from_shift,
           int64_t to_shift, int way) {
  constexpr uint64_t kFill = 0xa5a5a5a5a5a5a5a5u;
  TransposeArgs args = shape;
  const int64_t size = args.element_bytes;
  const int64_t span =
      place_of(args.strides, args.images - 1, args.channels - 1, args.rows - 1, args.columns - 1) +
      1;
  const int64_t count = args.images * args.channels * args.rows * args.columns;
  Elements from(span, size, from_shift, ~kFill), to(count, size, to_shift, kFill);
  for (int64_t place = 0; place < span; ++place) {
    const uint64_t value = value_at(place);
    std::memcpy(from.data() + place * size, &value, static_cast<size_t>(size));
  }
  args.from = from.data();
  args.to = to.data();
  backend.run(args, way);
  const unsigned char* at = to.data();
  for (int64_t n = 0; n < args.images; ++n) {
    for (int64_t h = 0; h < args.rows; ++h) {
      for (int64_t w = 0; w < args.columns; ++w) {
        for (int64_t c = 0; c < args.channels; ++c, at += size) {
          const uint64_t value = value_at(place_of(args.strides, n, c, h, w));
          if (std::memcmp(at, &value, static_cast<size_t>(size)) != 0) return false;
        }
      }
    }
  }
  const auto* ahead = static_cast<const unsigned char*>(to.memory.data());
  for (int64_t b = 0; b < to.ahead; ++b) {
    if (ahead[b] != 0xa5) return false;
  }
  return true;
}

}  // namespace

void test_transpose(const TransposeBackend& backend) {
  int call = 0;
  for (const Shape& shape : kShapes) {
    for (const int64_t size : {1, 2, 4, 8}) {
      const TransposeArgs kinds[] = {
          matrices(size, shape.n, shape.c, shape.h * shape.w, nullptr, nullptr),
          matrices(size, shape.n, shape.h * shape.w, shape.c, nullptr, nullptr),
          {size, shape.n, shape.c, shape.h, shape.w, nullptr, strides_for(Layout::kPadded, shape),
           nullptr},
          {size, shape.n, shape.c, shape.h, shape.w, nullptr, strides_for(Layout::kPermuted, shape),
           nullptr},
      };
      for (int kind = 0; kind < 4; ++kind) {
        // Pairs need both sides aligned.
        for (int shifts = 0; shifts < (kind < 2 && size == 2 ? 3 : 1); ++shifts, ++call) {
          if (!in_share()) continue;
          const int way = call % static_cast<int>(backend.ways.size());
          const std::string what = "transpose of " + std::to_string(size) + " bytes, " +
                                   std::to_string(shape.n) + "x" + std::to_string(shape.c) + "x" +
                                   std::to_string(shape.h) + "x" + std::to_string(shape.w) + ", " +
                                   kKinds[kind] + ", shifts " + std::to_string(shifts) + ", " +
                                   backend.ways[static_cast<size_t>(way)];
          try {
            check(right(backend, kinds[kind], shifts == 1, shifts == 2, way), what);
          } catch (const std::exception& error) {
            check(false, what + ": " + error.what());
          }
        }
      }
    }
  }
}

}  // namespace selftest
