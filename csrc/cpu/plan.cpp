#include "cpu/plan.h"

#include <algorithm>
#include <new>

#include "cpu/out_of_memory.h"

namespace fusedcnn::cpu {
namespace {

// Bytes of a band's input planes: half of a small L2, the rest being weights and output.
constexpr int64_t kBandBytes = int64_t{256} << 10;
// Rows of a band at least, as far as the image has them: neighbouring bands pack the rows that both
// need, so thin bands pack everything twice.
constexpr int64_t kMinBand = 4;

template <typename T>
Array<T> array_of(int64_t count) {
  try {
    return std::make_unique<T[]>(static_cast<size_t>(count));
  } catch (const std::bad_alloc&) {
    throw OutOfMemory(count * int64_t{sizeof(T)});
  }
}

// Index of `value` in the first `count` of `list`, appending it when it is new.
int64_t find_or_append(int64_t* list, int64_t& count, int64_t value) {
  for (int64_t i = 0; i < count; ++i) {
    if (list[i] == value) return i;
  }
  list[count] = value;
  return count++;
}

AxisPhases make_phases(const Axis& axis, bool ceil_mode) {
  AxisPhases p{};
  p.step = axis.step();
  p.origin = axis.origin();
  p.pool_phase = array_of<int64_t>(axis.pool_kernel);
  p.pool_place = array_of<int64_t>(axis.pool_kernel);
  p.conv_phase = array_of<int64_t>(axis.pool_kernel);
  for (int64_t k = 0; k < axis.pool_kernel; ++k) {
    const int64_t offset = k * axis.pool_dilation;
    p.pool_phase[k] = find_or_append(p.conv_phase.get(), p.conv_phases, offset % axis.pool_stride);
    p.pool_place[k] = offset / axis.pool_stride;
  }
  p.conv_extra = array_of<int64_t>(p.conv_phases);
  for (int64_t k = 0; k < axis.pool_kernel; ++k) {
    int64_t& extra = p.conv_extra[p.pool_phase[k]];
    extra = std::max(extra, p.pool_place[k]);
    p.max_extra = std::max(p.max_extra, extra);
  }
  p.input_phase = array_of<int64_t>(p.conv_phases * axis.kernel);
  p.tap_phase = array_of<int64_t>(p.conv_phases * axis.kernel);
  p.tap_place = array_of<int64_t>(p.conv_phases * axis.kernel);
  for (int64_t j = 0; j < p.conv_phases; ++j) {
    for (int64_t k = 0; k < axis.kernel; ++k) {
      const int64_t offset = p.conv_phase[j] * axis.stride + k * axis.dilation;
      const int64_t tap = j * axis.kernel + k;
      p.tap_phase[tap] = find_or_append(p.input_phase.get(), p.input_phases, offset % p.step);
      p.tap_place[tap] = offset / p.step;
      p.max_place = std::max(p.max_place, p.tap_place[tap] + p.conv_extra[j]);
    }
  }
  const int64_t last = (axis.out - 1) * axis.pool_stride - axis.pool_padding +
                       (axis.pool_kernel - 1) * axis.pool_dilation;
  p.masked = axis.pool_padding > 0 || (ceil_mode && last >= axis.conv);
  return p;
}

}  // namespace

ForwardPlan::ForwardPlan(const Geometry& g, int64_t element, int64_t lanes)
    : h(make_phases(g.h, g.ceil_mode)), w(make_phases(g.w, g.ceil_mode)) {
  pitch = g.w.out + w.max_place;
  const int64_t phases = h.input_phases * w.input_phases;
  const int64_t row_bytes = phases * pitch * g.in_channels_per_group() * element;
  band = std::max(kBandBytes / row_bytes - h.max_place, kMinBand);
  band = std::min(band, g.h.out);
  // Bands of equal height, rather than a thin last one.
  const int64_t count = (g.h.out + band - 1) / band;
  band = (g.h.out + count - 1) / count;
  plane_rows = band + h.max_place;
  plane_size = plane_rows * pitch + lanes;  // rows are written in whole vectors
  channel_size = phases * plane_size;
  // The last place that a pooled output reads, and room for whole vectors from there.
  conv_size = (band - 1 + h.max_extra) * pitch + g.w.out + w.max_extra + lanes;
  conv_size = (conv_size + lanes - 1) / lanes * lanes;

  const int64_t taps = g.taps();
  tap_offset = array_of<int64_t>(conv_phases() * taps);
  for (int64_t jh = 0; jh < h.conv_phases; ++jh) {
    for (int64_t jw = 0; jw < w.conv_phases; ++jw) {
      int64_t* offsets = tap_offset.get() + (jh * w.conv_phases + jw) * taps;
      for (int64_t kh = 0; kh < g.h.kernel; ++kh) {
        for (int64_t kw = 0; kw < g.w.kernel; ++kw) {
          const int64_t th = jh * g.h.kernel + kh, tw = jw * g.w.kernel + kw;
          offsets[kh * g.w.kernel + kw] =
              (h.tap_phase[th] * w.input_phases + w.tap_phase[tw]) * plane_size +
              h.tap_place[th] * pitch + w.tap_place[tw];
        }
      }
    }
  }
  pool_offset = array_of<int64_t>(g.window());
  for (int64_t ph = 0; ph < g.h.pool_kernel; ++ph) {
    for (int64_t pw = 0; pw < g.w.pool_kernel; ++pw) {
      pool_offset[ph * g.w.pool_kernel + pw] =
          (h.pool_phase[ph] * w.conv_phases + w.pool_phase[pw]) * conv_size +
          h.pool_place[ph] * pitch + w.pool_place[pw];
    }
  }
}

ForwardPlan::~ForwardPlan() = default;

BackwardPlan::BackwardPlan(const Geometry& g, int64_t channel_multiple) {
  rows = (g.h.conv - 1) * g.h.stride + (g.h.kernel - 1) * g.h.dilation + 1;
  cols = (g.w.conv - 1) * g.w.stride + (g.w.kernel - 1) * g.w.dilation + 1;
  const int64_t per_group = g.in_channels_per_group();
  channels = (per_group + channel_multiple - 1) / channel_multiple * channel_multiple;
  size = rows * cols * channels;
  const int64_t row_stride = g.h.dilation * cols * channels;
  tap_rows = g.w.dilation == 1;
  if (tap_rows) {
    outer = 1;
    segments = g.h.kernel;
    length = (g.w.kernel - 1) * channels + per_group;
    outer_stride = 0;
    segment_stride = row_stride;
  } else {
    outer = g.h.kernel;
    segments = g.w.kernel;
    length = per_group;
    outer_stride = row_stride;
    segment_stride = g.w.dilation * channels;
  }
  // Places are counted modulo 2^32, and so are the products that lead to them: those of a window
  // that reaches far beyond the image can be any.
  const auto place = [&](int64_t row, int64_t col) {
    const auto u = [](int64_t value) { return static_cast<uint32_t>(value); };
    return (u(row) * u(cols) + u(col)) * u(channels);
  };
  base = array_of<uint32_t>(g.outputs());
  for (int64_t oh = 0; oh < g.h.out; ++oh) {
    for (int64_t ow = 0; ow < g.w.out; ++ow) {
      base[oh * g.w.out + ow] = place((oh * g.h.pool_stride - g.h.pool_padding) * g.h.stride,
                                      (ow * g.w.pool_stride - g.w.pool_padding) * g.w.stride);
    }
  }
  // Of windows larger than the padded image the first code that exists may be a large one; its
  // place is not.
  pool_kernel_w = static_cast<uint32_t>(g.w.pool_kernel);
  code_row = place(g.h.pool_dilation * g.h.stride, 0);
  code_col = place(0, g.w.pool_dilation * g.w.stride);
  code_offset = array_of<uint32_t>(256);
  for (uint32_t code = 0; code < 256; ++code) code_offset[code] = offset_of(code);
}

BackwardPlan::~BackwardPlan() = default;

}  // namespace fusedcnn::cpu
