#include "test_device.h"

#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/device.h"
#include "machine.h"
#include "storage.h"

namespace selftest {
namespace {

using namespace fusedcnn::cuda;

// ---- warps --------------------------------------------------------------------------------------

struct WarpResults {
  int from[32], exchanged[32];
  double wide[32];
  uint32_t votes[32];
};

FUSEDCNN_KERNEL(32) warp_kernel(WarpResults* results) {
  const int lane = thread_index();
  results->from[lane] = shuffle(100 + lane, (lane + 5) % 32);
  results->exchanged[lane] = shuffle_xor(lane, 3);
  results->wide[lane] = shuffle_xor(lane + 0.5, 16);
  results->votes[lane] = ballot(lane % 3 == 0);
}

void test_warp() {
  WarpResults results{};
  launch("warp", warp_kernel, 1, 32, 0, Execution{}, &results);
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; lane += 3) votes |= 1u << lane;
  bool right = true;
  for (int lane = 0; lane < 32; ++lane) {
    right &= results.from[lane] == 100 + (lane + 5) % 32;
    right &= results.exchanged[lane] == (lane ^ 3);
    right &= results.wide[lane] == (lane ^ 16) + 0.5;
    right &= results.votes[lane] == votes;
  }
  check(right && count_bits(votes) == 11, "shuffle, shuffle_xor, ballot, count_bits");
}

// ---- asynchronous copies ------------------------------------------------------------------------

template <int Bytes>
FUSEDCNN_KERNEL(32)
copy_kernel(const uint16_t* from, uint16_t* to, int valid) {
  constexpr int kElements = Bytes / 2;
  SharedMemory memory;
  const Shared<uint16_t> buffer = memory.array<uint16_t>(2 * 32 * kElements);
  const int at = thread_index() * kElements;
  for (int half = 0; half < 2; ++half) {
    copy_async<Bytes>(buffer + (half * 32 * kElements + at), from + at, half ? valid : Bytes);
    commit_copies();
  }
  wait_copies<1>();
  sync_threads();
  for (int i = 0; i < kElements; ++i) to[at + i] = buffer[at + i];
  wait_copies<0>();
  sync_threads();
  for (int i = 0; i < kElements; ++i) {
    to[32 * kElements + at + i] = buffer[32 * kElements + at + i];
  }
}

template <int Bytes>
void test_copies() {
  constexpr int kElements = Bytes / 2;
  alignas(16) uint16_t from[32 * kElements];
  for (int i = 0; i < 32 * kElements; ++i) from[i] = static_cast<uint16_t>(i + 1);
  for (int valid = 0; valid <= Bytes; valid += 2) {
    uint16_t to[2 * 32 * kElements] = {};
    launch("copy", copy_kernel<Bytes>, 1, 32, shared_bytes<uint16_t>(2 * 32 * kElements),
           Execution{}, +from, +to, valid);
    bool right = true;
    for (int i = 0; i < 32 * kElements; ++i) {
      right &= to[i] == from[i];
      right &= to[32 * kElements + i] == (i % kElements < valid / 2 ? from[i] : 0);
    }
    check(right, "copy_async of " + std::to_string(Bytes) + " bytes, " + std::to_string(valid) +
                     " of them valid");
  }
}

// ---- conversions --------------------------------------------------------------------------------

template <typename S>
void test_conversions(Format format, const char* name) {
  bool widened = true, round_trip = true;
  for (int bits = 0; bits < 65536; ++bits) {
    const S value{static_cast<uint16_t>(bits)};
    const double expected = decode(format, value.bits), got = widen(value);
    widened &= std::isnan(expected) ? std::isnan(got) : got == expected;
    widened &= std::isnan(expected) || std::signbit(got) == std::signbit(expected);
    const S back = narrow<S>(widen(value));
    round_trip &= std::isnan(expected) ? std::isnan(widen(back)) : back.bits == value.bits;
  }
  check(widened, std::string("widen: all ") + name);
  check(round_trip, std::string("narrow: all ") + name);
  // Between neighbours, and where it matters most: ties, carries, overflow, what underflows.
  bool narrowed = true;
  for (int bits = 0; bits < 0x7fff; ++bits) {
    const auto low = static_cast<float>(decode(format, static_cast<uint16_t>(bits)));
    const auto high = static_cast<float>(decode(format, static_cast<uint16_t>(bits + 1)));
    if (!std::isfinite(low) || std::isnan(high)) continue;
    const float middle = std::isfinite(high) ? low + (high - low) / 2 : low * 1.001f;
    for (const float value : {middle, std::nextafterf(middle, 0.f), std::nextafterf(middle, 1e38f),
                              -middle, low * 1.0001f}) {
      narrowed &= narrow<S>(value).bits == encode(format, value);
    }
  }
  check(narrowed, std::string("narrow: between all ") + name);
}

void test_tf32() {
  const auto value = [](uint32_t bits) { return float_of(bits); };
  check(value(to_tf32(1.f)) == 1 && value(to_tf32(1 + 0x1p-10f)) == 1 + 0x1p-10f &&
            value(to_tf32(1 + 0x1p-12f)) == 1 && value(to_tf32(1 + 0x1p-11f)) == 1 + 0x1p-10f &&
            value(to_tf32(-1 - 0x1p-11f)) == -1 - 0x1p-10f && value(to_tf32(2 - 0x1p-12f)) == 2 &&
            std::isnan(value(to_tf32(std::nanf("")))) &&
            std::isinf(value(to_tf32(infinity<float>()))),
        "to_tf32 rounds to ten bits, ties away from zero");
}

// ---- matrix instructions ------------------------------------------------------------------------
//
// A second statement of the fragment layouts, independent of matrix_on_cpu.h: as mixed-radix
// strides. Lane (l0 in 4, l1 in 8) and element (v0, v1, v2 in 2 each) of a fragment are element
//   l0 * lane0 + l1 * lane1 + v0 * value[0] + v1 * value[1] + v2 * value[2]
// of a matrix stored column by column: a and d with 16 rows; b, transposed, with 8.

struct Layout {
  int elements;  // of a lane
  int lane0, lane1;
  int value[3];

  int place(int lane, int element) const {
    int at = lane % 4 * lane0 + lane / 4 * lane1;
    for (int bit = 0; bit < 3; ++bit) at += (element >> bit & 1) * value[bit];
    return at;
  }
};
constexpr Layout kD{4, 32, 1, {16, 8, 0}};

struct Instruction {
  const char* name;
  int depth;
  Layout a, b;
  Format format;  // tf32: of 11 bits, in 32
  bool wide;
};

using Lanes = std::array<std::array<uint32_t, 4>, 32>;
struct Fragments {
  Lanes a, b;
  std::array<std::array<float, 4>, 32> c, d;
};

template <int A, int B,
          void (*Function)(float (&)[4], const uint32_t (&)[A], const uint32_t (&)[B],
                           const float (&)[4], const char*, int)>
FUSEDCNN_KERNEL(32)
mma_kernel(Fragments* f) {
  const int lane = thread_index();
  uint32_t a[A], b[B];
  float c[4], d[4];
  for (int i = 0; i < A; ++i) a[i] = f->a[lane][i];
  for (int i = 0; i < B; ++i) b[i] = f->b[lane][i];
  for (int i = 0; i < 4; ++i) c[i] = f->c[lane][i];
  Function(d, a, b, c, "", 0);
  for (int i = 0; i < 4; ++i) f->d[lane][i] = d[i];
}

// Puts matrix[place] into the lanes' registers.
void distribute(const Instruction& one, const Layout& layout, const std::vector<double>& matrix,
                Lanes* lanes) {
  *lanes = {};
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < layout.elements; ++i) {
      const double value = matrix[static_cast<size_t>(layout.place(lane, i))];
      if (one.wide) {
        (*lanes)[lane][i] = bits_of(static_cast<float>(value));
      } else {
        (*lanes)[lane][i / 2] |= static_cast<uint32_t>(encode(one.format, value)) << (i % 2 * 16);
      }
    }
  }
}

template <typename Kernel>
void test_mma(const Instruction& one, Kernel kernel) {
  // Small integers, all products and sums exact; every element differs from its neighbours.
  std::vector<double> a(16 * one.depth), b(8 * one.depth), c(128);
  for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<double>(i * 7 % 23) - 11;
  for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<double>(i * 5 % 19) - 9;
  for (size_t i = 0; i < c.size(); ++i) c[i] = static_cast<double>(i);
  Fragments f{};
  distribute(one, one.a, a, &f.a);
  distribute(one, one.b, b, &f.b);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) f.c[lane][i] = static_cast<float>(c[kD.place(lane, i)]);
  }
  launch(one.name, kernel, 1, 32, 0, Execution{}, &f);
  bool right = true;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int at = kD.place(lane, i), row = at % 16, col = at / 16;
      double expected = c[at];
      for (int k = 0; k < one.depth; ++k) expected += a[row + 16 * k] * b[col + 8 * k];
      right &= f.d[lane][i] == expected;
    }
  }
  check(right, std::string(one.name) + " multiplies by the layouts of its fragments");
}

// That a tf32 operand which was not rounded is truncated.
void test_tf32_truncation() {
  Fragments f{};
  for (int lane = 0; lane < 32; ++lane) {
    f.a[lane].fill(bits_of(1 + 0x1.8p-11f));
    f.b[lane].fill(bits_of(1));
  }
  launch("mma", mma_kernel<4, 2, mma_tf32_k8>, 1, 32, 0, Execution{}, &f);
  check(f.d[3][2] == 8, "mma_tf32 ignores the low bits of its operands");
}

// ---- ldmatrix -----------------------------------------------------------------------------------

FUSEDCNN_KERNEL(32) load_matrices_kernel(uint32_t (*plain)[4], uint32_t (*transposed)[4]) {
  SharedMemory memory;
  const Shared<uint16_t> values = memory.array<uint16_t>(32 * 8);
  const int lane = thread_index();
  for (int i = 0; i < 8; ++i) values[lane * 8 + i] = static_cast<uint16_t>(lane * 8 + i);
  sync_warp();
  uint32_t r[4];
  load_matrices(r, values + lane * 8);
  for (int i = 0; i < 4; ++i) plain[lane][i] = r[i];
  load_matrices_transposed(r, values + lane * 8);
  for (int i = 0; i < 4; ++i) transposed[lane][i] = r[i];
}

void test_load_matrices() {
  uint32_t plain[32][4], transposed[32][4];
  launch("ldmatrix", load_matrices_kernel, 1, 32, shared_bytes<uint16_t>(32 * 8), Execution{},
         +plain, +transposed);
  bool right = true;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      // Thread (l0, l1) holds elements 2 l0 + v of row l1: 64 to a matrix, 8 to a row.
      const uint32_t at = static_cast<uint32_t>(64 * i + lane / 4 * 8 + lane % 4 * 2);
      right &= plain[lane][i] == (at | (at + 1) << 16);
      const uint32_t turned = static_cast<uint32_t>(64 * i + lane % 4 * 16 + lane / 4);
      right &= transposed[lane][i] == (turned | (turned + 8) << 16);
    }
  }
  check(right, "load_matrices, plain and transposed");
}

}  // namespace

void test_device() {
  const auto before = cuda_on_cpu::options();
  for (const bool late : {true, false}) {
    cuda_on_cpu::options().late_copies = late;
    test_copies<4>();
    test_copies<8>();
    test_copies<16>();
  }
  for (const auto order : {cuda_on_cpu::Order::kForward, cuda_on_cpu::Order::kReverse,
                           cuda_on_cpu::Order::kRunAhead}) {
    cuda_on_cpu::options().order = order;
    test_warp();
    test_load_matrices();
    const Format wide{11, -126, 127};
    test_mma({"mma_tf32_k8", 8, {4, 16, 1, {8, 64, 0}}, {2, 8, 1, {32, 0, 0}}, wide, true},
             mma_kernel<4, 2, mma_tf32_k8>);
    test_mma({"mma_tf32_k4", 4, {2, 16, 1, {8, 0, 0}}, {1, 8, 1, {0, 0, 0}}, wide, true},
             mma_kernel<2, 1, mma_tf32_k4>);
    const Layout a16{8, 32, 1, {16, 8, 128}}, b16{4, 16, 1, {8, 64, 0}};
    const Layout a8{4, 32, 1, {16, 8, 0}}, b8{2, 16, 1, {8, 0, 0}};
    test_mma({"mma_float16_k16", 16, a16, b16, kFloat16Format, false},
             mma_kernel<4, 2, mma_float16_k16>);
    test_mma({"mma_bfloat16_k16", 16, a16, b16, kBFloat16Format, false},
             mma_kernel<4, 2, mma_bfloat16_k16>);
    test_mma({"mma_float16_k8", 8, a8, b8, kFloat16Format, false},
             mma_kernel<2, 1, mma_float16_k8>);
    test_mma({"mma_bfloat16_k8", 8, a8, b8, kBFloat16Format, false},
             mma_kernel<2, 1, mma_bfloat16_k8>);
  }
  test_tf32_truncation();
  test_conversions<BFloat16>(kBFloat16Format, "bfloat16");
  test_conversions<Float16>(kFloat16Format, "float16");
  test_tf32();
  cuda_on_cpu::options() = before;
}

}  // namespace selftest
