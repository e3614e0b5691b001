// grad_input of bfloat16 by products of tiles: a convolution of the winners' gradients, with the
// weights' channels swapped and their taps backwards.
//
// A task owns a band of rows of one image's grad_input:
//   G  [rows][cols][out channels]   the convolution's gradient, zeros around it
//   V  [few rows][cols][lanes]      float32 rows of grad_input of up to 32 channels
#pragma once

#include "cpu/kernel.h"
#include "cpu/kernels/ahead.h"
#include "cpu/kernels/backward_general.h"
#include "cpu/kernels/patches.h"
#include "cpu/kernels/tile_convolution.h"
#include "cpu/kernels/tile_image.h"
#include "cpu/kernels/tile_winners.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Rows [first, first + count) of image n.
inline void grad_input_band(const BackwardArgs& args, const TileConvolution& conv, int64_t n,
                            int64_t first, int64_t count) {
  const Geometry& g = args.geometry;
  // Row r of G is row r - top of the convolution's gradient, and row i of grad_input sees the rows
  // from i on.
  const int64_t top = g.h.extent() - 1 - g.h.padding, left = g.w.extent() - 1 - g.w.padding;
  const int64_t rows = count + g.h.extent() - 1;
  const int64_t begin = larger<int64_t>(0, first - top);
  const int64_t end = smaller(g.h.conv, first + rows - top);
  uint16_t* plane = static_cast<uint16_t*>(scratch(Slot::kPatch, conv.size(rows) * 2));
  memset(plane, 0, conv.size(rows) * 2);
  const TileWinners winners(args, n, begin, end);
  winners.write(begin, end, 0, g.out_channels, begin + top - first, left, conv.cols, conv.pixel,
                plane);
  const bool masked = conv.mixed() && !all_finite(plane, conv.size(rows));

  [[maybe_unused]] const TileMachine machine(conv.depth);
  const int64_t few = conv.across == 1 ? 2 : 1;  // rows, so that there are two tiles
  float* ring = static_cast<float*>(
      scratch(Slot::kGradient, 2 * few * conv.row_size(0) * int64_t{sizeof(float)}));
  const Strides& s = args.grad_input_strides;
  BFloat16* image = static_cast<BFloat16*>(args.grad_input) + n * s.n;
  auto ahead = BackwardAhead::of<BFloat16, uint8_t>(args, n, false, conv.blocks() * count);
  for (int64_t block = 0; block < conv.blocks(); ++block) {
    const int64_t channel = block * 2 * kTileLanes, lanes = conv.lanes(block);
    const int64_t channels = smaller(lanes, g.in_channels - channel);
    const auto convolve = [&](int64_t y) {
      const int64_t until = smaller(y + few, first + count);
      if (y < until) conv.rows(plane, first, y, until, block, masked, ring, 2 * few);
    };
    convolve(first);
    for (int64_t y = first; y < first + count; ++y) {
      ahead.step();
      // The next rows' tiles are under way while these are written.
      if ((y - first) % few == 0) convolve(y + few);
      write_pixels(ring + y % (2 * few) * conv.row_size(block), lanes,
                   image + channel * s.c + y * s.h, s, g.w.in, channels);
    }
  }
}

const char* why_not_grad_input_tiles(const Problem& problem) {
  const Geometry& g = problem.geometry;
  if (const char* const because = why_not_backward_tiles(problem)) return because;
  if (const char* const because = why_not_tile_rows(g.out_channels, g.w, g.w.in)) return because;
  return why_not_backward_general(problem);  // which takes over where a weight is not finite
}

const char* grad_input_tiles_are_slower(const Problem&) { return why_tiles_are_slower(); }

void grad_input_tiles(const BackwardArgs& args, const ThreadPool& pool) {
  const Geometry& g = args.geometry;
  TileConvolution conv(g.out_channels, g.in_channels, g.h, g.w, g.w.in);
  const Strides& s = args.weight_strides;
  conv.prepare(pool, {args.weight, {s.c, s.n, s.h, s.w}, true});
  // The zeros around the gradient meet weights that no output does, and times infinity they are
  // NaN.
  if (!all_finite(conv.weights, conv.tiles * conv.chunks * kTileB)) {
    return grad_input_general(args, pool);
  }

  const int64_t row = conv.cols * conv.pixel * 2;
  int64_t rows = larger<int64_t>(8, kTileBandBytes / row);
  if (g.batch < kSmallBatch) rows = smaller(rows, larger<int64_t>(8, (g.h.in + 3) / 4));
  const int64_t bands = (g.h.in + rows - 1) / rows;
  parallel_tasks(pool, g.batch * bands, [&](int64_t task) {
    const int64_t first = task % bands * rows;
    grad_input_band(args, conv, task / bands, first, smaller(rows, g.h.in - first));
  });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
