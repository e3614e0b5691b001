// Linear layers whose weights fit the caches, and whose batch is small beside them: the classifier
// of a CNN. Libraries leave half of the machine's rate there in the forward, whose operands both
// lie along the sum.
//
// One task owns some panels of a product, two vectors of columns each, for all of its rows. A panel
// of the right operand is copied together, which also puts rows apart that share a cache set; in
// the forward it is transposed on the way. A tile of kTileRows x 2 vectors stays in registers: on
// AVX-512 24 accumulators, for which a step of the sum loads 2 vectors and 12 broadcasts, less than
// two loads a cycle beside two FMAs.
#pragma once

#include "cpu/kernels/simd.h"
#include "cpu/kernels/transpose.h"
#include "cpu/linear.h"
#include "cpu/scratch.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {
namespace {

constexpr int kTileRows = kRegisters == 32 ? 12 : 6;
// Terms that are summed before they are added to the others: bounds rounding, and keeps a panel of
// them within half of L1.
constexpr int64_t kTerms = 256;
// Rows that the forward transposes at a time: with the weights they stay in L2.
constexpr int64_t kChunk = 64;
// Panels that a product's task owns: with one, the copy would read two cache lines of a row, and
// never see the next ones arrive.
constexpr int64_t kPanels = 2;
// Right operands up to this many bytes stay in L1 as they are.
constexpr int64_t kUncopiedBytes = 16 * 1024;

template <typename T>
constexpr int kPanel = 2 * kLanes<T>;

// to[i][0..kPanel) = sum over k < terms of left(i, k) * right[k][0..kPanel), or added to it.
template <typename T, int Rows>
void product_tile(int64_t terms, const T* left, int64_t left_row, int64_t left_term, const T* right,
                  int64_t right_term, T* to, int64_t to_row, bool add) {
  Vector<T> sums[Rows][2] = {};
  for (int64_t k = 0; k < terms; ++k) {
    Vector<T> row[2];
    FUSEDCNN_UNROLL
    for (int v = 0; v < 2; ++v) {
      row[v] = load(right + k * right_term + v * kLanes<T>);
      keep(row[v]);
    }
    FUSEDCNN_UNROLL
    for (int i = 0; i < Rows; ++i) {
      const Vector<T> factor = broadcast(left[i * left_row + k * left_term]);
      FUSEDCNN_UNROLL
      for (int v = 0; v < 2; ++v) sums[i][v] += factor * row[v];
    }
  }
  FUSEDCNN_UNROLL
  for (int i = 0; i < Rows; ++i) {
    FUSEDCNN_UNROLL
    for (int v = 0; v < 2; ++v) {
      T* const place = to + i * to_row + v * kLanes<T>;
      store(place, add ? load(place) + sums[i][v] : sums[i][v]);
    }
  }
}

template <typename T, int Rows = kTileRows>
FUSEDCNN_INLINE void product_tile_of(int64_t rows, int64_t terms, const T* left, int64_t left_row,
                                     int64_t left_term, const T* right, int64_t right_term, T* to,
                                     int64_t to_row, bool add) {
  if (rows >= Rows) {
    product_tile<T, Rows>(terms, left, left_row, left_term, right, right_term, to, to_row, add);
  } else if constexpr (Rows > 1) {
    product_tile_of<T, Rows - 1>(rows, terms, left, left_row, left_term, right, right_term, to,
                                 to_row, add);
  }
}

// A tile's sums over all terms, in steps of kTerms. right: [terms][right_term].
template <typename T>
void product_sums(int64_t rows, int64_t terms, const T* left, int64_t left_row, int64_t left_term,
                  const T* right, int64_t right_term, T* to, int64_t to_row) {
  for (int64_t k = 0; k == 0 || k < terms; k += kTerms) {
    product_tile_of<T>(rows, smaller(kTerms, terms - k), left + k * left_term, left_row, left_term,
                       right + k * right_term, right_term, to, to_row, k > 0);
  }
}

// body(i) for i < count, by some thousands at a time.
template <typename Body>
void in_parts(int64_t count, const ThreadPool& pool, const Body& body) {
  constexpr int64_t kPart = 1 << 14;
  parallel_tasks(pool, (count + kPart - 1) / kPart, [&](int64_t task) {
    const int64_t end = smaller(count, (task + 1) * kPart);
    for (int64_t i = task * kPart; i < end; ++i) body(i);
  });
}

// ---- forward ------------------------------------------------------------------------------------

// Sum of each vector's lanes, as the lanes of one vector.
template <typename T, int Count = kLanes<T>>
FUSEDCNN_INLINE Vector<T> lane_sums(Vector<T>* vectors) {
  if constexpr (Count == 1) {
    return vectors[0];
  } else {
    FUSEDCNN_UNROLL
    for (int i = 0; i < Count / 2; ++i) {
      const Vector<T> a = vectors[2 * i], b = vectors[2 * i + 1];
      vectors[i] = shuffle(a, b, kEven) + shuffle(a, b, kOdd);
    }
    return lane_sums<T, Count / 2>(vectors);
  }
}

// Few rows are multiplied as they lie, a vector of the sum's terms at a time: as many sums as a
// vector has lanes, of kDotRows rows and the rest of outputs.
template <typename T>
constexpr int kDotRows = kLanes<T> >= 16  ? 4
                         : kLanes<T> >= 4 ? 2
                                          : 1;
template <typename T>
constexpr int kDotOuts = kLanes<T> / kDotRows<T>;
// Terms that a lane adds in a row: rounding errors grow with their number.
constexpr int64_t kDotTerms = 128;

// The `count` terms from `from` on, and zeros.
template <typename T>
FUSEDCNN_INLINE Vector<T> load_some(const T* from, int64_t count) {
  T lanes[kLanes<T>] = {};
  for (int64_t l = 0; l < count; ++l) lanes[l] = from[l];
  return load(lanes);
}

// Adds a vector of terms from term k on: a whole one, or `count` terms.
template <typename T, int Rows, bool kWhole>
FUSEDCNN_INLINE void add_dots(const T* input, int64_t stride, const T* const* weights, int64_t k,
                              int64_t count, Vector<T> (&sums)[Rows * kDotOuts<T>]) {
  constexpr int kOuts = kDotOuts<T>;
  const auto load_terms = [&](const T* from) {
    return kWhole ? load(from + k) : load_some(from + k, count);
  };
  Vector<T> right[kOuts];
  FUSEDCNN_UNROLL
  for (int o = 0; o < kOuts; ++o) {
    right[o] = load_terms(weights[o]);
    keep(right[o]);
  }
  FUSEDCNN_UNROLL
  for (int r = 0; r < Rows; ++r) {
    Vector<T> left = load_terms(input + r * stride);
    keep(left);
    FUSEDCNN_UNROLL
    for (int o = 0; o < kOuts; ++o) sums[r * kOuts + o] += left * right[o];
  }
}

// Sums [Rows][kDotOuts]; further outputs than `outs` repeat the last. A row's bits are the same for
// any number of rows.
template <typename T, int Rows>
Vector<T> dot_tile(int64_t terms, const T* input, const T* weight, int64_t stride, int64_t outs) {
  constexpr int kOuts = kDotOuts<T>, kN = kLanes<T>;
  const T* weights[kOuts];
  for (int o = 0; o < kOuts; ++o) weights[o] = weight + smaller<int64_t>(o, outs - 1) * stride;
  Vector<T> totals[kN] = {};
  for (int64_t k = 0; k < terms;) {
    const int64_t end = smaller(terms, k + kDotTerms * kN);
    Vector<T> sums[Rows * kOuts] = {};
    for (; k + kN <= end; k += kN) add_dots<T, Rows, true>(input, stride, weights, k, kN, sums);
    if (k < end) {
      add_dots<T, Rows, false>(input, stride, weights, k, end - k, sums);
      k = end;
    }
    FUSEDCNN_UNROLL
    for (int i = 0; i < Rows * kOuts; ++i) totals[i] += sums[i];
  }
  return lane_sums<T>(totals);
}

template <typename T, int Rows = kDotRows<T>>
FUSEDCNN_INLINE Vector<T> dot_tile_of(int64_t rows, int64_t terms, const T* input, const T* weight,
                                      int64_t stride, int64_t outs) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return dot_tile_of<T, Rows - 1>(rows, terms, input, weight, stride, outs);
  }
  return dot_tile<T, Rows>(terms, input, weight, stride, outs);
}

template <typename T>
FUSEDCNN_INLINE T finish(const LinearArgs& args, T sum, int64_t out) {
  sum += static_cast<const T*>(args.bias)[out];
  return args.relu && sum < 0 ? 0 : sum;
}

// Rows begin..end of the output as sums along vectors.
template <typename T>
void linear_dots(const LinearArgs& args, int64_t begin, int64_t end, const ThreadPool& pool) {
  constexpr int kOuts = kDotOuts<T>;
  const LinearShape& s = args.shape;
  const T* const input = static_cast<const T*>(args.input);
  const T* const weight = static_cast<const T*>(args.weight);
  parallel_tasks(pool, (s.out + kOuts - 1) / kOuts, [&](int64_t task) {
    const int64_t out = task * kOuts, outs = smaller<int64_t>(kOuts, s.out - out);
    for (int64_t r = begin; r < end; r += kDotRows<T>) {
      const int64_t rows = smaller<int64_t>(kDotRows<T>, end - r);
      const Vector<T> sums =
          dot_tile_of(rows, s.in, input + r * s.in, weight + out * s.in, s.in, outs);
      for (int64_t i = 0; i < rows; ++i) {
        T* const to = static_cast<T*>(args.output) + (r + i) * s.out + out;
        for (int64_t o = 0; o < outs; ++o) to[o] = finish(args, T(sums[i * kOuts + o]), out + o);
      }
    }
  });
}

// Rows begin..end, at most kChunk: their transpose in panels, then the weights' rows times these.
template <typename T>
void linear_panels(const LinearArgs& args, int64_t begin, int64_t end, const ThreadPool& pool) {
  constexpr int64_t kN = kPanel<T>;
  const LinearShape& s = args.shape;
  const int64_t panels = (end - begin + kN - 1) / kN, blocks = (s.in + kTerms - 1) / kTerms;
  T* const right = static_cast<T*>(scratch(Slot::kTransformed, panels * s.in * kN * sizeof(T)));
  const T* const input = static_cast<const T*>(args.input) + begin * s.in;
  parallel_tasks(pool, panels * blocks, [&](int64_t task) {
    const int64_t panel = task / blocks, first = task % blocks * kTerms;
    const int64_t terms = smaller(kTerms, s.in - first);
    const int64_t rows = smaller(kN, end - begin - panel * kN);
    T* const to = right + (panel * s.in + first) * kN;
    for (int64_t k = 0; rows < kN && k < terms; ++k) {
      for (int64_t r = rows; r < kN; ++r) to[k * kN + r] = 0;
    }
    transpose_matrix(input + panel * kN * s.in + first, s.in, to, kN, rows, terms);
  });
  // The weights' rows may share a cache set: a tile's are copied a little apart, a block at a time.
  constexpr int64_t kApart = kTerms + 64 / sizeof(T);
  parallel_tasks(pool, (s.out + kTileRows - 1) / kTileRows, [&](int64_t task) {
    const int64_t out = task * kTileRows, outs = smaller<int64_t>(kTileRows, s.out - out);
    const T* const weight = static_cast<const T*>(args.weight) + out * s.in;
    alignas(64) T left[kTileRows * kApart], sums[kChunk * kTileRows];
    for (int64_t k = 0; k == 0 || k < s.in; k += kTerms) {
      const int64_t terms = smaller(kTerms, s.in - k);
      for (int64_t o = 0; o < outs; ++o) {
        memcpy(left + o * kApart, weight + o * s.in + k, terms * sizeof(T));
      }
      for (int64_t panel = 0; panel < panels; ++panel) {
        product_tile_of<T>(outs, terms, left, kApart, int64_t{1}, right + (panel * s.in + k) * kN,
                           kN, sums + panel * kTileRows * kN, kN, k > 0);
      }
    }
    for (int64_t r = begin; r < end; ++r) {
      const T* const from = sums + (r - begin) / kN * kTileRows * kN + (r - begin) % kN;
      T* const to = static_cast<T*>(args.output) + r * s.out + out;
      for (int64_t o = 0; o < outs; ++o) to[o] = finish(args, from[o * kN], out + o);
    }
  });
}

template <typename T>
void linear_forward(const LinearArgs& args, const ThreadPool& pool) {
  // A panel that is a quarter empty takes as long as the same rows along vectors.
  constexpr int64_t kFewest = kPanel<T> * 3 / 4;
  const int64_t rows = args.shape.rows;
  const int64_t whole = rows / kPanel<T> * kPanel<T>;
  const int64_t paneled = rows - whole >= kFewest ? rows : whole;
  for (int64_t r = 0; r < paneled; r += kChunk) {
    linear_panels<T>(args, r, smaller(paneled, r + kChunk), pool);
  }
  if (paneled < rows) linear_dots<T>(args, paneled, rows, pool);
  if (!args.kept) return;
  const T* const output = static_cast<const T*>(args.output);
  const T* const kept = static_cast<const T*>(args.kept);
  T* const dropped = static_cast<T*>(args.dropped);
  const T keep = static_cast<T>(args.keep);
  in_parts(rows * args.shape.out, pool,
           [&](int64_t i) { dropped[i] = output[i] * (kept[i] / keep); });
}

// ---- backward -----------------------------------------------------------------------------------

// Columns c.. of right [terms][cols], as panels [count / kPanel, rounded up][terms][kPanel]; zeros
// where the last is not full.
template <typename T>
void copy_panels(const T* right, int64_t terms, int64_t cols, int64_t count, T* to) {
  constexpr int64_t kN = kPanel<T>;
  for (int64_t k = 0; k < terms; ++k) {
    const T* const from = right + k * cols;
    int64_t c = 0;
    for (; c + kN <= count; c += kN) {
      T* const panel = to + c * terms + k * kN;
      FUSEDCNN_UNROLL
      for (int v = 0; v < 2; ++v) store(panel + v * kLanes<T>, load(from + c + v * kLanes<T>));
    }
    if (c == count) continue;
    T* const panel = to + c * terms + k * kN;
    for (int64_t i = 0; i < kN; ++i) panel[i] = c + i < count ? from[c + i] : 0;
  }
}

// to [rows][cols] = left * right, where left(i, k) = left[i * left_row + k * left_term] and right
// is [terms][cols].
template <typename T>
void multiply(int64_t rows, int64_t terms, int64_t cols, const T* left, int64_t left_row,
              int64_t left_term, const T* right, T* to, const ThreadPool& pool) {
  constexpr int64_t kN = kPanel<T>, kWidth = kPanels * kN;
  const int64_t groups = (cols + kWidth - 1) / kWidth;
  // Where the right operand is read once, or stays in L1, it is read where it lies. Its tiles then
  // go along the result's rows, which may be all the work there is.
  const bool copied = rows > kTileRows && terms * cols * int64_t{sizeof(T)} > kUncopiedBytes;
  const int64_t bands = copied ? 1 : (rows + kTileRows - 1) / kTileRows;
  parallel_tasks(pool, bands * groups, [&](int64_t task) {
    const int64_t first = task % groups * kWidth, width = smaller(kWidth, cols - first);
    const int64_t begin = task / groups * kTileRows;
    const int64_t end = copied ? rows : smaller(rows, begin + kTileRows);
    const T* panels = right + first;
    int64_t stride = cols, next = kN;  // of a panel's rows, from panel to panel
    if (copied || width % kN != 0) {
      const int64_t elements = round_up(width, kN) * larger<int64_t>(terms, 1);
      T* const copy = static_cast<T*>(scratch(Slot::kPatch, elements * sizeof(T)));
      copy_panels(panels, terms, cols, width, copy);
      panels = copy;
      stride = kN;
      next = terms * kN;
    }
    for (int64_t i = begin; i < end; i += kTileRows) {
      const int64_t tile = smaller<int64_t>(kTileRows, end - i);
      const T* const factors = left + i * left_row;
      for (int64_t c = 0; c < width; c += kN) {
        const T* const panel = panels + c / kN * next;
        T* const place = to + i * cols + first + c;
        if (c + kN <= width) {
          product_sums(tile, terms, factors, left_row, left_term, panel, stride, place, cols);
          continue;
        }
        alignas(64) T sums[kTileRows * kN];
        product_sums(tile, terms, factors, left_row, left_term, panel, stride, sums, kN);
        for (int64_t r = 0; r < tile; ++r) {
          memcpy(place + r * cols, sums + r * kN, (width - c) * sizeof(T));
        }
      }
    }
  });
}

// Sums of the gradient's columns, kTerms rows at a time.
template <typename T>
void sum_rows(const LinearShape& s, const T* grad, T* to) {
  T* const part = static_cast<T*>(scratch(Slot::kPartials, s.out * sizeof(T)));
  for (int64_t o = 0; o < s.out; ++o) to[o] = 0;
  for (int64_t r = 0; r < s.rows; r += kTerms) {
    for (int64_t o = 0; o < s.out; ++o) part[o] = 0;
    for (int64_t i = r; i < smaller(s.rows, r + kTerms); ++i) {
      for (int64_t o = 0; o < s.out; ++o) part[o] += grad[i * s.out + o];
    }
    for (int64_t o = 0; o < s.out; ++o) to[o] += part[o];
  }
}

// The gradient before dropout and ReLU.
template <typename T>
const T* linear_gradient(const LinearBackwardArgs& args, const ThreadPool& pool) {
  const T* const grad = static_cast<const T*>(args.grad);
  if (!args.kept && !args.output) return grad;
  const int64_t count = args.shape.rows * args.shape.out;
  T* const to = static_cast<T*>(scratch(Slot::kGradient, larger<int64_t>(count, 1) * sizeof(T)));
  const T* const output = static_cast<const T*>(args.output);
  const T* const kept = static_cast<const T*>(args.kept);
  const T keep = static_cast<T>(args.keep);
  in_parts(count, pool, [&](int64_t i) {
    const T value = kept ? grad[i] * (kept[i] / keep) : grad[i];
    to[i] = output && output[i] <= 0 ? 0 : value;
  });
  return to;
}

template <typename T>
void linear_backward(const LinearBackwardArgs& args, const ThreadPool& pool) {
  const LinearShape& s = args.shape;
  const T* const grad = linear_gradient<T>(args, pool);
  if (args.grad_bias) sum_rows(s, grad, static_cast<T*>(args.grad_bias));
  // First, while the weights are where the forward left them: grad_weight is as large.
  if (args.grad_input) {
    multiply(s.rows, s.out, s.in, grad, s.out, int64_t{1}, static_cast<const T*>(args.weight),
             static_cast<T*>(args.grad_input), pool);
  }
  if (args.grad_weight) {
    multiply(s.out, s.rows, s.in, grad, int64_t{1}, s.out, static_cast<const T*>(args.input),
             static_cast<T*>(args.grad_weight), pool);
  }
}

// ---- of either type -----------------------------------------------------------------------------

void linear_forward(const LinearArgs& args, const ThreadPool& pool) {
  if (args.shape.type == DataType::kFloat64) return linear_forward<double>(args, pool);
  linear_forward<float>(args, pool);
}

void linear_by_rows(const LinearArgs& args, const ThreadPool& pool) {
  const int64_t rows = args.shape.rows;
  if (args.shape.type == DataType::kFloat64) return linear_dots<double>(args, 0, rows, pool);
  linear_dots<float>(args, 0, rows, pool);
}

void linear_backward(const LinearBackwardArgs& args, const ThreadPool& pool) {
  if (args.shape.type == DataType::kFloat64) return linear_backward<double>(args, pool);
  linear_backward<float>(args, pool);
}

}  // namespace
}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
