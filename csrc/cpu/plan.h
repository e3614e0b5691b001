// What the general kernels derive from a geometry before they touch data. Torch-free.
#pragma once

#include <cstdint>
#include <memory>

#include "core/geometry.h"

namespace fusedcnn::cpu {

// An array of a size set at run time. It keeps std::vector's inline functions out of the ISA
// objects: of those the linker could keep the wrong machine's copy.
template <typename T>
using Array = std::unique_ptr<T[]>;

// The forward's view of one axis. Pooled outputs lie `step` input elements apart, so everything
// that pooled output o reads is found at o * step plus an offset that does not depend on o. The
// padded input is split into `step` phases: element x goes to phase x % step, place x / step. Each
// convolution tap of each window element is then a contiguous run over o in one phase: the inner
// loops see no strides, dilation or pooling, for any combination of them.
struct AxisPhases {
  int64_t step;
  int64_t origin;              // input element at place 0 of phase 0; may be negative
  int64_t input_phases;        // phases in use
  Array<int64_t> input_phase;  // [input_phases] residue of each
  int64_t conv_phases;         // residues of convolution outputs in use, modulo pool_stride
  Array<int64_t> conv_phase;   // [conv_phases] residue of each
  Array<int64_t> conv_extra;   // [conv_phases] places needed past the last pooled output
  int64_t max_extra;           // the largest of them
  Array<int64_t> tap_phase;    // [conv_phases * kernel] index of the tap's input phase
  Array<int64_t> tap_place;    // [conv_phases * kernel] its place for pooled output 0
  int64_t max_place;           // the largest place that pooled output 0 reads, extras included
  Array<int64_t> pool_phase;   // [pool_kernel] index of the window element's conv phase
  Array<int64_t> pool_place;   // [pool_kernel] its place for pooled output 0
  bool masked;                 // some window reaches outside the convolution's output
};

struct ForwardPlan {
  AxisPhases h;
  AxisPhases w;
  int64_t pitch;               // places per row of a plane
  int64_t band;                // pooled rows computed at a time
  int64_t plane_rows;          // rows of a plane, for a full band
  int64_t plane_size;          // elements from one phase plane to the next
  int64_t channel_size;        // elements of one channel: all its phase planes
  Array<int64_t> tap_offset;   // [conv_phases_h * conv_phases_w][taps] into a channel
  Array<int64_t> pool_offset;  // [window] into the convolution scratch of one channel
  int64_t conv_size;           // elements of the convolution scratch of one phase

  // `element` is the accumulation type's size and `lanes` the elements of a vector.
  ForwardPlan(const Geometry& g, int64_t element, int64_t lanes);
  ~ForwardPlan();

  int64_t bands(const Geometry& g) const { return (g.h.out + band - 1) / band; }
  int64_t conv_phases() const { return h.conv_phases * w.conv_phases; }
};

// The backward's view: one padded image of one group as [rows, cols, channels], in which a tap row
// (all KW taps of one kh, when dilation_w is 1) is one contiguous run. Each pooled output that is
// live adds or receives one patch: `segments` runs of `length` elements.
struct BackwardPlan {
  int64_t rows, cols;  // of the padded image, as far as taps reach
  int64_t channels;    // element stride between pixels: channels per group, maybe padded
  int64_t size;        // rows * cols * channels
  int64_t outer;       // a patch is [outer][segments][length]
  int64_t segments;
  int64_t length;
  bool tap_rows;         // a run holds all taps of one kh, and not a single tap
  int64_t outer_stride;  // elements between outer runs
  int64_t segment_stride;
  Array<uint32_t> base;         // [out_h * out_w] place of window element 0's patch, modulo 2^32
  Array<uint32_t> code_offset;  // [256] what the winner's code adds to it, where codes are bytes
  uint32_t pool_kernel_w, code_row, code_col;  // and what it is made of

  // Pixels hold `channel_multiple` times a whole number of elements (1: packed).
  BackwardPlan(const Geometry& g, int64_t channel_multiple);
  ~BackwardPlan();

  // What any code adds to `base`.
  uint32_t offset_of(uint32_t code) const {
    return code / pool_kernel_w * code_row + code % pool_kernel_w * code_col;
  }
  // Elements between the starts of two weights' patches, runs rounded up to whole vectors.
  int64_t run(int64_t lanes) const { return (length + lanes - 1) / lanes * lanes; }
  int64_t patch(int64_t lanes) const { return outer * segments * run(lanes); }
  // Where tap (kh, kw) begins in such a patch.
  int64_t tap(int64_t kh, int64_t kw, int64_t lanes) const {
    return tap_rows ? kh * run(lanes) + kw * channels : (kh * segments + kw) * run(lanes);
  }
};

}  // namespace fusedcnn::cpu
