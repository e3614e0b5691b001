// The backward's padded image of one group, [rows][cols][channels], and its way in and out.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/transpose.h"
#include "cpu/plan.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Scratch for one padded image, with room behind it for the last vectors of the last patch.
template <typename T>
T* patch_image(const BackwardPlan& plan) {
  const int64_t slack = plan.run(kLanes<T>) + kLanes<T>;
  T* image = static_cast<T*>(scratch(Slot::kPatch, (plan.size + slack) * sizeof(T)));
  memset(image + plan.size, 0, slack * sizeof(T));
  return image;
}

// to[x * to_pitch + c] = from[x * from_pitch + c] for the first `channels` of each pixel.
template <typename From, typename To>
void copy_pixels(const From* from, int64_t from_pitch, To* to, int64_t to_pitch, int64_t width,
                 int64_t channels) {
  if (from_pitch == channels && to_pitch == channels)
    return convert_run(from, to, width * channels);
  // Compile-time sizes spare images a library call per pixel.
  const auto copy = [&]<int C>() {
    for (int64_t x = 0; x < width; ++x) {
      convert_run(from + x * from_pitch, to + x * to_pitch, C ? C : channels);
    }
  };
  switch (channels) {
    case 1: return copy.template operator()<1>();
    case 2: return copy.template operator()<2>();
    case 3: return copy.template operator()<3>();
    case 4: return copy.template operator()<4>();
    case 16: return copy.template operator()<16>();
    default: copy.template operator()<0>();
  }
}

// Reads one row of `width` pixels of a tensor into [width][pitch], the first `channels` of each.
template <typename S, typename T>
void read_pixels(const S* from, Strides strides, T* to, int64_t pitch, int64_t width,
                 int64_t channels) {
  if (strides.c == 1) return copy_pixels(from, strides.w, to, pitch, width, channels);
  if (strides.w == 1) return transpose_matrix(from, strides.c, to, pitch, channels, width);
  for (int64_t x = 0; x < width; ++x) {
    for (int64_t c = 0; c < channels; ++c) {
      to[x * pitch + c] = convert<T>(from[x * strides.w + c * strides.c]);
    }
  }
}

// The way back: [width][pitch] into one row of a tensor.
template <typename S, typename T>
void write_pixels(const T* from, int64_t pitch, S* to, Strides strides, int64_t width,
                  int64_t channels) {
  if (strides.c == 1) return copy_pixels(from, pitch, to, strides.w, width, channels);
  if (strides.w == 1) return transpose_matrix(from, pitch, to, strides.c, width, channels);
  for (int64_t x = 0; x < width; ++x) {
    for (int64_t c = 0; c < channels; ++c) {
      to[x * strides.w + c * strides.c] = convert<S>(from[x * pitch + c]);
    }
  }
}

// Zeros in one row of a tensor.
template <typename S>
void clear_pixels(S* to, Strides strides, int64_t width, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t x = 0; x < width; ++x) to[c * strides.c + x * strides.w] = S{};
  }
}

// Copies one group of one image into [rows][cols][channels], zeros around it.
template <typename S, typename T>
void pack_patches(const BackwardPlan& plan, const BackwardArgs& args, int64_t n, int64_t group,
                  T* image) {
  const Geometry& g = args.geometry;
  const Strides strides = args.input_strides;
  const int64_t channels = g.in_channels_per_group();
  const S* input = static_cast<const S*>(args.input) + n * strides.n + group * channels * strides.c;
  const int64_t left = smaller(g.w.padding, plan.cols);
  const int64_t width = smaller(g.w.in, plan.cols - left);
  for (int64_t y = 0; y < plan.rows; ++y) {
    T* to = image + y * plan.cols * plan.channels;
    const int64_t source = y - g.h.padding;
    if (source < 0 || source >= g.h.in || width < 1) {
      memset(to, 0, plan.cols * plan.channels * sizeof(T));
      continue;
    }
    memset(to, 0, left * plan.channels * sizeof(T));
    to += left * plan.channels;
    read_pixels(input + source * strides.h, strides, to, plan.channels, width, channels);
    memset(to + width * plan.channels, 0, (plan.cols - left - width) * plan.channels * sizeof(T));
  }
}

// Copies [rows][cols][channels] into one group of one image of grad_input; what no tap reaches
// gets zeros.
template <typename S, typename T>
void unpack_patches(const BackwardPlan& plan, const BackwardArgs& args, int64_t n, int64_t group,
                    const T* image) {
  const Geometry& g = args.geometry;
  const Strides strides = args.grad_input_strides;
  const int64_t channels = g.in_channels_per_group();
  S* output = static_cast<S*>(args.grad_input) + n * strides.n + group * channels * strides.c;
  for (int64_t y = 0; y < g.h.in; ++y) {
    const bool reached = y + g.h.padding < plan.rows;
    const int64_t reach = reached ? smaller(g.w.in, plan.cols - g.w.padding) : 0;
    const int64_t width = larger<int64_t>(reach, 0);
    const T* from = image + ((y + g.h.padding) * plan.cols + g.w.padding) * plan.channels;
    S* to = output + y * strides.h;
    if (width > 0) write_pixels(from, plan.channels, to, strides, width, channels);
    clear_pixels(to + width * strides.w, strides, g.w.in - width, channels);
  }
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
