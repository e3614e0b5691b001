// Matrices turned over, a tile at a time: a row's columns, which lie side by side, come in, a
// column's rows go out, and in between they cross over in shared memory.

#include "cuda/device.h"
#include "cuda/kernels/library.h"
#include "cuda/transpose.h"

namespace fusedcnn::cuda {
namespace {

// A thread's loads of a tile, all under way before the first is waited for; and its stores.
template <typename Unit>
constexpr int kAccesses = sizeof(Unit) < 4 ? 16 : 8;

// Two elements of one row and two of the next become those of two columns.
FUSEDCNN_DEVICE void turn(uint32_t (&pairs)[2]) {
  const uint32_t low = (pairs[0] & 0xffff) | pairs[1] << 16;
  pairs[1] = pairs[0] >> 16 | (pairs[1] & 0xffff0000);
  pairs[0] = low;
}
template <typename Unit>
FUSEDCNN_DEVICE void turn(Unit (&)[1]) {}

// An image's rows and columns, in groups of V, as are a tile's.
struct Matrix {
  int64_t rows, columns;
  int row_bits, column_bits;
  int pitch;             // units of shared memory from one group of columns to the next
  int64_t tiles, tasks;  // of an image, of all
  Divisor row_tiles;
};

// How many of `size` a tile has that begins at `first` and has room for 2^bits.
FUSEDCNN_DEVICE int count_of(int64_t size, int64_t first, int bits) {
  return size - first < 1 << bits ? static_cast<int>(size - first) : 1 << bits;
}

// Moves units of V elements: strides are in units. line: so many columns follow each other by
// strides.w, and begin strides.h apart; 0: all of them do.
template <typename Unit, int V>
FUSEDCNN_KERNEL_RESIDENT(kLibraryThreads, 4)
transpose_kernel(const Unit* from, Strides strides, int64_t line, Unit* to, Matrix matrix) {
  constexpr int kGroups = kAccesses<Unit> / V;
  const int row_bits = matrix.row_bits, column_bits = matrix.column_bits;
  SharedMemory memory;
  const Shared<Unit> units = memory.array<Unit>(matrix.pitch << column_bits);
  for (int64_t task = block_index(); task < matrix.tasks; task += grid_blocks()) {
    const int64_t image = task / matrix.tiles;
    const Division tile = divide(static_cast<int>(task - image * matrix.tiles), matrix.row_tiles);
    const int64_t row = int64_t{tile.remainder} << row_bits;
    const int64_t column = int64_t{tile.quotient} << column_bits;
    const int rows = count_of(matrix.rows, row, row_bits);
    const int columns = count_of(matrix.columns, column, column_bits);

    // Coming in, lanes lie along the columns.
    int thread = fresh_thread_index();
    const int in_column = thread & ((1 << column_bits) - 1);
    const int in_row = thread >> column_bits, in_step = kLibraryThreads >> column_bits;
    const int in_rows = in_column < columns ? rows : 0;
    int64_t offset = (column + in_column) * strides.w;
    if (line) offset += (column + in_column) / line * (strides.h - line * strides.w);
    const Unit* in = from + image * strides.n + (row + in_row) * V * strides.c + offset;
    Unit square[kGroups][V];
    FUSEDCNN_UNROLL
    for (int i = 0; i < kGroups; ++i, in += in_step * V * strides.c) {
      if (in_row + i * in_step >= in_rows) continue;
      FUSEDCNN_UNROLL
      for (int v = 0; v < V; ++v) square[i][v] = in[v * strides.c];
    }
    sync_warp();  // no store waits for its load while others are to be issued
    Shared<Unit> at = units + (in_column * matrix.pitch + in_row);
    FUSEDCNN_UNROLL
    for (int i = 0; i < kGroups; ++i, at += in_step) {
      if (in_row + i * in_step >= in_rows) continue;
      turn(square[i]);
      FUSEDCNN_UNROLL
      for (int v = 0; v < V; ++v) at[v << row_bits] = square[i][v];
    }
    sync_threads();

    // Going out, along the rows.
    thread = fresh_thread_index();
    const int out_row = thread & ((1 << row_bits) - 1);
    const int out_column = thread >> row_bits, out_step = kLibraryThreads >> row_bits;
    const int out_columns = out_row < rows ? columns : 0;
    Unit* out =
        to + (image * matrix.columns + column + out_column) * V * matrix.rows + row + out_row;
    at = units + (out_column * matrix.pitch + out_row);
    FUSEDCNN_UNROLL
    for (int i = 0; i < kGroups; ++i, at += out_step * matrix.pitch) {
      if (out_column + i * out_step >= out_columns) continue;
      FUSEDCNN_UNROLL
      for (int v = 0; v < V; ++v) square[i][v] = at[v << row_bits];
    }
    FUSEDCNN_UNROLL
    for (int i = 0; i < kGroups; ++i, out += out_step * V * matrix.rows) {
      if (out_column + i * out_step >= out_columns) continue;
      FUSEDCNN_UNROLL
      for (int v = 0; v < V; ++v) out[v * matrix.rows] = square[i][v];
    }
    sync_threads();  // the next tile overwrites this one
  }
}

// ---- host ---------------------------------------------------------------------------------------

template <typename Unit, int V>
void launch_transpose(const TransposeArgs& args, const Strides& strides, int64_t line,
                      const Execution& execution) {
  const int bits = kThreadBits + bits_for(kAccesses<Unit> / V, 30);
  Matrix m{args.channels / V, args.rows * args.columns / V, 0, 0, 0, 0, 0, {}};
  // As many rows as columns, or half as many; more of either where there are few of the other, but
  // no more than threads.
  const int left = bits - bits_for(m.rows, bits / 2);
  m.column_bits = bits_for(m.columns, left < kThreadBits ? left : kThreadBits);
  const int room = bits - m.column_bits;
  m.row_bits = bits_for(m.rows, room < kThreadBits ? room : kThreadBits);
  // An odd number of banks, of 4 bytes each: a warp's groups of columns lie in different ones.
  constexpr int kBank = sizeof(Unit) < 4 ? static_cast<int>(4 / sizeof(Unit)) : 1;
  m.pitch = (((V << m.row_bits) + kBank - 1) / kBank | 1) * kBank;
  const int64_t row_tiles = ((m.rows - 1) >> m.row_bits) + 1;
  m.row_tiles = divisor_of(row_tiles);
  m.tiles = row_tiles * (((m.columns - 1) >> m.column_bits) + 1);
  m.tasks = args.images * m.tiles;
  launch("transpose", transpose_kernel<Unit, V>, blocks_for(m.tasks), kLibraryThreads,
         shared_bytes<Unit>(int64_t{m.pitch} << m.column_bits), execution,
         static_cast<const Unit*>(args.from), strides, line, static_cast<Unit*>(args.to), m);
}

}  // namespace

void transpose(const TransposeArgs& args, const Execution& execution) {
  const Strides& s = args.strides;
  const bool gaps = s.w != 1 || (args.rows > 1 && s.h != args.columns);
  const int64_t line = gaps ? args.columns : 0;
  const auto elements = [&](auto unit) {
    launch_transpose<decltype(unit), 1>(args, s, line, execution);
  };
  switch (args.element_bytes) {
    case 1: return elements(uint8_t{});
    case 2:
      if (!gaps && args.channels % 2 == 0 && args.rows * args.columns % 2 == 0 &&
          aligned(args.from, 2, 4, {s.n, s.c}) && aligned(args.to, 2, 4, {})) {
        return launch_transpose<uint32_t, 2>(args, {s.n / 2, s.c / 2, 0, 1}, 0, execution);
      }
      return elements(uint16_t{});
    case 4: return elements(uint32_t{});
    default: return elements(uint64_t{});
  }
}

}  // namespace fusedcnn::cuda
