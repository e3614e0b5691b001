#include "cpu/batch_norm.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/batch_norm_passes.h"
#include "cpu/out_of_memory.h"
#include "cpu/scratch.h"
#include "cpu/select.h"

namespace fusedcnn::cpu {
namespace {

constexpr int64_t kDouble = sizeof(double);

constexpr ThreadPool kInline = {[](int64_t tasks, void (*body)(int64_t, int64_t, void*),
                                   void* context) { body(0, tasks, context); }};

// ---- how the work is shared out: by sizes alone, never by threads -------------------------------

// The convolution alone, of some images.
Geometry dense(const Geometry& g, int64_t batch, bool undivided) {
  Geometry result = g;
  result.batch = batch;
  result.undivided = undivided;
  result.ceil_mode = false;
  for (Axis* axis : {&result.h, &result.w}) {
    axis->pool_kernel = axis->pool_stride = axis->pool_dilation = 1;
    axis->pool_padding = 0;
    axis->out = axis->conv;
  }
  return result;
}

Strides plane_strides(const Geometry& g) {
  return {g.h.conv * g.w.conv * g.out_channels, 1, g.w.conv * g.out_channels, g.out_channels};
}

// Bytes of one image's convolution output.
int64_t plane_bytes(const Geometry& g, DataType type) {
  const double bytes =
      double(g.h.conv) * double(g.w.conv) * double(g.out_channels) * double(element_size(type));
  if (bytes > 0x1p60) throw OutOfMemory(std::numeric_limits<int64_t>::max());
  return g.h.conv * g.w.conv * g.out_channels * element_size(type);
}

// Large batches are split into tasks of their own, which call kernels on one thread each. In small
// ones, or where each task would need large sums, one task leaves the threads to the kernels.
struct Tasks {
  static constexpr int64_t kMost = 16;
  static constexpr int64_t kMostBytes = int64_t{8} << 20;
  // Of a plane and the images that it comes from: half of the L2 cache that a core may have.
  static constexpr int64_t kChunkBytes = int64_t{1} << 20;

  int64_t batch;
  int64_t count;
  int64_t images;  // of a task; the last may have fewer
  int64_t chunk;   // images at a time

  // sums: bytes that each task needs.
  Tasks(const Geometry& g, DataType type, int64_t sums) : batch(g.batch) {
    count = std::min(kMost, batch);
    if (batch < kSmallBatch || count * sums > kMostBytes) count = 1;
    images = (batch + count - 1) / count;
    count = (batch + images - 1) / images;
    const int64_t bytes =
        plane_bytes(g, type) + g.in_channels * g.h.in * g.w.in * element_size(type);
    chunk = std::clamp<int64_t>(kChunkBytes / bytes, 1, images);
  }

  // body(task, first image, images, pool) for all chunks; those of a task one after another.
  template <typename Body>
  void run(const ThreadPool& pool, const Body& body) const {
    const auto walk = [&](int64_t task, const ThreadPool& inner) {
      const int64_t end = std::min(batch, (task + 1) * images);
      for (int64_t first = task * images; first < end; first += chunk) {
        body(task, first, std::min(chunk, end - first), inner);
      }
    };
    if (count == 1) return walk(0, pool);
    parallel_tasks(pool, count, [&](int64_t task) { walk(task, kInline); });
  }
};

// Rows of an image that a piece of work takes: all, or of few images a part.
struct Bands {
  int64_t count;

  explicit Bands(const Geometry& g)
      : count(g.batch < kSmallBatch ? std::min<int64_t>(4, g.h.out) : 1) {}

  int64_t begin(int64_t band, int64_t rows) const { return band * rows / count; }
};

// ---- memory -------------------------------------------------------------------------------------

template <typename T>
T* place(char*& memory, int64_t count) {
  T* result = reinterpret_cast<T*>(memory);
  memory += (count * int64_t{sizeof(T)} + 63) / 64 * 64;
  return result;
}

const void* at(const void* data, DataType type, int64_t elements) {
  return static_cast<const char*>(data) + elements * element_size(type);
}
void* at(void* data, DataType type, int64_t elements) {
  return static_cast<char*>(data) + elements * element_size(type);
}
// Codes are bytes or int32.
const void* code_at(const void* code, bool wide, int64_t elements) {
  return static_cast<const char*>(code) + elements * (wide ? 4 : 1);
}
void* code_at(void* code, bool wide, int64_t elements) {
  return code ? static_cast<char*>(code) + elements * (wide ? 4 : 1) : nullptr;
}

// [OC], all of them: what a pass is given, in statistics_type.
struct Constants {
  const NormPasses& passes;
  DataType type;
  int64_t channels;
  char*& memory;

  static int64_t bytes(int64_t channels) { return (channels * kDouble + 63) / 64 * 64; }

  void* put(const double* values) const {
    void* const result = place<double>(memory, channels);
    passes.store(statistics_type(type), values, channels, result);
    return result;
  }
};

// 1, or zero where `of` is null and `missing` says so.
void load_or(const NormPasses& passes, DataType type, const void* of, int64_t stride,
             double missing, int64_t channels, double* to) {
  if (of) return passes.load(type, of, stride, channels, to);
  std::fill_n(to, channels, missing);
}

// ---- weights ------------------------------------------------------------------------------------

// body(Bits{}) with the integer that holds an element's bits.
template <typename Body>
void with_bits(DataType type, const Body& body) {
  switch (element_size(type)) {
    case 2: return body(uint16_t{});
    case 4: return body(uint32_t{});
    default: return body(uint64_t{});
  }
}

// The weights without gaps, their sign changed where `negated`, in Slot::kNormWeights.
void negate_weight(ForwardArgs& args, const uint8_t* negated) {
  const Geometry& g = args.geometry;
  const Strides& s = args.weight_strides;
  const int64_t channels = g.in_channels_per_group(), all = channels * g.taps();
  void* const to = scratch(Slot::kNormWeights, g.out_channels * all * element_size(args.type));
  with_bits(args.type, [&]<typename Bits>(Bits) {
    const Bits* from = static_cast<const Bits*>(args.weight);
    Bits* out = static_cast<Bits*>(to);
    for (int64_t oc = 0; oc < g.out_channels; ++oc) {
      const Bits sign = negated[oc] ? static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1)) : 0;
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t h = 0; h < g.h.kernel; ++h) {
          for (int64_t w = 0; w < g.w.kernel; ++w) {
            *out++ = from[oc * s.n + c * s.c + h * s.h + w * s.w] ^ sign;
          }
        }
      }
    }
  });
  args.weight = to;
  args.weight_strides = {all, g.taps(), g.w.kernel, 1};
}

// Whether grad_input of the dense convolution is itself one, of the gradient: then the axis of that
// is `turned`.
bool turns(const Axis& axis) {
  return axis.stride == 1 && axis.padding < axis.extent() && axis.padding_after < axis.extent();
}

Axis turned(const Axis& axis) {
  Axis result = axis;
  result.in = axis.conv;
  result.conv = result.out = axis.in;
  result.padding = axis.extent() - 1 - axis.padding;
  result.padding_after = axis.extent() - 1 - axis.padding_after;
  return result;
}

// That convolution, of some images: input and output channels have changed places.
Geometry turned(const Geometry& g, int64_t images, bool undivided) {
  Geometry result = dense(g, images, undivided);
  std::swap(result.in_channels, result.out_channels);
  result.h = turned(result.h);
  result.w = turned(result.w);
  return result;
}

// Its weights: [C][OC / groups][KH][KW], the taps in reverse, in Slot::kNormWeights.
void turn_weight(const BackwardArgs& block, ForwardArgs& args) {
  const Geometry& g = block.geometry;
  const Strides& s = block.weight_strides;
  const int64_t in = g.in_channels_per_group(), out = g.out_channels_per_group();
  void* const to =
      scratch(Slot::kNormWeights, g.out_channels * in * g.taps() * element_size(block.type));
  with_bits(block.type, [&]<typename Bits>(Bits) {
    const Bits* from = static_cast<const Bits*>(block.weight);
    Bits* at = static_cast<Bits*>(to);
    for (int64_t c = 0; c < g.in_channels; ++c) {
      for (int64_t oc = c / in * out; oc < (c / in + 1) * out; ++oc) {
        for (int64_t h = g.h.kernel - 1; h >= 0; --h) {
          for (int64_t w = g.w.kernel - 1; w >= 0; --w) {
            *at++ = from[oc * s.n + c % in * s.c + h * s.h + w * s.w];
          }
        }
      }
    }
  });
  args.weight = to;
  args.weight_strides = {out * g.taps(), g.taps(), g.w.kernel, 1};
}

}  // namespace

// ---- forward ------------------------------------------------------------------------------------

namespace {

// Adds the moments of other outputs.
void merge(const Moments& other, Moments& into) {
  if (other.count == 0) return;
  if (into.count == 0) {
    into = other;
    return;
  }
  const double all = into.count + other.count, distance = other.mean - into.mean;
  into.squares += other.squares + distance * distance * (into.count * other.count / all);
  // Not the mean plus a part of the distance: between infinities of one sign that is NaN.
  into.mean = (into.count * into.mean + other.count * other.mean) / all;
  into.count = all;
}

bool any(const uint8_t* flags, int64_t count) {
  return std::any_of(flags, flags + count, [](uint8_t flag) { return flag; });
}

// The convolution of some images into `plane`, which is channels_last.
ForwardArgs plane_args(const ForwardArgs& block, int64_t first, int64_t images, bool undivided,
                       void* plane) {
  ForwardArgs args = block;
  args.geometry = dense(block.geometry, images, undivided);
  args.input = at(block.input, block.type, first * block.input_strides.n);
  args.bias = nullptr;
  args.output = plane;
  args.code = nullptr;
  args.wide_code = false;
  args.output_strides = plane_strides(block.geometry);
  args.relu = false;
  return args;
}

Problem plane_problem(const Geometry& g, DataType type, const Strides& input) {
  Problem problem{dense(g, g.batch, false), type, false, input.c == 1 && g.in_channels > 1};
  problem.relu = false;
  return problem;
}

// The windows' largest values and codes, and the moments of all outputs, through a plane in scratch
// memory. Returns the moments, [OC], in Slot::kNormSums.
const Moments* pool_planes(const NormPasses& passes, const ForwardArgs& block, void* extremum,
                           const uint8_t* ties, const ThreadPool& pool, ChooseKernel choose) {
  const Geometry& g = block.geometry;
  const NormShape shape{g, block.type, block.wide_code};
  const Kernel& kernel = choose(Pass::kForward, plane_problem(g, block.type, block.input_strides));
  const Tasks tasks(g, block.type, 0);
  const Bands bands(g);
  // A task's own; or of a single task one for each piece of a chunk, put together after it.
  const int64_t pieces = tasks.count == 1 ? tasks.chunk * bands.count : 0;
  const int64_t slots = tasks.count + pieces;
  auto* moments = static_cast<Moments*>(
      scratch(Slot::kNormSums, slots * g.out_channels * int64_t{sizeof(Moments)}));
  std::fill_n(moments, slots * g.out_channels, Moments{});
  const int64_t bytes = plane_bytes(g, block.type);
  tasks.run(pool, [&](int64_t task, int64_t first, int64_t images, const ThreadPool& inner) {
    char* const plane = static_cast<char*>(scratch(Slot::kNormPlane, images * bytes));
    kernel.forward(plane_args(block, first, images, tasks.count > 1, plane), inner);
    parallel_tasks(inner, images * bands.count, [&](int64_t piece) {
      const int64_t n = piece / bands.count, band = piece % bands.count;
      const int64_t slot = pieces ? tasks.count + piece : task;
      const int64_t image = (first + n) * block.output_strides.n;
      passes.pool(shape, {plane + n * bytes, 0, bands.begin(band, g.h.conv),
                          bands.begin(band + 1, g.h.conv), bands.begin(band, g.h.out),
                          bands.begin(band + 1, g.h.out), moments + slot * g.out_channels,
                          at(extremum, block.type, image),
                          code_at(block.code, block.wide_code, image), block.output_strides, ties});
    });
    for (int64_t i = 0; pieces && i < images * bands.count * g.out_channels; ++i) {
      Moments& piece = moments[tasks.count * g.out_channels + i];
      merge(piece, moments[i % g.out_channels]);
      piece = {};
    }
  });
  for (int64_t i = g.out_channels; i < tasks.count * g.out_channels; ++i) {
    merge(moments[i], moments[i % g.out_channels]);
  }
  return moments;
}

// The same through a kernel that convolves and pools in one pass, and takes the moments on the way.
const Moments* pool_directly(const Kernel& kernel, const Problem& problem, ForwardArgs block,
                             void* extremum, const ThreadPool& pool) {
  const int64_t slots = kernel.moment_slots(problem), channels = problem.geometry.out_channels;
  auto* const moments =
      static_cast<Moments*>(scratch(Slot::kNormSums, slots * channels * int64_t{sizeof(Moments)}));
  block.bias = nullptr;
  block.relu = false;
  block.output = extremum;
  block.moments = moments;
  kernel.forward(block, pool);
  for (int64_t i = channels; i < slots * channels; ++i) merge(moments[i], moments[i % channels]);
  return moments;
}

}  // namespace

void norm_forward(const NormForwardArgs& args, const ThreadPool& pool, ChooseKernel choose) {
  ForwardArgs block = args.block;
  const Geometry& g = block.geometry;
  const NormPasses& passes = *selected_isa().whole().list.norm;
  const int64_t channels = g.out_channels;
  char* memory = static_cast<char*>(scratch(Slot::kNormChannels, 11 * Constants::bytes(channels)));
  auto* negated = place<uint8_t>(memory, channels);
  auto* ties = place<uint8_t>(memory, channels);
  double *gamma = place<double>(memory, channels), *shift = place<double>(memory, channels);
  double *bias = place<double>(memory, channels), *mean = place<double>(memory, channels);
  double* rest = place<double>(memory, channels);
  const Affine& affine = args.affine;
  load_or(passes, affine.type, affine.weight, affine.weight_stride, 1, channels, gamma);
  load_or(passes, affine.type, affine.bias, affine.bias_stride, 0, channels, shift);
  load_or(passes, block.type, block.bias, block.bias_stride, 0, channels, bias);
  for (int64_t c = 0; c < channels; ++c) {
    negated[c] = gamma[c] < 0;
    ties[c] = gamma[c] == 0;
  }
  const bool negate = any(negated, channels);
  if (negate) negate_weight(block, negated);
  // Where no backward follows nobody keeps the largest values: they lie where the output will be.
  void* const extremum = args.extremum ? args.extremum : block.output;
  Problem problem{g, block.type, block.wide_code, block.input_strides.c == 1 && g.in_channels > 1};
  problem.relu = false;
  problem.moments = true;
  // Where all elements tie, the first wins, which only the pass over a plane can see to.
  const bool tie = any(ties, channels);
  const Moments* moments =
      !tie && select(Pass::kForward, problem)
          ? pool_directly(choose(Pass::kForward, problem), problem, block, extremum, pool)
          : pool_planes(passes, block, extremum, tie ? ties : nullptr, pool, choose);

  const DataType statistics = statistics_type(block.type);
  double* var = bias;
  for (int64_t c = 0; c < channels; ++c) {
    // A bias cancels, unless it is not finite.
    var[c] = moments[c].squares / moments[c].count + 0 * bias[c];
    mean[c] = negated[c] ? -moments[c].mean : moments[c].mean;
  }
  passes.store(statistics, mean, channels, args.mean);
  passes.store(statistics, var, channels, args.var);
  passes.load(statistics, args.mean, 1, channels, rest);
  for (int64_t c = 0; c < channels; ++c) {
    const double sign = negated[c] ? -1 : 1, rounded = rest[c];
    rest[c] = sign * (mean[c] - rounded);
    mean[c] = sign * rounded;
    gamma[c] = sign * gamma[c] / std::sqrt(var[c] + args.eps);
  }
  const Constants constants{passes, block.type, channels, memory};
  NormOutputArgs output{};
  output.strides = block.output_strides;
  output.mean = constants.put(mean);
  output.mean_rest = constants.put(rest);
  output.scale = constants.put(gamma);
  output.shift = constants.put(shift);
  output.negated = negate ? negated : nullptr;
  const NormShape shape{g, block.type, block.wide_code};
  const Bands bands(g);
  parallel_tasks(pool, g.batch * bands.count, [&](int64_t piece) {
    const int64_t band = piece % bands.count;
    const int64_t image = piece / bands.count * block.output_strides.n;
    NormOutputArgs part = output;
    part.out_begin = bands.begin(band, g.h.out);
    part.out_end = bands.begin(band + 1, g.h.out);
    part.extremum = at(extremum, block.type, image);
    part.output = at(block.output, block.type, image);
    part.code = code_at(block.code, block.wide_code, image);
    passes.output(shape, part);
  });
}

// ---- backward -----------------------------------------------------------------------------------

namespace {

// The sums of g and of g * (extremum - mean) over all live windows, [OC] each.
void pooled_sums(const NormPasses& passes, const NormBackwardArgs& args, const void* mean,
                 const ThreadPool& pool, double* grads, double* products) {
  const BackwardArgs& block = args.block;
  const Geometry& g = block.geometry;
  const NormShape shape{g, block.type, block.wide_code};
  const Bands bands(g);
  const int64_t count = std::min<int64_t>(Tasks::kMost, g.batch);
  const int64_t images = (g.batch + count - 1) / count, channels = g.out_channels;
  const int64_t slots = count * bands.count;
  auto* sums = static_cast<double*>(scratch(Slot::kNormSums, slots * 2 * channels * kDouble));
  std::fill_n(sums, slots * 2 * channels, 0.0);
  parallel_tasks(pool, slots, [&](int64_t slot) {
    const int64_t first = slot / bands.count * images, band = slot % bands.count;
    double* const own = sums + slot * 2 * channels;
    for (int64_t n = first; n < std::min(g.batch, first + images); ++n) {
      passes.sums(shape,
                  {bands.begin(band, g.h.out), bands.begin(band + 1, g.h.out),
                   at(block.grad_output, block.type, n * block.grad_output_strides.n),
                   block.grad_output_strides,
                   code_at(block.code, block.wide_code, n * block.code_strides.n),
                   block.code_strides, at(args.extremum, block.type, n * args.extremum_strides.n),
                   args.extremum_strides, mean, own, own + channels});
    }
  });
  std::fill_n(grads, channels, 0.0);
  std::fill_n(products, channels, 0.0);
  for (int64_t slot = 0; slot < slots; ++slot) {
    for (int64_t c = 0; c < channels; ++c) {
      grads[c] += sums[slot * 2 * channels + c];
      products[c] += sums[(slot * 2 + 1) * channels + c];
    }
  }
}

// What the gradient at the convolution's outputs is made of: see NormGradientArgs.
struct GradientConstants {
  const void *mean, *slope, *offset, *scale;
};

// The gradients of the convolution, of planes in scratch memory.
void plane_gradients(const NormPasses& passes, const NormBackwardArgs& args,
                     const GradientConstants& constants, const ThreadPool& pool,
                     ChooseKernel choose) {
  const BackwardArgs& block = args.block;
  const Geometry& g = block.geometry;
  const DataType type = block.type, statistics = statistics_type(type);
  const NormShape shape{g, type, block.wide_code};
  const bool want_weight = block.grad_weight, want_input = block.grad_input;
  const int64_t weights = g.out_channels * g.in_channels_per_group() * g.taps();
  const Tasks tasks(g, type, want_weight ? weights * element_size(statistics) : 0);
  const Bands bands(g);

  ForwardArgs forward{};
  forward.geometry = g;
  forward.type = type;
  forward.input = block.input;
  forward.input_strides = block.input_strides;
  forward.weight = block.weight;
  forward.weight_strides = block.weight_strides;
  const Kernel& convolution = choose(Pass::kForward, plane_problem(g, type, block.input_strides));
  Problem problem = plane_problem(g, type, block.input_strides);
  problem.relu = true;
  problem.dense = true;
  const Kernel* weight_kernel = want_weight ? &choose(Pass::kGradWeight, problem) : nullptr;
  // grad_input through a forward kernel, where it is a convolution itself.
  const bool turn = want_input && turns(g.h) && turns(g.w);
  const Kernel* input_kernel = nullptr;
  ForwardArgs turned_args{};
  if (turn) {
    Problem of_gradient{turned(g, g.batch, false), type, false, g.out_channels > 1};
    of_gradient.relu = false;
    input_kernel = &choose(Pass::kForward, of_gradient);
    turned_args.type = type;
    turned_args.input_strides = plane_strides(g);
    turned_args.output_strides = block.grad_input_strides;
    turned_args.relu = false;
    turn_weight(block, turned_args);
  } else if (want_input) {
    input_kernel = &choose(Pass::kGradInput, problem);
  }

  char* sums = nullptr;
  const int64_t sum_bytes = weights * element_size(statistics);
  if (want_weight) {
    sums = static_cast<char*>(scratch(Slot::kNormSums, tasks.count * sum_bytes));
    std::memset(sums, 0, tasks.count * sum_bytes);
  }
  const int64_t bytes = plane_bytes(g, type);
  static constexpr uint8_t kFirst = 0;  // of one element: every output has won its window
  tasks.run(pool, [&](int64_t task, int64_t first, int64_t images, const ThreadPool& inner) {
    char* const plane = static_cast<char*>(scratch(Slot::kNormPlane, images * bytes));
    convolution.forward(plane_args(forward, first, images, tasks.count > 1, plane), inner);
    parallel_tasks(inner, images * bands.count, [&](int64_t piece) {
      const int64_t n = piece / bands.count, band = piece % bands.count;
      passes.gradient(
          shape,
          {plane + n * bytes, 0, bands.begin(band, g.h.conv), bands.begin(band + 1, g.h.conv),
           at(block.grad_output, type, (first + n) * block.grad_output_strides.n),
           block.grad_output_strides,
           code_at(block.code, block.wide_code, (first + n) * block.code_strides.n),
           block.code_strides, constants.mean, constants.slope, constants.offset, constants.scale});
    });
    BackwardArgs backward = block;
    backward.geometry = dense(g, images, tasks.count > 1);
    backward.wide_code = false;
    backward.grad_output = plane;
    backward.grad_output_strides = plane_strides(g);
    backward.code = &kFirst;
    backward.code_strides = {0, 0, 0, 0};
    backward.input = at(block.input, type, first * block.input_strides.n);
    backward.grad_input = backward.grad_weight = backward.grad_bias = nullptr;
    if (want_weight) {
      char* const own = sums + task * sum_bytes;
      BackwardArgs weight_args = backward;
      weight_args.grad_weight_strides = {weights / g.out_channels, g.taps(), g.w.kernel, 1};
      weight_args.accumulate = weight_kernel->accumulates;
      weight_args.grad_weight = weight_kernel->accumulates
                                    ? own
                                    : scratch(Slot::kNormGradient, weights * element_size(type));
      weight_kernel->backward(weight_args, inner);
      if (!weight_kernel->accumulates) passes.add(type, weight_args.grad_weight, weights, own);
    }
    if (!want_input) return;
    void* const grad_input = at(block.grad_input, type, first * block.grad_input_strides.n);
    if (turn) {
      ForwardArgs images_args = turned_args;
      images_args.geometry = turned(g, images, tasks.count > 1);
      images_args.input = plane;
      images_args.output = grad_input;
      input_kernel->forward(images_args, inner);
    } else {
      backward.grad_input = grad_input;
      input_kernel->backward(backward, inner);
    }
  });
  if (!want_weight) return;
  parallel_tasks(pool, g.out_channels, [&](int64_t oc) {
    passes.weight(shape,
                  {sums, tasks.count, oc, oc + 1, block.grad_weight, block.grad_weight_strides});
  });
}

}  // namespace

void norm_backward(const NormBackwardArgs& args, const ThreadPool& pool, ChooseKernel choose) {
  const BackwardArgs& block = args.block;
  const Geometry& g = block.geometry;
  const DataType statistics = statistics_type(block.type);
  const NormPasses& passes = *selected_isa().whole().list.norm;
  const int64_t channels = g.out_channels;
  char* memory = static_cast<char*>(scratch(Slot::kNormChannels, 9 * Constants::bytes(channels)));
  double *mean = place<double>(memory, channels), *var = place<double>(memory, channels);
  double *gamma = place<double>(memory, channels), *grads = place<double>(memory, channels);
  double* products = place<double>(memory, channels);
  const Constants constants{passes, block.type, channels, memory};
  passes.load(statistics, args.mean, args.mean_stride, channels, mean);
  passes.load(statistics, args.var, args.var_stride, channels, var);
  load_or(passes, args.affine.type, args.affine.weight, args.affine.weight_stride, 1, channels,
          gamma);
  GradientConstants gradient{};
  gradient.mean = constants.put(mean);
  pooled_sums(passes, args, gradient.mean, pool, grads, products);

  const double count = double(g.batch) * double(g.h.conv) * double(g.w.conv);
  double *slope = mean, *scale = var;
  for (int64_t c = 0; c < channels; ++c) {
    const double invstd = 1 / std::sqrt(var[c] + args.eps);
    products[c] *= invstd;
    scale[c] = gamma[c] * invstd;
    slope[c] = -scale[c] * invstd * products[c] / count;
  }
  if (args.grad_bn_weight) passes.store(args.affine.type, products, channels, args.grad_bn_weight);
  if (args.grad_bn_bias) passes.store(args.affine.type, grads, channels, args.grad_bn_bias);
  if (!block.grad_weight && !block.grad_input) return;
  for (int64_t c = 0; c < channels; ++c) grads[c] *= -scale[c] / count;
  gradient.slope = constants.put(slope);
  gradient.offset = constants.put(grads);
  gradient.scale = constants.put(scale);
  plane_gradients(passes, args, gradient, pool, choose);
}

}  // namespace fusedcnn::cpu
