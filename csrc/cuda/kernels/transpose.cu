// Matrices turned over, a tile at a time: a row's columns, which lie side by side, come in, a
// column's rows go out, and in between they cross over in shared memory.
//
// A thread moves an element in an access, of half types a pair: it loads two of a row and two of
// the next, and exchanges their halves in registers. Where sizes or addresses are odd, and of
// codes, it moves one element.
//
// No GPU has measured it. Of a whole tile, by sm_90's machine code:
//
//                                          pairs       halves      floats
//   rows x columns                         64 x 64     64 x 64     32 x 64
//   a thread's loads under way             8           16          8
//   bytes under way, of four blocks        32 KB       32 KB       32 KB
//   instructions of a warp                 242         382         234
//   TB/s, read and written, that they allow 132 multiprocessors at 1.75 GHz
//                                          7.8         5.0         8.1
//
// A memory of 4.8 TB/s with a latency of 700 ns has 25 KB of each multiprocessor's under way, half
// of it loads. No access of shared memory meets a bank twice.

#include "cuda/device.h"
#include "cuda/kernels/library.h"
#include "cuda/transpose.h"

namespace fusedcnn::cuda {
namespace {

// A unit is V elements of a row, moved at once; a group, V units of rows that follow each other.
template <typename Unit, int V>
struct Groups {
  // A thread's in a tile: 16 units narrower than a bank of shared memory, or 8. Their loads are
  // all under way before the first is waited for.
  static constexpr int kCount = (sizeof(Unit) < 4 ? 16 : 8) / V;
  // A tile's, of a block: as many rows as columns, or half as many, where there are as many.
  static constexpr int kBits = kThreadBits + (sizeof(Unit) < 4 ? 4 : 3) - V / 2;
  static constexpr int kRowBits = kBits / 2, kColumnBits = kBits - kRowBits;

  // Units from one column of groups to the next in shared memory. An odd number of banks, of 4
  // bytes: a warp's columns lie in different ones.
  static constexpr int pitch(int row_bits) {
    constexpr int kBank = sizeof(Unit) < 4 ? static_cast<int>(4 / sizeof(Unit)) : 1;
    return (((V << row_bits) + kBank - 1) / kBank | 1) * kBank;
  }
};

// A group's elements, row by row, become those of its columns.
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
  int64_t tiles, tasks;  // of an image, of all
  Divisor row_tiles;
};

// How many of `size` a tile has that begins at `first` and has room for 2^bits.
FUSEDCNN_DEVICE int count_of(int64_t size, int64_t first, int bits) {
  return size - first < 1 << bits ? static_cast<int>(size - first) : 1 << bits;
}

// Strides are in units. line: so many columns follow each other by strides.w, and begin strides.h
// apart; 0: all of them do. kUsual: the tile has kRowBits and kColumnBits, and so places in it cost
// two thirds of the instructions.
template <typename Unit, int V, bool kUsual>
FUSEDCNN_KERNEL_RESIDENT(kLibraryThreads, 4)
transpose_kernel(const Unit* from, Strides strides, int64_t line, Unit* to, Matrix matrix) {
  using G = Groups<Unit, V>;
  const int row_bits = kUsual ? G::kRowBits : matrix.row_bits;
  const int column_bits = kUsual ? G::kColumnBits : matrix.column_bits;
  const int pitch = G::pitch(row_bits);
  SharedMemory memory;
  const Shared<Unit> units = memory.array<Unit>(pitch << column_bits);
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
    Unit square[G::kCount][V];
    FUSEDCNN_UNROLL
    for (int i = 0; i < G::kCount; ++i, in += in_step * V * strides.c) {
      if (in_row + i * in_step >= in_rows) continue;
      FUSEDCNN_UNROLL
      for (int v = 0; v < V; ++v) square[i][v] = load_pack<1>(in + v * strides.c).values[0];
    }
    sync_warp();  // no store waits for its load while others are to be issued
    Shared<Unit> at = units + (in_column * pitch + in_row);
    FUSEDCNN_UNROLL
    for (int i = 0; i < G::kCount; ++i, at += in_step) {
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
    at = units + (out_column * pitch + out_row);
    FUSEDCNN_UNROLL
    for (int i = 0; i < G::kCount; ++i, at += out_step * pitch) {
      if (out_column + i * out_step >= out_columns) continue;
      FUSEDCNN_UNROLL
      for (int v = 0; v < V; ++v) square[i][v] = at[v << row_bits];
    }
    FUSEDCNN_UNROLL
    for (int i = 0; i < G::kCount; ++i, out += out_step * V * matrix.rows) {
      if (out_column + i * out_step >= out_columns) continue;
      FUSEDCNN_UNROLL
      for (int v = 0; v < V; ++v) store_pack<1, Unit>(out + v * matrix.rows, {{square[i][v]}});
    }
    sync_threads();  // the next tile overwrites this one
  }
}

// ---- host ---------------------------------------------------------------------------------------

template <typename Unit, int V>
void launch_transpose(const TransposeArgs& args, const Strides& strides, int64_t line,
                      const Execution& execution) {
  using G = Groups<Unit, V>;
  Matrix m{args.channels / V, args.rows * args.columns / V, 0, 0, 0, 0, {}};
  // More of rows or columns where there are few of the other, but no more than threads.
  const int left = G::kBits - bits_for(m.rows, G::kRowBits);
  m.column_bits = bits_for(m.columns, left < kThreadBits ? left : kThreadBits);
  const int room = G::kBits - m.column_bits;
  m.row_bits = bits_for(m.rows, room < kThreadBits ? room : kThreadBits);
  const int64_t row_tiles = ((m.rows - 1) >> m.row_bits) + 1;
  m.row_tiles = divisor_of(row_tiles);
  m.tiles = row_tiles * (((m.columns - 1) >> m.column_bits) + 1);
  m.tasks = args.images * m.tiles;
  const bool usual = m.row_bits == G::kRowBits && m.column_bits == G::kColumnBits;
  launch("transpose", usual ? transpose_kernel<Unit, V, true> : transpose_kernel<Unit, V, false>,
         blocks_for(m.tasks), kLibraryThreads,
         shared_bytes<Unit>(int64_t{G::pitch(m.row_bits)} << m.column_bits), execution,
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
