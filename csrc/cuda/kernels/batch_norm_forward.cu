// The forward of a block with batch normalisation around the stock convolution (core/batch_norm.h).
//
// 1. One pass over the plane: each window's extremum and its code, and the moments of each tile's
//    part of a channel. The plane is parted into cells, one of each window: what lies from the
//    window's begin to the next one's, so that windows may overlap or leave gaps. Where they do
//    neither, an element is met once, as part of both.
// 2. The tiles' moments put together: mean and variance, and what step 3 needs of a channel.
// 3. One pass over the pooled values: normalised, ReLU, and codes where that is off.
//
// Of a window of 2x2 in a half type step 1 moves 8 bytes in and 3 out, step 3 then 3 and 3: 17
// bytes where the stock layers move 42.
//
// Moments are sums of distances from an element of the tile, and of their squares: as exact as
// Welford's for any offset, since no element is further from a tile's mean than sqrt(n - 1) of its
// standard deviations.

#include "cuda/batch_norm.h"
#include "cuda/kernels/batch_norm_sums.h"

namespace fusedcnn::cuda {
namespace {

struct NormSizes {
  PoolSizes pool;
  Sharing sharing;
  int64_t parts;           // of each channel's moments: tiles
  bool cells_are_windows;  // but for what no window sees at the far ends
  bool windows_may_be_empty;
  bool own_affine;  // bn_weight and bn_bias have the block's type
};

// ---- 1 ------------------------------------------------------------------------------------------

// The first element of window o's cell along an axis, and the first that belongs to no cell before.
FUSEDCNN_DEVICE int cell_begin(const PoolAxis& axis, int o) {
  if (o >= axis.out) return axis.conv;
  const int begin = o == 0 ? 0 : o * axis.stride - axis.padding;
  return begin < 0 ? 0 : begin < axis.conv ? begin : axis.conv;
}
// Elements in the cells before that of a pooled pixel, row by row.
FUSEDCNN_DEVICE int64_t elements_before(const PoolSizes& sizes, int64_t pixel) {
  const int row = static_cast<int>(pixel / sizes.w.out);
  const int column = static_cast<int>(pixel % sizes.w.out);
  const int begin = cell_begin(sizes.h, row), end = cell_begin(sizes.h, row + 1);
  return int64_t{begin} * sizes.w.conv + int64_t{end - begin} * cell_begin(sizes.w, column);
}

// body(row and column, elements of V channels) for all of a rectangle; `from` is its first element.
template <int V, typename S, typename Body>
FUSEDCNN_DEVICE void for_elements(const S* from, int rows, int columns, int64_t row_step,
                                  int64_t column_step, const Body& body) {
  constexpr int kAtOnce = 4;
  const int64_t next_row = row_step - (columns - 1) * column_step;
  const int count = rows * columns;
  Pixel at{0, 0};
  for (int done = 0; done < count; done += kAtOnce) {
    Pack<V, S> elements[kAtOnce];
    Pixel places[kAtOnce];
    FUSEDCNN_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      elements[i] = {};
      if (done + i < count) elements[i] = load_pack<V>(from);
      places[i] = at;
      const bool last = ++at.column == columns;
      if (last) ++at.row, at.column = 0;
      from += last ? next_row : column_step;
    }
    FUSEDCNN_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (done + i < count) body(places[i], elements[i]);
    }
  }
}

// What distances are measured from: an element in the middle of a tile, where it is finite.
template <int V, typename S>
FUSEDCNN_DEVICE void load_origin(const PoolSizes& sizes, const Tile& tile, const S* plane,
                                 Accumulator<S> (&to)[V]) {
  const Pixel middle = pixel_of(sizes.tiles, tile, tile.pixels / 2);
  const int row = cell_begin(sizes.h, middle.row), column = cell_begin(sizes.w, middle.column);
  const int64_t at = (row < sizes.h.conv ? row : 0) * sizes.plane.row +
                     (column < sizes.w.conv ? column : 0) * sizes.plane.column;
  const Pack<V, S> elements = load_pack<V>(plane + at);
  FUSEDCNN_UNROLL
  for (int v = 0; v < V; ++v) {
    const Accumulator<S> value = widen(elements.values[v]);
    to[v] = value - value == 0 ? value : 0;
  }
}

// What a thread keeps of V channels.
template <typename T, int V>
struct Met {
  T origin[V], sum[V], squares[V];
  T sign[V];  // -1 where the least element is looked for
  T best[V];  // times the sign
  int code[V];

  template <typename S>
  FUSEDCNN_DEVICE void add(const Pack<V, S>& elements) {
    FUSEDCNN_UNROLL
    for (int v = 0; v < V; ++v) {
      const T distance = widen(elements.values[v]) - origin[v];
      sum[v] += distance;
      squares[v] = multiply_add(distance, distance, squares[v]);
    }
  }
  FUSEDCNN_DEVICE void begin_window(int first) {
    FUSEDCNN_UNROLL
    for (int v = 0; v < V; ++v) best[v] = -infinity<T>(), code[v] = first;
  }
  template <typename S>
  FUSEDCNN_DEVICE void pool(const Pack<V, S>& elements, int number) {
    FUSEDCNN_UNROLL
    for (int v = 0; v < V; ++v) {
      const T value = sign[v] * widen(elements.values[v]);
      // NaN beats everything, a later NaN too, as in torch.
      if (value > best[v] || value != value) best[v] = value, code[v] = number;
    }
  }
};

// `Crosses`: of a channels_last plane, to outputs and codes in planes of channels.
template <typename S, typename C, int V, bool Crosses>
FUSEDCNN_KERNEL_RESIDENT(kLibraryThreads, 2)
batch_norm_pool_kernel(NormForwardArgs args, NormSizes all, Moments* parts) {
  using T = Accumulator<S>;
  const PoolSizes& sizes = all.pool;
  const Tiles& tiles = sizes.tiles;
  const int tile_channels = V << tiles.channel_bits, pitch = (1 << tiles.pixel_bits) + 1;
  const Lanes lanes = lanes_of<V>(all.sharing);
  SharedMemory memory;
  const Shared<S> values = memory.array<S>(Crosses ? tile_channels * pitch : 0);
  const Shared<C> codes = memory.array<C>(Crosses ? tile_channels * pitch : 0);
  const Shared<T> sums = memory.array<T>(tile_channels * lanes.rows);
  const Shared<T> squares = memory.array<T>(tile_channels * lanes.rows);
  S* const extremum = static_cast<S*>(args.extremum ? args.extremum : args.block.output);
  C* const code = static_cast<C*>(args.block.code);
  const Strides& to = args.block.output_strides;

  for (int64_t task = block_index(); task < tiles.tasks; task += grid_blocks()) {
    const Tile tile = tile_of<V>(tiles, task);
    const S* const image = static_cast<const S*>(args.block.plane) + tile.n * sizes.plane.image +
                           tile.channel * sizes.plane.channel;
    int pixel_at = -1;
    Window window{};
    int64_t cell = 0;  // its first element
    int cell_rows = 0, cell_columns = 0;
    for (int group = 0; group < tile.channels; group += lanes.channel_step) {
      const int c = group + lanes.channel;
      const bool real = c < tile.channels;
      const S* const plane = image + (real ? c : 0) * sizes.plane.channel;
      Met<T, V> met;
      uint32_t zeros = 0;  // the channels whose elements all tie
      load_origin<V>(sizes, tile, plane, met.origin);
      FUSEDCNN_UNROLL
      for (int v = 0; v < V; ++v) {
        const int64_t channel = tile.channel + (real ? c : 0) + v;
        const T factor = load_affine<S>(all.own_affine, args.affine.weight,
                                        channel * args.affine.weight_stride, T(1));
        met.sign[v] = factor < 0 ? T(-1) : T(1);
        if (factor == 0) zeros |= 1u << v;
        met.sum[v] = met.squares[v] = 0;
      }
      for (int p = lanes.pixel; real && p < tile.pixels; p += lanes.pixel_step) {
        if (p != pixel_at) {
          pixel_at = p;
          const Pixel pixel = pixel_of(tiles, tile, p);
          window = window_of(sizes, pixel);
          const int row = cell_begin(sizes.h, pixel.row);
          const int column = cell_begin(sizes.w, pixel.column);
          cell_rows = cell_begin(sizes.h, pixel.row + 1) - row;
          cell_columns = cell_begin(sizes.w, pixel.column + 1) - column;
          cell = row * sizes.plane.row + column * sizes.plane.column;
        }
        const int64_t row_step = sizes.plane.row, column_step = sizes.plane.column;
        met.begin_window(window.first);
        if (all.cells_are_windows) {
          for_elements<V>(plane + cell, cell_rows, cell_columns, row_step, column_step,
                          [&](Pixel at, const Pack<V, S>& elements) {
                            met.add(elements);
                            if (at.row < window.rows && at.column < window.columns) {
                              met.pool(elements, at.row * sizes.w.kernel + at.column);
                            }
                          });
        } else {
          for_elements<V>(plane + cell, cell_rows, cell_columns, row_step, column_step,
                          [&](Pixel, const Pack<V, S>& elements) { met.add(elements); });
          for_elements<V>(plane + window.offset, window.rows, window.columns,
                          dilation(sizes.h) * row_step, dilation(sizes.w) * column_step,
                          [&](Pixel at, const Pack<V, S>& elements) {
                            met.pool(elements, window.first + at.row * sizes.w.kernel + at.column);
                          });
        }
        const bool empty = window.rows * window.columns == 0;
        Pack<V, S> value;
        Pack<V, C> winner;
        FUSEDCNN_UNROLL
        for (int v = 0; v < V; ++v) {
          value.values[v] = narrow<S>(met.sign[v] * met.best[v]);
          winner.values[v] = static_cast<C>(empty ? -1 : met.code[v]);
          if (zeros >> v & 1 && !empty) {
            value.values[v] = plane[window.offset + v * sizes.plane.channel];
            winner.values[v] = static_cast<C>(window.first);
          }
        }
        if constexpr (Crosses) {
          FUSEDCNN_UNROLL
          for (int v = 0; v < V; ++v) {
            values[(c + v) * pitch + p] = value.values[v];
            codes[(c + v) * pitch + p] = winner.values[v];
          }
        } else {
          const int64_t at = tile.n * to.n + (tile.channel + c) * to.c + (tile.pixel + p) * to.w;
          store_pack(extremum + at, value);
          if (code) store_pack(code + at, winner);
        }
      }
      hand_in(lanes, c, real, met.sum, sums);
      hand_in(lanes, c, real, met.squares, squares);
    }
    sync_threads();
    const int64_t count =
        elements_before(sizes, tile.pixel + tile.pixels) - elements_before(sizes, tile.pixel);
    const double each = 1 / static_cast<double>(count);
    for (int c = thread_index(); c < tile.channels; c += kLibraryThreads) {
      T origin[1];
      load_origin<1>(sizes, tile, image + c * sizes.plane.channel, origin);
      const double sum = sum_of_rows(sums, c, lanes.rows);
      const double beyond = sum_of_rows(squares, c, lanes.rows) - sum * sum * each;
      Moments moments{static_cast<double>(count), origin[0] + sum * each, beyond};
      if (beyond < 0) moments.squares = 0;  // by rounding
      if (count == 0) moments = {0, 0, 0};
      parts[(tile.channel + c) * all.parts + part_of(tiles, tile)] = moments;
    }
    if constexpr (Crosses) {
      const int p = thread_index() & ((1 << tiles.pixel_bits) - 1);
      for (int c = thread_index() >> tiles.pixel_bits; p < tile.pixels && c < tile.channels;
           c += kLibraryThreads >> tiles.pixel_bits) {
        const int64_t at = tile.n * to.n + (tile.channel + c) * to.c + tile.pixel + p;
        extremum[at] = values[c * pitch + p];
        if (code) code[at] = codes[c * pitch + p];
      }
    }
    sync_threads();  // the next tile overwrites this one
  }
}

// ---- 2 ------------------------------------------------------------------------------------------

// A block puts the moments of a channel's parts together: around their common mean, which comes
// first. numbers: mean, scale and shift of each channel.
template <typename S>
FUSEDCNN_KERNEL(kLibraryThreads)
batch_norm_statistics_kernel(NormForwardArgs args, const Moments* parts, int64_t count,
                             double per_output, bool own, Accumulator<S>* numbers) {
  using T = Accumulator<S>;
  SharedMemory memory;
  const Shared<double> warps = memory.array<double>(kLibraryThreads / kWarp);
  const int64_t channels = args.block.geometry.out_channels;
  for (int64_t channel = block_index(); channel < channels; channel += grid_blocks()) {
    const Moments* const its = parts + channel * count;
    double sum = 0, squares = 0;
    for (int64_t i = thread_index(); i < count; i += kLibraryThreads) {
      sum += its[i].count * its[i].mean;
    }
    double mean = sum_over_block(sum, warps) * per_output;
    for (int64_t i = thread_index(); i < count; i += kLibraryThreads) {
      const double distance = its[i].mean - mean;
      squares += its[i].squares + its[i].count * distance * distance;
    }
    double var = sum_over_block(squares, warps) * per_output;
    if (thread_index() != 0) continue;
    if (args.block.bias) {
      const S* const bias =
          static_cast<const S*>(args.block.bias) + channel * args.block.bias_stride;
      const T nothing = widen(load_constant(bias)) * 0;  // NaN where it is not finite
      mean += nothing, var += nothing;
    }
    const T weight =
        load_affine<S>(own, args.affine.weight, channel * args.affine.weight_stride, T(1));
    static_cast<T*>(args.mean)[channel] = static_cast<T>(mean);
    static_cast<T*>(args.var)[channel] = static_cast<T>(var);
    T* const to = numbers + channel * kNumbers;
    to[0] = static_cast<T>(mean);
    to[1] = static_cast<T>(weight / square_root(var + args.eps));
    to[2] = load_affine<S>(own, args.affine.bias, channel * args.affine.bias_stride, T(0));
    to[3] = 0;
  }
}

// ---- 3 ------------------------------------------------------------------------------------------

template <typename S, typename C, int V>
FUSEDCNN_KERNEL(kLibraryThreads)
batch_norm_output_kernel(NormForwardArgs args, NormSizes all, const Accumulator<S>* numbers) {
  using T = Accumulator<S>;
  const PoolSizes& sizes = all.pool;
  const Tiles& tiles = sizes.tiles;
  const Lanes lanes = lanes_of<V>(all.sharing);
  S* const output = static_cast<S*>(args.block.output);
  const S* const extremum = args.extremum ? static_cast<const S*>(args.extremum) : output;
  C* const code = static_cast<C*>(args.block.code);
  const Strides& to = args.block.output_strides;
  for (int64_t task = block_index(); task < tiles.tasks; task += grid_blocks()) {
    const Tile tile = tile_of<V>(tiles, task);
    for (int c = lanes.channel; c < tile.channels; c += lanes.channel_step) {
      T its[V][kNumbers];
      FUSEDCNN_UNROLL
      for (int v = 0; v < V; ++v) load_numbers(numbers, tile.channel + c + v, its[v]);
      for (int p = lanes.pixel; p < tile.pixels; p += lanes.pixel_step) {
        const int64_t at = tile.n * to.n + (tile.channel + c) * to.c + (tile.pixel + p) * to.w;
        bool empty = false;
        if (all.windows_may_be_empty) {
          const Window window = window_of(sizes, pixel_of(tiles, tile, p));
          empty = window.rows * window.columns == 0;
        }
        Pack<V, S> values = load_pack<V>(extremum + at);
        Pack<V, C> codes{};
        if (code) codes = load_pack<V>(code + at);
        FUSEDCNN_UNROLL
        for (int v = 0; v < V; ++v) {
          T value = multiply_add(widen(values.values[v]) - its[v][0], its[v][1], its[v][2]);
          const bool off = value <= 0;  // false for NaN, which ReLU lets through
          if (off) value = 0;
          if (off) codes.values[v] = kOff<C>;
          // ReLU comes before the pool: a window without elements keeps its -infinity.
          values.values[v] = narrow<S>(empty ? -infinity<T>() : value);
          if (empty) codes.values[v] = kOff<C>;
        }
        store_pack(output + at, values);
        if (code) store_pack(code + at, codes);
      }
    }
  }
}

// ---- host ---------------------------------------------------------------------------------------

bool cell_is_window(const Axis& axis) {
  return axis.pool_padding == 0 && (axis.pool_kernel == 1 || axis.pool_dilation == 1) &&
         (axis.out == 1 || axis.pool_kernel == axis.pool_stride);
}

// Whether vectors of 16 bytes of channels can be loaded and stored.
template <typename S, typename C>
bool in_vectors(const NormForwardArgs& args) {
  if constexpr (sizeof(C) != 1) return false;
  constexpr int64_t kSize = sizeof(S), kV = kVector<S>;
  const Strides& to = args.block.output_strides;
  const auto fits = [&](const void* values) {
    return to.c != 1 || aligned(values, kSize, 16, {to.n, to.w});
  };
  return args.block.geometry.out_channels % kV == 0 && fits(args.block.output) &&
         fits(args.extremum) && aligned(args.block.plane, kSize, 16, {}) &&
         (to.c != 1 || aligned(args.block.code, 1, kV, {to.n, to.w}));
}

bool crosses(const NormForwardArgs& args) {
  return args.block.plane_channels_last && args.block.output_strides.c != 1;
}

NormSizes sizes_of(const NormForwardArgs& args, bool along_channels, int vector, int channel_bits,
                   int bits) {
  const Geometry& g = args.block.geometry;
  NormSizes sizes{};
  sizes.pool = {pool_axis(g.h), pool_axis(g.w), plane_steps(g, args.block.plane_channels_last),
                tiles_of(g.batch, g.out_channels, g.h.out, g.w.out, vector, channel_bits, bits)};
  const Tiles& tiles = sizes.pool.tiles;
  sizes.sharing = {along_channels, along_channels ? tiles.channel_bits : tiles.pixel_bits};
  sizes.parts = parts_of(tiles, g.batch);
  sizes.cells_are_windows = cell_is_window(g.h) && cell_is_window(g.w);
  sizes.own_affine = own_affine(args.affine, args.block.type);
  sizes.windows_may_be_empty = g.h.pool_dilation > 1 || g.w.pool_dilation > 1;
  return sizes;
}

// Eight elements a thread, or four vectors where they do not cross over.
NormSizes pool_sizes(const NormForwardArgs& args, int vector) {
  const int vector_bits = bits_for(vector, 3), bits = kThreadBits + 3 - vector_bits;
  if (!args.block.plane_channels_last) return sizes_of(args, false, 1, kChannelBits - 1, bits);
  if (crosses(args)) return sizes_of(args, true, vector, kChannelBits - vector_bits, bits);
  return sizes_of(args, true, vector, kChannelBits, vector == 1 ? bits : kThreadBits + 2);
}
NormSizes output_sizes(const NormForwardArgs& args, int vector) {
  const bool along_channels = args.block.output_strides.c == 1;
  const int bits = kThreadBits + (vector == 1 ? 3 : 2);
  return sizes_of(args, along_channels, vector, kChannelBits - !along_channels, bits);
}

template <typename S, typename C, int V>
void launch_pool(const NormForwardArgs& args, Moments* parts, const Execution& execution) {
  const NormSizes sizes = pool_sizes(args, V);
  const Tiles& tiles = sizes.pool.tiles;
  const int64_t channels = int64_t{V} << tiles.channel_bits;
  const int64_t crossing = crosses(args) ? channels * ((int64_t{1} << tiles.pixel_bits) + 1) : 0;
  const int64_t shared = shared_bytes<S>(crossing) + shared_bytes<C>(crossing) +
                         2 * shared_bytes<Accumulator<S>>(channels * sizes.sharing.rows());
  const auto run = [&](auto* kernel) {
    launch("batch_norm_pool", kernel, blocks_for(tiles.tasks), kLibraryThreads, shared, execution,
           args, sizes, parts);
  };
  crosses(args) ? run(batch_norm_pool_kernel<S, C, V, true>)
                : run(batch_norm_pool_kernel<S, C, V, false>);
}

template <typename S, typename C, int V>
void launch_output(const NormForwardArgs& args, const Accumulator<S>* numbers,
                   const Execution& execution) {
  const NormSizes sizes = output_sizes(args, V);
  launch("batch_norm_output", batch_norm_output_kernel<S, C, V>, blocks_for(sizes.pool.tiles.tasks),
         kLibraryThreads, 0, execution, args, sizes, numbers);
}

template <typename S, typename C>
void forward_typed(const NormForwardArgs& args, const Execution& execution) {
  using T = Accumulator<S>;
  constexpr int kV = sizeof(C) == 1 ? kVector<S> : 1;
  const Geometry& g = args.block.geometry;
  T* const numbers = static_cast<T*>(execution.workspace);
  auto* const parts = reinterpret_cast<Moments*>(static_cast<char*>(execution.workspace) +
                                                 numbers_bytes(g, args.block.type));
  const bool vectors = in_vectors<S, C>(args);
  const bool pool_vectors = vectors && args.block.plane_channels_last;
  pool_vectors ? launch_pool<S, C, kV>(args, parts, execution)
               : launch_pool<S, C, 1>(args, parts, execution);
  launch("batch_norm_statistics", batch_norm_statistics_kernel<S>, blocks_for(g.out_channels),
         kLibraryThreads, shared_bytes<double>(kLibraryThreads / kWarp), execution, args, parts,
         pool_sizes(args, pool_vectors ? kV : 1).parts, per_output(g),
         own_affine(args.affine, args.block.type), numbers);
  const bool output_vectors = vectors && args.block.output_strides.c == 1;
  output_vectors ? launch_output<S, C, kV>(args, numbers, execution)
                 : launch_output<S, C, 1>(args, numbers, execution);
}

// body(S{}, C{}) with the block's storage type and that of its codes.
template <typename Body>
void for_types(const ForwardArgs& args, const Body& body) {
  for_storage(args.type, [&](auto storage) {
    args.wide_code ? body(storage, int32_t{}) : body(storage, uint8_t{});
  });
}

}  // namespace

int64_t batch_norm_forward_workspace(const NormForwardArgs& args) {
  int64_t parts = 0;
  for_types(args.block, [&](auto storage, auto code) {
    using S = decltype(storage);
    const bool vectors = args.block.plane_channels_last && in_vectors<S, decltype(code)>(args);
    parts = pool_sizes(args, vectors ? kVector<S> : 1).parts;
  });
  const Geometry& g = args.block.geometry;
  return numbers_bytes(g, args.block.type) +
         g.out_channels * parts * static_cast<int64_t>(sizeof(Moments));
}

void batch_norm_forward(const NormForwardArgs& args, const Execution& execution) {
  for_types(args.block, [&](auto storage, auto code) {
    forward_typed<decltype(storage), decltype(code)>(args, execution);
  });
}

}  // namespace fusedcnn::cuda
