#include "cpu/codes.h"

#include <algorithm>
#include <type_traits>
#include <utility>

namespace fusedcnn::cpu {
namespace {

// 0 for "off", and one more than the element otherwise: one comparison tells whether it is in
// range.
template <typename Code>
auto element_or_off(Code code) {
  using Unsigned = std::make_unsigned_t<Code>;
  return static_cast<Unsigned>(static_cast<Unsigned>(code) + 1u);
}

// The largest of `count` neighbours; compilers make vectors of it.
template <typename Code>
auto largest(const Code* codes, int64_t count) {
  auto most = element_or_off(kOff<Code>);
  for (int64_t i = 0; i < count; ++i) most = std::max(most, element_or_off(codes[i]));
  return most;
}

// Whether window element p of pooled output o lies on the convolution's output.
bool exists(const Axis& axis, int64_t o, int64_t p) {
  const int64_t c = o * axis.pool_stride - axis.pool_padding + p * axis.pool_dilation;
  return c >= 0 && c < axis.conv;
}

// The pooled outputs [first, second) whose windows lie on the convolution's output as a whole.
std::pair<int64_t, int64_t> whole_windows(const Axis& axis) {
  int64_t first = 0, last = axis.out;
  while (first < last && !exists(axis, first, 0)) ++first;
  while (first < last && !exists(axis, last - 1, axis.pool_kernel - 1)) --last;
  return {first, last};
}

template <typename Code>
bool all_fit(const BackwardArgs& args) {
  const Geometry& g = args.geometry;
  const Strides& s = args.code_strides;
  const Code* const codes = static_cast<const Code*>(args.code);
  const int64_t window = g.window();
  const auto [first_h, last_h] = whole_windows(g.h);
  const auto [first_w, last_w] = whole_windows(g.w);

  const int64_t image = g.out_channels * g.outputs();
  const bool planes = s.w == 1 && s.h == g.w.out && s.c == g.outputs();
  const bool pixels = s.c == 1 && s.w == g.out_channels && s.h == g.w.out * g.out_channels;
  const bool dense = (planes || pixels) && (s.n == image || g.batch == 1);
  if (dense && largest(codes, g.batch * image) > window) return false;
  if (dense && first_h == 0 && last_h == g.h.out && first_w == 0 && last_w == g.w.out) return true;

  // One by one: where codes do not lie side by side, and windows that reach over an edge.
  for (int64_t n = 0; n < g.batch; ++n) {
    for (int64_t c = 0; c < g.out_channels; ++c) {
      for (int64_t h = 0; h < g.h.out; ++h) {
        const Code* const row = codes + n * s.n + c * s.c + h * s.h;
        const bool whole_row = dense && h >= first_h && h < last_h;
        for (int64_t w = 0; w < g.w.out; ++w) {
          if (whole_row && w == first_w) w = std::max(first_w, last_w);
          if (w >= g.w.out) break;
          const Code code = row[w * s.w];
          if (code == kOff<Code>) continue;
          if (element_or_off(code) > window) return false;
          if (!exists(g.h, h, code / g.w.pool_kernel)) return false;
          if (!exists(g.w, w, code % g.w.pool_kernel)) return false;
        }
      }
    }
  }
  return true;
}

}  // namespace

bool codes_fit(const BackwardArgs& args) {
  return args.wide_code ? all_fit<int32_t>(args) : all_fit<uint8_t>(args);
}

}  // namespace fusedcnn::cpu
