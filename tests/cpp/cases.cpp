#include "cases.h"

#include <cstdio>
#include <cstdlib>

namespace selftest {
namespace {

using fusedcnn::Axis;
using fusedcnn::Geometry;

// One axis as a user would write it; the defaults are the block of SimpleCNN.
struct AxisSpec {
  int64_t in = 0;
  int64_t kernel = 3;
  int64_t stride = 1;
  int64_t padding = 1;
  int64_t padding_after = -1;  // -1: as before
  int64_t dilation = 1;
  int64_t pool = 2;
  int64_t pool_stride = 0;  // 0: the pool's size
  int64_t pool_padding = 0;
  int64_t pool_dilation = 1;
};

struct Channels {
  int64_t batch, in, out, groups = 1;
};

Axis axis(const AxisSpec& s, bool ceil_mode) {
  Axis a{s.in,
         s.kernel,
         s.stride,
         s.padding,
         s.padding_after < 0 ? s.padding : s.padding_after,
         s.dilation,
         s.pool,
         s.pool_stride ? s.pool_stride : s.pool,
         s.pool_padding,
         s.pool_dilation,
         0,
         0};
  a.conv = (a.in + a.padding + a.padding_after - a.dilation * (a.kernel - 1) - 1) / a.stride + 1;
  const int64_t room = a.conv + 2 * a.pool_padding - a.pool_dilation * (a.pool_kernel - 1) - 1;
  a.out = (room + (ceil_mode ? a.pool_stride - 1 : 0)) / a.pool_stride + 1;
  if (ceil_mode && (a.out - 1) * a.pool_stride >= a.conv + a.pool_padding) --a.out;
  return a;
}

Case make(const std::string& name, Channels c, const AxisSpec& h, const AxisSpec& w,
          bool ceil_mode = false) {
  Case made{name,
            {c.batch, c.in, c.out, c.groups, axis(h, ceil_mode), axis(w, ceil_mode), ceil_mode}};
  if (made.geometry.h.out < 1 || made.geometry.w.out < 1) {
    std::printf("case %s has no output\n", name.c_str());
    std::abort();
  }
  return made;
}

// Both axes alike, but for the input's size.
Case both(const std::string& name, Channels c, int64_t h, int64_t w, AxisSpec shared,
          bool ceil_mode = false) {
  AxisSpec other = shared;
  shared.in = h, other.in = w;
  return make(name, c, shared, other, ceil_mode);
}

// An axis whose windows are wholly in the padding, some or all of them.
AxisSpec empty(int64_t in) {
  return {
      .in = in, .kernel = 1, .padding = 0, .pool_stride = 1, .pool_padding = 2, .pool_dilation = 4};
}

std::vector<Case> all_cases() {
  std::vector<Case> list = {
      make("block1", {2, 3, 16}, {32}, {32}),
      make("block2", {2, 16, 32}, {16}, {16}),
      make("no_images", {0, 3, 5}, {6}, {6}),
      both("one_pixel", {1, 1, 1}, 1, 1, {.pool = 1}),
      make("one_pooled", {3, 2, 3}, {2}, {2}),
      make("odd_map", {1, 3, 16}, {7}, {9}),
      make("wide_map", {1, 3, 16}, {3}, {67}),
      make("tall_map", {1, 3, 16}, {67}, {2}),
      both("no_padding", {2, 4, 17}, 9, 8, {.padding = 0}),
      both("padding2", {1, 3, 16}, 5, 6, {.padding = 2}),
      make("padding3x4", {1, 2, 3}, {.in = 3, .padding = 3}, {.in = 4, .padding = 4}),
      make("ceil", {2, 3, 16}, {9}, {11}, true),
      make("one_channel", {2, 1, 33}, {6}, {10}),
      make("wide_pooled_map", {1, 2, 17}, {11}, {30}),
      make("many_channels", {1, 33, 31}, {6}, {7}),
      make("channels64", {1, 64, 48}, {8}, {8}),
      both("channels15", {1, 15, 31}, 17, 16, {.padding = 0}, true),
      make("channels8", {1, 8, 16}, {17}, {31}, true),
      make("outputs70", {1, 9, 70}, {5}, {4}),
      make("many_weights", {1, 17, 70}, {2}, {3}),
      make("one_output", {2, 5, 1}, {8}, {10}),
      make("bands", {1, 48, 3}, {40}, {38}),
      make("many_images", {601, 2, 3}, {4}, {4}),
      // What grad_weight's lists take together: several small images, the last of them fewer; and
      // apart: bands of one image, the last of them lower.
      make("images_together", {50, 9, 5}, {6}, {10}),
      make("bands_of_rows", {2, 9, 6}, {60}, {40}),
      // convolution
      both("kernel1", {2, 5, 6}, 7, 8, {.kernel = 1, .padding = 0}),
      make("kernel2x5", {1, 3, 4}, {.in = 8, .kernel = 2}, {.in = 11, .kernel = 5, .padding = 2}),
      both(
          "kernel7_stride2", {1, 3, 5}, 19, 18,
          {.kernel = 7, .stride = 2, .padding = 3, .pool = 3, .pool_stride = 2, .pool_padding = 1}),
      both("kernel11_stride4", {1, 3, 6}, 35, 39,
           {.kernel = 11, .stride = 4, .padding = 2, .pool = 3, .pool_stride = 2}),
      make("stride3x2", {2, 3, 5}, {.in = 16, .stride = 3}, {.in = 13, .stride = 2}),
      make("stride_over_kernel", {1, 2, 3}, {.in = 17, .kernel = 2, .stride = 4, .padding = 0},
           {.in = 18, .kernel = 2, .stride = 5, .padding = 1}),
      make("same_even", {1, 3, 5}, {.in = 7, .kernel = 4, .padding = 1, .padding_after = 2},
           {.in = 8, .kernel = 2, .padding = 0, .padding_after = 1}),
      make("padding_over_kernel", {1, 2, 3}, {.in = 3, .kernel = 2, .padding = 4},
           {.in = 4, .kernel = 1, .padding = 3}),
      make("dilation2x3", {1, 3, 5}, {.in = 11, .padding = 2, .dilation = 2},
           {.in = 12, .padding = 3, .dilation = 3}),
      make("wide_row", {1, 2, 3}, {.in = 3, .stride = 2}, {.in = 1042, .kernel = 4, .stride = 2}),
      make("stride_is_dilation", {1, 3, 5}, {.in = 12, .padding = 2, .dilation = 2},
           {.in = 15, .kernel = 4, .stride = 2, .padding = 3, .dilation = 2}),
      make("dilation_stride", {2, 18, 5}, {.in = 13, .stride = 2, .padding = 2, .dilation = 2},
           {.in = 9, .stride = 1, .padding = 0, .dilation = 2}),
      make("groups2", {2, 6, 10, 2}, {6}, {8}),
      make("groups3_uneven", {1, 51, 21, 3}, {5}, {6}),
      make("depthwise", {2, 17, 17, 17}, {9}, {7}),
      make("depthwise_times2", {1, 5, 10, 5}, {.in = 9, .kernel = 5, .padding = 2}, {10}),
      make("unread_rows", {1, 2, 3}, {.in = 12, .kernel = 2, .stride = 5, .padding = 0},
           {.in = 11, .kernel = 2, .stride = 4, .padding = 0}),
      // pool
      both("pool1", {2, 3, 5}, 6, 9, {.pool = 1}),
      both("plane", {2, 3, 32}, 9, 13, {.pool = 1}),
      both("plane_stride2", {1, 3, 48}, 21, 38,
           {.kernel = 7, .stride = 2, .padding = 3, .pool = 1}),
      both("plane_padding0", {2, 33, 30}, 10, 7, {.padding = 0, .pool = 1}),
      both("plane_padding2", {1, 16, 16}, 9, 6, {.padding = 2, .pool = 1}),
      both("plane_channels", {3, 40, 64}, 16, 15, {.pool = 1}),
      make("plane_pixel", {2, 17, 32}, {.in = 1, .pool = 1}, {.in = 1, .pool = 1}),
      make("plane_row", {2, 20, 16}, {.in = 1, .pool = 1}, {.in = 50, .pool = 1}),
      both("plane_bands", {1, 64, 32}, 47, 44, {.pool = 1}),
      make("pool1_gapped", {1, 3, 16}, {.in = 9, .pool = 1, .pool_stride = 2},
           {.in = 10, .pool = 1, .pool_stride = 3}),
      both("pool3", {1, 3, 16}, 9, 10, {.pool = 3}),
      both("pool3_stride1", {1, 3, 5}, 6, 19, {.pool = 3, .pool_stride = 1}),
      both("pool2_stride1", {1, 3, 16}, 6, 8, {.pool_stride = 1}),
      both("pool2_stride3", {1, 3, 16}, 8, 9, {.pool_stride = 3}),
      both("pool2_padding1", {2, 3, 16}, 6, 8, {.pool_padding = 1}),
      make("pool3x1", {1, 2, 5}, {.in = 9, .pool = 3}, {.in = 7, .pool = 1}),
      make("pool4x2_padding2x1", {1, 2, 5},
           {.in = 9, .pool = 4, .pool_stride = 1, .pool_padding = 2},
           {.in = 7, .pool = 2, .pool_padding = 1}),
      make("pool_dilation2", {1, 3, 5}, {.in = 9, .pool_dilation = 2},
           {.in = 11, .pool = 3, .pool_stride = 1, .pool_padding = 2, .pool_dilation = 2}),
      make("ceil_pool3_stride2", {1, 3, 5}, {.in = 8, .pool = 3, .pool_stride = 2},
           {.in = 10, .pool = 3, .pool_stride = 2, .pool_padding = 1}, true),
      both("ceil_drops_window", {1, 2, 5}, 6, 8,
           {.kernel = 1, .padding = 0, .pool_stride = 3, .pool_padding = 1}, true),
      make("window255", {1, 2, 3}, {.in = 15, .pool = 15}, {.in = 17, .pool = 17}),
      both("window256", {1, 2, 3}, 17, 18, {.pool = 16, .pool_stride = 1}),
      make("window380", {1, 1, 3}, {.in = 16, .pool = 19, .pool_stride = 2, .pool_padding = 9},
           {.in = 20, .pool = 20}),
      make("empty_windows", {1, 2, 5}, empty(3), {.in = 9, .pool_stride = 1}),
      make("only_empty_windows", {2, 2, 3}, empty(2), empty(1)),
      // windows of many elements
      make("global_pool", {9, 16, 32}, {.in = 12, .pool = 12}, {.in = 14, .pool = 14}),
      make("global_wide_code", {2, 3, 5}, {.in = 18, .pool = 18}, {.in = 35, .pool = 35}),
      make("global_groups", {2, 6, 34, 2}, {.in = 9, .pool = 9}, {.in = 10, .pool = 10}),
      make("global_stride", {1, 2, 16}, {.in = 41, .kernel = 5, .stride = 3, .pool = 14},
           {.in = 27, .kernel = 4, .stride = 2, .pool = 13}),
      make("large_overlapping", {1, 3, 16},
           {.in = 20, .pool = 9, .pool_stride = 2, .pool_padding = 4},
           {.in = 37, .pool = 8, .pool_stride = 1}),
      both("large_side_by_side", {2, 3, 12}, 26, 25, {.pool = 8}, true),
      make("large_dilated", {1, 2, 13},
           {.in = 21, .pool = 9, .pool_stride = 1, .pool_padding = 4, .pool_dilation = 2},
           {.in = 30, .pool = 7, .pool_stride = 3, .pool_padding = 3, .pool_dilation = 3}),
      make("large_empty_windows", {1, 2, 12}, empty(3), {.in = 60, .pool = 40, .pool_stride = 3}),
      make("window_beyond_map", {2, 2, 12}, {.in = 6, .pool = 40, .pool_padding = 20},
           {.in = 5, .pool = 61, .pool_padding = 30}),
      make("window_row", {1, 3, 16}, {.in = 4, .pool = 1},
           {.in = 90, .pool = 40, .pool_stride = 7}),
      make("text_column", {3, 5, 17}, {.in = 44, .pool = 44},
           {.in = 1, .kernel = 1, .padding = 0, .pool = 1}),
      make("text_column_groups", {1, 6, 8, 2}, {.in = 30, .pool = 7, .pool_stride = 3},
           {.in = 1, .pool = 1}),
      make("text_kernel", {1, 1, 20}, {.in = 24, .padding = 0, .pool = 22},
           {.in = 10, .kernel = 10, .padding = 0, .pool = 1}),
      // large enough to be shared out between threads
      make("global_slices", {1, 16, 32}, {.in = 30, .pool = 30}, {.in = 31, .pool = 31}),
      make("overlapping_slices", {2, 16, 40}, {.in = 30, .pool = 17, .pool_stride = 1},
           {.in = 31, .pool = 9, .pool_stride = 4, .pool_padding = 4}),
      make("global_parts", {2, 8, 100}, {.in = 250, .padding = 0, .pool = 248},
           {.in = 10, .kernel = 10, .padding = 0, .pool = 1}),
      both("large_weights", {2, 170, 180}, 6, 6, {.pool = 6}),
  };
  // Every remainder of a vector's lanes in the pooled width.
  for (const int64_t pooled : {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 18}) {
    list.push_back(make("pooled_width" + std::to_string(pooled), {1, 2, 5}, {4}, {2 * pooled}));
  }
  return list;
}

}  // namespace

const std::vector<Case>& cases() {
  static const std::vector<Case> list = all_cases();
  return list;
}

const Case& case_named(const std::string& name) {
  for (const Case& one : cases()) {
    if (one.name == name) return one;
  }
  std::printf("no case named %s\n", name.c_str());
  std::abort();
}

}  // namespace selftest
