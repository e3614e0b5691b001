// Which elements of a window exist, and maps of one column laid down as rows.
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/simd.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// The window elements p, begin <= p < end, of pooled output o whose convolution outputs lie in
// [first, last); none where end <= begin.
FUSEDCNN_INLINE void window_range(const Axis& axis, int64_t o, int64_t first, int64_t last,
                                  int64_t& begin, int64_t& end) {
  const int64_t start = o * axis.pool_stride - axis.pool_padding, step = axis.pool_dilation;
  begin = start >= first ? 0 : (first - start + step - 1) / step;
  end = start >= last ? 0 : smaller(axis.pool_kernel, (last - start + step - 1) / step);
}

// The convolution outputs that pooled outputs [first, first + count) look at: [begin, end).
FUSEDCNN_INLINE void conv_range(const Axis& axis, int64_t first, int64_t count, int64_t& begin,
                                int64_t& end) {
  const int64_t last = (first + count - 1) * axis.pool_stride - axis.pool_padding +
                       (axis.pool_kernel - 1) * axis.pool_dilation;
  begin = larger<int64_t>(0, first * axis.pool_stride - axis.pool_padding);
  end = smaller(axis.conv, last + 1);
}

// Whether pooled output o's window holds no convolution output at all. Only a dilated window can
// step over the whole input; torch then yields -infinity.
FUSEDCNN_INLINE bool empty_window(const Axis& axis, int64_t o) {
  int64_t begin, end;
  window_range(axis, o, 0, axis.conv, begin, end);
  return begin >= end;
}

// The first element of a window that is a convolution output, or -1.
FUSEDCNN_INLINE int64_t first_element(const Geometry& g, int64_t oh, int64_t ow) {
  int64_t top, bottom, left, right;
  window_range(g.h, oh, 0, g.h.conv, top, bottom);
  window_range(g.w, ow, 0, g.w.conv, left, right);
  return top < bottom && left < right ? top * g.w.pool_kernel + left : -1;
}

// Kernels are made for rows of convolution outputs, and slow with single ones. Where both the
// convolution's output and the window are one column wide, as over text, height and width change
// places; codes mean the same then.
FUSEDCNN_INLINE bool lies_upright(const Geometry& g) {
  return g.w.conv == 1 && g.w.pool_kernel == 1 && g.h.conv > 1;
}

FUSEDCNN_INLINE void lay_down(Strides& s) { s = {s.n, s.c, s.w, s.h}; }

// Of a tensor of one row of `width`: as if the next row followed.
FUSEDCNN_INLINE void lay_down(Strides& s, int64_t width) { s = {s.n, s.c, s.h * width, s.h}; }

FUSEDCNN_INLINE void lay_down(Geometry& g) {
  const Axis h = g.h;
  g.h = g.w;
  g.w = h;
}

FUSEDCNN_INLINE ForwardArgs laid_down(ForwardArgs args) {
  if (!lies_upright(args.geometry)) return args;
  lay_down(args.geometry);
  lay_down(args.input_strides);
  lay_down(args.weight_strides);
  lay_down(args.output_strides, args.geometry.w.out);
  return args;
}

FUSEDCNN_INLINE BackwardArgs laid_down(BackwardArgs args) {
  if (!lies_upright(args.geometry)) return args;
  lay_down(args.geometry);
  lay_down(args.grad_output_strides, args.geometry.w.out);
  lay_down(args.code_strides, args.geometry.w.out);
  lay_down(args.input_strides);
  lay_down(args.weight_strides);
  lay_down(args.grad_input_strides);
  lay_down(args.grad_weight_strides);
  return args;
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
