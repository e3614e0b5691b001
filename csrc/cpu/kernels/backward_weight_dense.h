// grad_weight and grad_bias of a convolution on its own, all of whose outputs have gradients: a
// product of matrices, [out channels][outputs] x [outputs][input channels x taps].
//
// A task owns the sums of a run of images for a block of output channels. Bands of outputs pass by,
// few enough for their gradients to stay in L1 while one tile of sums after another runs over them;
// the input is read where it is, whatever its strides, and widened before if need be.
// Where it has no pixels there are no products, so what is not finite goes where it should.
#pragma once

#include <type_traits>

#include "cpu/kernel.h"
#include "cpu/kernels/backward_weight_dense_tile.h"
#include "cpu/kernels/partials.h"
#include "cpu/kernels/patches.h"
#include "cpu/kernels/simd.h"
#include "cpu/kernels/window_range.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

// Outputs of a band: at up to 128 bytes of gradients each they leave some of a 48 KB L1, and sums
// are taken in chains no longer than this before they are added to what there is.
constexpr int64_t kDenseOutputs = 256;

// The outputs whose tap lies inside the input, of those from 0 to `count`: [begin, end). first:
// where output 0's tap lies.
FUSEDCNN_INLINE void inside_input(const Axis& axis, int64_t first, int64_t count, int64_t& begin,
                                  int64_t& end) {
  begin = first < 0 ? (-first + axis.stride - 1) / axis.stride : 0;
  const int64_t left = axis.in - first;
  end = left > 0 ? smaller(count, (left + axis.stride - 1) / axis.stride) : 0;
}

// body(first tap, taps) for the runs of a row's taps that see a pixel at neighbouring outputs:
// those `apart` from each other, at most a tile's.
template <typename Body>
FUSEDCNN_INLINE void for_tap_runs(int64_t kernel, int64_t apart, const Body& body) {
  for (int64_t k = 0; k < smaller(apart, kernel); ++k) {
    int64_t left = (kernel - k + apart - 1) / apart;
    for (int64_t first = k; left > 0;) {
      // 3 and 1 take more loads than 2 and 2.
      const int64_t taps = left == 4 ? 2 : smaller<int64_t>(left, kDenseTaps);
      body(first, taps);
      first += taps * apart;
      left -= taps;
    }
  }
}

template <typename S>
struct DenseGradWeight {
  using T = Accumulator<S>;
  static constexpr int kN = kLanes<T>;

  const BackwardArgs& args;
  const Geometry& g;
  int64_t products;  // input channels x taps; 0: grad_bias alone
  int64_t lanes;     // output channels in whole vectors
  int64_t blocks;    // of output channels

  explicit DenseGradWeight(const BackwardArgs& args) : args(args), g(args.geometry) {
    products = args.grad_weight ? g.in_channels * g.taps() : 0;
    lanes = round_up(g.out_channels, kN);
    blocks = (lanes + kBlock - 1) / kBlock;
  }

  // Output channels of a block, but for the last one.
  static constexpr int64_t kBlock = kDenseVectors * kN;
  int64_t block_lanes(int64_t block) const { return smaller(kBlock, lanes - block * kBlock); }

  // Sums of a block: [in channels][taps][block's lanes], and the bias's behind them.
  int64_t size() const { return lanes * (products + 1); }
  int64_t block_at(int64_t block) const { return block * kBlock * (products + 1); }

  struct Image {
    const T* data;
    Strides strides;
  };

  // Image n where it is, or widened into scratch, [H][W][C].
  Image image(int64_t n) const {
    const Strides from = args.input_strides;
    const S* const data = static_cast<const S*>(args.input) + n * from.n;
    if constexpr (std::is_same_v<S, T>) {
      return {data, from};
    } else {
      const Strides to{0, 1, g.w.in * g.in_channels, g.in_channels};
      T* const wide = static_cast<T*>(scratch(Slot::kPlanes, g.h.in * to.h * sizeof(T)));
      for (int64_t y = 0; y < g.h.in; ++y) {
        read_pixels(data + y * from.h, from, wide + y * to.h, to.w, g.w.in, g.in_channels);
      }
      return {wide, to};
    }
  }

  // Some rows of outputs, or a part of one.
  struct Band {
    int64_t row, rows, col, cols;
  };

  // [outputs][pixel], a block's channels of a band's gradients: where they are, or in scratch.
  struct Gradient {
    const T* data;
    int64_t pixel;
  };

  Gradient gradient(int64_t n, const Band& band, int64_t block) const {
    const int64_t channels = g.out_channels, first = block * kBlock, width = block_lanes(block);
    const S* from = static_cast<const S*>(args.grad_output) +
                    ((n * g.h.conv + band.row) * g.w.conv + band.col) * channels + first;
    // Several blocks' gradients would meet in few sets of L1.
    if constexpr (std::is_same_v<S, T>) {
      if (channels == width) return {from, channels};
    }
    const int64_t pixels = band.rows * band.cols;
    T* const data = static_cast<T*>(scratch(Slot::kGradient, pixels * width * sizeof(T)));
    const int64_t given = smaller(width, channels - first), whole = given / kN * kN;
    for (int64_t p = 0; p < pixels; ++p, from += channels) {
      T* const to = data + p * width;
      for (int64_t c = 0; c < whole; c += kN) convert_run(from + c, to + c, kN);
      if (whole == width) continue;
      convert_run(from + whole, to + whole, given - whole);
      memset(to + given, 0, (width - given) * sizeof(T));
    }
    return {data, width};
  }

  // Adds a band to the bias's sums.
  void add_bias(const Gradient& gradient, int64_t outputs, int64_t width, T* sums) const {
    for (int64_t c = 0; c < width; c += kN) {
      Vector<T> sum = {};
      const T* from = gradient.data + c;
      for (int64_t p = 0; p < outputs; ++p, from += gradient.pixel) sum += load(from);
      store(sums + c, load(sums + c) + sum);
    }
  }

  // Adds a band to the block's sums.
  void add_band(const Image& x, const Gradient& gradient, const Band& band, int64_t width,
                T* sums) const {
    const int64_t apart = g.w.stride % g.w.dilation == 0 ? g.w.stride / g.w.dilation : g.w.kernel;
    DenseRows<T> of;
    of.input_row = g.h.stride * x.strides.h;
    of.input_channel = x.strides.c;
    of.input_place = g.w.stride * x.strides.w;
    of.gradient_row = band.cols * gradient.pixel;
    of.gradient_pixel = gradient.pixel;
    of.width = band.cols;
    // Of nearly equal sizes.
    const int64_t parts = (g.in_channels + kDenseChannels - 1) / kDenseChannels;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t c = part * g.in_channels / parts;
      const int64_t channels = (part + 1) * g.in_channels / parts - c;
      for (int64_t kh = 0; kh < g.h.kernel; ++kh) {
        const int64_t y = kh * g.h.dilation - g.h.padding;
        int64_t begin, end;
        inside_input(g.h, y, g.h.conv, begin, end);
        begin = larger(begin, band.row);
        of.rows = smaller(end, band.row + band.rows) - begin;
        if (of.rows < 1) continue;
        of.gradient = gradient.data + (begin - band.row) * of.gradient_row;
        const T* const row = x.data + c * x.strides.c + (begin * g.h.stride + y) * x.strides.h;
        for_tap_runs(g.w.kernel, apart, [&](int64_t kw, int64_t taps) {
          const int64_t at = band.col * g.w.stride + kw * g.w.dilation - g.w.padding;
          inside_input(g.w, at, band.cols + taps - 1, of.begin, of.end);
          if (of.begin >= of.end) return;
          of.input = row + (of.begin * g.w.stride + at) * x.strides.w;
          T* const to = sums + ((c * g.h.kernel + kh) * g.w.kernel + kw) * width;
          with_constant<kDenseVectors>(width / kN, [&]<int V>() {
            with_constant<kDenseChannels>(channels, [&]<int J>() {
              with_constant<kDenseTaps>(taps, [&]<int K>() {
                add_dense_rows<T, V, J, K>(of, to, g.taps() * width, apart * width);
              });
            });
          });
        });
      }
    }
  }

  // Adds the images [begin, end) to a block's sums.
  void add_images(int64_t begin, int64_t end, int64_t block, T* sums) const {
    const int64_t width = block_lanes(block);
    memset(sums, 0, width * (products + 1) * sizeof(T));
    const int64_t rows = larger<int64_t>(1, kDenseOutputs / g.w.conv);
    const int64_t cols = smaller(g.w.conv, kDenseOutputs);
    for (int64_t n = begin; n < end; ++n) {
      const Image x = products ? image(n) : Image{};
      for (int64_t row = 0; row < g.h.conv; row += rows) {
        for (int64_t col = 0; col < g.w.conv; col += cols) {
          const Band band{row, smaller(rows, g.h.conv - row), col, smaller(cols, g.w.conv - col)};
          const Gradient of_band = gradient(n, band, block);
          if (args.grad_bias) {
            add_bias(of_band, band.rows * band.cols, width, sums + products * width);
          }
          if (products) add_band(x, of_band, band, width, sums);
        }
      }
    }
  }

  // What is there already, to which a call may add, has the accumulation type.
  template <typename To>
  void put(T sum, To* to) const {
    if constexpr (std::is_same_v<To, T>) {
      *to = args.accumulate ? *to + sum : sum;
    } else {
      *to = narrow<To>(sum);
    }
  }

  template <typename To>
  void write(const T* sums, int64_t block) const {
    constexpr int64_t kPiece = 64;
    const int64_t width = block_lanes(block), first = block * kBlock;
    const int64_t given = smaller(width, g.out_channels - first);
    const Strides s = args.grad_weight_strides;
    const bool contiguous = s.w == 1 && s.h == g.w.kernel && s.c == g.taps();
    To* const weight = static_cast<To*>(args.grad_weight) + first * s.n;
    for (int64_t k = 0; k < products; k += kPiece) {
      T turned[kBlock * kPiece];
      const int64_t count = smaller(kPiece, products - k);
      transpose_matrix(sums + k * width, width, turned, kPiece, count, given);
      for (int64_t oc = 0; oc < given; ++oc) {
        const T* const from = turned + oc * kPiece;
        To* const to = weight + oc * s.n;
        if (contiguous) {
          for (int64_t i = 0; i < count; ++i) put(from[i], to + k + i);
          continue;
        }
        for (int64_t i = 0; i < count; ++i) {
          const int64_t c = (k + i) / g.taps(), tap = (k + i) % g.taps();
          put(from[i], to + c * s.c + tap / g.w.kernel * s.h + tap % g.w.kernel * s.w);
        }
      }
    }
    if (args.grad_bias) {
      convert_run(sums + products * width, static_cast<S*>(args.grad_bias) + first, given);
    }
  }
};

inline const char* why_not_grad_weight_dense(const Problem& problem) {
  if (!problem.dense) return "only for gradients of all of a convolution's outputs";
  return problem.geometry.groups == 1 ? nullptr : "without groups";
}

template <typename S>
void grad_weight_dense(const BackwardArgs& args, const ThreadPool& pool) {
  using T = Accumulator<S>;
  const DenseGradWeight<S> dense(args);
  const int64_t size = dense.size();
  // A caller that adds call to call has few images in each.
  Partials partials(args.geometry.batch, size * sizeof(T));
  if (args.accumulate) partials = Partials(args.geometry.batch, Partials::kMostBytes);
  T* const sums = static_cast<T*>(scratch(Slot::kPartials, partials.count * size * sizeof(T)));
  parallel_tasks(pool, partials.count * dense.blocks, [&](int64_t task) {
    const int64_t partial = task / dense.blocks, block = task % dense.blocks;
    dense.add_images(partials.begin(partial), partials.begin(partial + 1), block,
                     sums + partial * size + dense.block_at(block));
  });
  partials.add_up(pool, sums, size);
  parallel_tasks(pool, dense.blocks, [&](int64_t block) {
    const T* const of_block = sums + dense.block_at(block);
    args.accumulate ? dense.template write<T>(of_block, block)
                    : dense.template write<S>(of_block, block);
  });
}

inline void grad_weight_dense(const BackwardArgs& given, const ThreadPool& pool) {
  BackwardArgs args = given;
  const Geometry& g = given.geometry;
  if (args.accumulate) {
    args.grad_weight_strides = {g.in_channels * g.taps(), g.taps(), g.w.kernel, 1};
  }
  args = laid_down(args);
  for_storage(args.type, [&]<typename S>(S) { grad_weight_dense<S>(args, pool); });
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
