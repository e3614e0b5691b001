#include "core/geometry.h"

#include <sstream>
#include <stdexcept>
#include <string>

namespace fusedcnn {
namespace {

// Holds the product of two numbers of 63 bits, and the sum of several such products.
typedef __int128 Wide;

constexpr int kAxisBits = 46;
constexpr int kTensorBits = 54;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// `value`, or an error that names the argument that made it so large.
int64_t along_axis(Wide value, const char* argument, int64_t given, const char* what, char letter) {
  if (value > Wide{1} << kAxisBits) {
    fail(argument, ": expected ", what, " of at most 2^", kAxisBits, " elements along ", letter,
         ", got ", argument, " ", given);
  }
  return static_cast<int64_t>(value);
}

void at_least(int64_t least, const char* argument, int64_t value) {
  if (value < least) fail(argument, ": expected values >= ", least, ", got ", value);
}

// `letter` is 'H' or 'W'.
void complete_axis(Axis& axis, bool ceil_mode, char letter) {
  if (axis.in < 1) fail("input: expected ", letter, " >= 1, got ", axis.in);
  if (axis.kernel < 1) fail("weight: expected kernel sizes >= 1, got ", axis.kernel);
  at_least(1, "stride", axis.stride);
  at_least(1, "dilation", axis.dilation);
  at_least(0, "padding", axis.padding);
  at_least(0, "padding", axis.padding_after);
  at_least(1, "pool_kernel_size", axis.pool_kernel);
  at_least(1, "pool_stride", axis.pool_stride);
  at_least(1, "pool_dilation", axis.pool_dilation);
  at_least(0, "pool_padding", axis.pool_padding);

  along_axis(axis.in, "input", axis.in, "a size", letter);
  const int64_t padded = along_axis(Wide{axis.in} + axis.padding + axis.padding_after, "padding",
                                    axis.padding, "a padded input", letter);
  const Wide extent = Wide{axis.dilation} * (axis.kernel - 1) + 1;
  if (extent > padded) {
    std::ostringstream got;
    if (axis.dilation > 1) {
      got << axis.kernel << " (dilation " << axis.dilation << ')';
    } else {
      got << axis.kernel;
    }
    fail("weight: expected a kernel no larger than the padded input, got ", got.str(), " over ",
         padded, " along ", letter);
  }
  axis.conv = (padded - static_cast<int64_t>(extent)) / axis.stride + 1;

  // Of the window's elements, not of their extent, as in torch.
  if (axis.pool_padding > axis.pool_kernel / 2) {
    fail("pool_padding: expected at most half of pool_kernel_size (", axis.pool_kernel / 2,
         "), got ", axis.pool_padding);
  }
  const int64_t pool_padded =
      along_axis(Wide{axis.conv} + 2 * Wide{axis.pool_padding}, "pool_padding", axis.pool_padding,
                 "a padded convolution output", letter);
  const Wide window = Wide{axis.pool_dilation} * (axis.pool_kernel - 1) + 1;
  const Wide room = pool_padded - window + (ceil_mode ? axis.pool_stride - 1 : 0);
  // A window larger than the padded output has no place at all, unless ceil_mode makes one.
  if (room < 0) {
    std::ostringstream got;
    got << axis.pool_kernel;
    if (axis.pool_dilation > 1) got << " (pool_dilation " << axis.pool_dilation << ')';
    got << " over " << pool_padded;
    if (axis.stride > 1) got << " (stride " << axis.stride << ')';
    fail("pool_kernel_size: expected a window no larger than the padded convolution output, got ",
         got.str(), " along ", letter);
  }
  along_axis(window, axis.pool_dilation > 1 ? "pool_dilation" : "pool_kernel_size",
             axis.pool_dilation > 1 ? axis.pool_dilation : axis.pool_kernel, "a window", letter);
  axis.out = static_cast<int64_t>(room / axis.pool_stride) + 1;
  // A window may not start in the padding after the input.
  if (ceil_mode && Wide{axis.out - 1} * axis.pool_stride >= axis.conv + axis.pool_padding) {
    --axis.out;
  }
  if (axis.kernel == 1) axis.dilation = 1;
  if (axis.conv == 1 && axis.stride > axis.extent()) axis.stride = axis.extent();
  if (axis.pool_kernel == 1) axis.pool_dilation = 1;
  if (axis.out == 1 && axis.pool_stride > axis.window()) axis.pool_stride = axis.window();

  // What is left are the products of the pool's sizes with the stride.
  along_axis(Wide{axis.pool_stride} * axis.stride, "pool_stride", axis.pool_stride,
             "a distance between windows (pool_stride * stride)", letter);
  along_axis(Wide{axis.pool_padding} * axis.stride + axis.padding, "pool_padding",
             axis.pool_padding, "a start (pool_padding * stride + padding)", letter);
  along_axis((Wide{axis.out - 1} * axis.pool_stride + axis.window()) * axis.stride + axis.extent(),
             axis.pool_dilation > 1 ? "pool_dilation" : "pool_kernel_size",
             axis.pool_dilation > 1 ? axis.pool_dilation : axis.pool_kernel,
             "a span of all windows in the input", letter);
}

// The product of sizes of at least 1, or an error that names the argument.
template <typename... Sizes>
void elements(const char* argument, const char* what, const Sizes&... sizes) {
  Wide product = 1;
  const auto multiply = [&](int64_t size) {
    product *= size;
    if (product > Wide{1} << kTensorBits) {
      fail(argument, ": expected ", what, " of at most 2^", kTensorBits, " elements");
    }
  };
  (multiply(sizes), ...);
}

// Fills in the output sizes of a geometry and checks all of it; the weight has `weight_channels`
// input channels.
void complete(Geometry& g, int64_t weight_channels) {
  if (g.groups < 1) fail("groups: expected a value >= 1, got ", g.groups);
  if (g.out_channels < 1) fail("weight: expected out_channels >= 1, got ", g.out_channels);
  if (g.in_channels < 1) fail("input: expected C >= 1, got ", g.in_channels);
  if (g.out_channels % g.groups != 0) {
    fail("groups: expected a divisor of out_channels (", g.out_channels, "), got ", g.groups);
  }
  if (g.in_channels % g.groups != 0 || weight_channels != g.in_channels_per_group()) {
    std::ostringstream expected;
    expected << weight_channels << " channels";
    if (g.groups > 1) expected << " in each of " << g.groups << " groups";
    fail("input: expected ", expected.str(), ", as weight has, got ", g.in_channels);
  }
  complete_axis(g.h, g.ceil_mode, 'H');
  complete_axis(g.w, g.ceil_mode, 'W');

  const int64_t batch = g.batch > 0 ? g.batch : 1;
  const int64_t channels = g.in_channels_per_group();
  elements("input", "an input", batch, g.in_channels, g.h.in, g.w.in);
  elements("weight", "a weight", g.out_channels, channels, g.h.kernel, g.w.kernel);
  elements("padding", "a padded image of one group", channels, g.h.padded(), g.w.padded());
  elements("pool_kernel_size, pool_padding, pool_dilation",
           "an image of one group, as far as windows reach,", channels, g.h.reach(), g.w.reach());
  elements("input", "an input and a weight whose output holds", batch, g.out_channels, g.h.out,
           g.w.out);
  elements("pool_kernel_size", "a window", g.h.pool_kernel, g.w.pool_kernel);
  elements("pool_kernel_size", "windows times weight", g.h.pool_kernel, g.w.pool_kernel,
           g.out_channels, channels, g.h.kernel, g.w.kernel);
  // What a code can say.
  if (g.window() > INT32_MAX) {
    fail("pool_kernel_size: expected windows of at most 2^31 - 1 elements, got ", g.h.pool_kernel,
         " * ", g.w.pool_kernel);
  }
}

}  // namespace

Geometry unpack(const int64_t (&input)[4], const int64_t (&weight)[4], const int64_t* packed) {
  const auto axis = [&](int i) {
    return Axis{input[2 + i],
                weight[2 + i],
                packed[i],
                packed[2 + 2 * i],
                packed[3 + 2 * i],
                packed[6 + i],
                packed[9 + i],
                packed[11 + i],
                packed[13 + i],
                packed[15 + i],
                0,
                0};
  };
  Geometry g{input[0], input[1], weight[0], packed[8], axis(0), axis(1), packed[17] != 0};
  complete(g, weight[1]);
  return g;
}

}  // namespace fusedcnn
