// Compiled as C++ for the machine of machine.h, and by nvcc for a GPU (fusedcnn_cuda_probe).
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/device.h"
#include "storage.h"
#include "test_device.h"
#if defined(FUSEDCNN_CUDA_ON_CPU)
#include "machine.h"
#endif

namespace selftest {
namespace {

using namespace fusedcnn::cuda;

// ---- what differs between the machine and a GPU -------------------------------------------------

#if defined(FUSEDCNN_CUDA_ON_CPU)
void* allocate(size_t bytes) { return std::malloc(bytes); }
void release(void* memory) { std::free(memory); }
void finish() {}
#else
void* allocate(size_t bytes) {
  void* memory = nullptr;
  check_launch("(none)", cudaMallocManaged(&memory, bytes), "allocating memory for");
  return memory;
}
void release(void* memory) { cudaFree(memory); }
void finish() { check_launch("(the last)", cudaDeviceSynchronize(), "waiting for"); }
#endif

// Elements, zeros at first, that the host and kernels can use.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t count) : data_(static_cast<T*>(allocate(count * sizeof(T)))) {
    std::memset(static_cast<void*>(data_), 0, count * sizeof(T));
  }
  ~Buffer() { release(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }
  T* operator->() const { return data_; }

 private:
  T* data_;
};

template <typename... Parameters, typename... Arguments>
void run(const char* name, void (*kernel)(Parameters...), int threads, int64_t shared,
         const Arguments&... arguments) {
  launch(name, kernel, 1, threads, shared, Execution{}, arguments...);
  finish();
}

float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// ---- warps --------------------------------------------------------------------------------------

struct WarpResults {
  int from[32], exchanged[32];
  double wide[32];
  uint32_t votes[32];
  int set;
};

FUSEDCNN_KERNEL(32) warp_kernel(WarpResults* results) {
  const int lane = thread_index();
  results->from[lane] = shuffle(100 + lane, (lane + 5) % 32);
  results->exchanged[lane] = shuffle_xor(lane, 3);
  results->wide[lane] = shuffle_xor(lane + 0.5, 16);
  results->votes[lane] = fusedcnn::cuda::ballot(lane % 3 == 0);
  if (lane == 0) results->set = count_bits(0x49249249);
}

void test_warp() {
  const Buffer<WarpResults> results(1);
  run("warp", warp_kernel, 32, 0, results.data());
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; lane += 3) votes |= 1u << lane;
  bool right = true;
  for (int lane = 0; lane < 32; ++lane) {
    right &= results->from[lane] == 100 + (lane + 5) % 32;
    right &= results->exchanged[lane] == (lane ^ 3);
    right &= results->wide[lane] == (lane ^ 16) + 0.5;
    right &= results->votes[lane] == votes;
  }
  check(right && results->set == 11, "shuffle, shuffle_xor, ballot, count_bits");
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
  const Buffer<uint16_t> from(32 * kElements);
  for (int i = 0; i < 32 * kElements; ++i) from[i] = static_cast<uint16_t>(i + 1);
  for (int valid = 0; valid <= Bytes; valid += 2) {
    const Buffer<uint16_t> to(2 * 32 * kElements);
    run("copy", copy_kernel<Bytes>, 32, shared_bytes<uint16_t>(2 * 32 * kElements),
        static_cast<const uint16_t*>(from.data()), to.data(), valid);
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
FUSEDCNN_KERNEL(256)
widen_kernel(const S* from, float* to, int count) {
  for (int i = thread_index(); i < count; i += block_threads())
    to[i] = widen(load_constant(from + i));
}
template <typename S>
FUSEDCNN_KERNEL(256)
narrow_kernel(const float* from, S* to, int count) {
  for (int i = thread_index(); i < count; i += block_threads()) to[i] = narrow<S>(from[i]);
}
FUSEDCNN_KERNEL(256) tf32_kernel(const float* from, uint32_t* to, int count) {
  for (int i = thread_index(); i < count; i += block_threads()) to[i] = to_tf32(from[i]);
}

FUSEDCNN_KERNEL(32) square_root_kernel(const double* from, double* to, int count) {
  for (int i = thread_index(); i < count; i += block_threads()) to[i] = square_root(from[i]);
}

template <typename S>
void test_conversions(Format format, const char* name) {
  constexpr int kAll = 65536;
  const Buffer<S> all(kAll), back(kAll);
  const Buffer<float> wide(kAll);
  for (int bits = 0; bits < kAll; ++bits) all[bits].bits = static_cast<uint16_t>(bits);
  run("widen", widen_kernel<S>, 256, 0, static_cast<const S*>(all.data()), wide.data(), kAll);
  run("narrow", narrow_kernel<S>, 256, 0, static_cast<const float*>(wide.data()), back.data(),
      kAll);
  bool widened = true, round_trip = true;
  for (int bits = 0; bits < kAll; ++bits) {
    const double expected = decode(format, static_cast<uint16_t>(bits));
    const bool nan = std::isnan(expected);
    widened &= nan ? std::isnan(wide[bits]) : wide[bits] == expected;
    widened &= nan || std::signbit(wide[bits]) == std::signbit(expected);
    round_trip &= nan ? std::isnan(decode(format, back[bits].bits)) : back[bits].bits == bits;
  }
  check(widened, std::string("widen: all ") + name);
  check(round_trip, std::string("narrow: all ") + name);
  // Between neighbours, and where it matters most: ties, carries, overflow, what underflows.
  std::vector<float> values;
  for (int bits = 0; bits < 0x7fff; ++bits) {
    const auto low = static_cast<float>(decode(format, static_cast<uint16_t>(bits)));
    const auto high = static_cast<float>(decode(format, static_cast<uint16_t>(bits + 1)));
    if (!std::isfinite(low) || std::isnan(high)) continue;
    const float middle = std::isfinite(high) ? low + (high - low) / 2 : low * 1.001f;
    for (const float value : {middle, std::nextafterf(middle, 0.f), std::nextafterf(middle, 1e38f),
                              -middle, low * 1.0001f}) {
      values.push_back(value);
    }
  }
  const int count = static_cast<int>(values.size());
  const Buffer<float> from(values.size());
  const Buffer<S> to(values.size());
  std::memcpy(from.data(), values.data(), values.size() * sizeof(float));
  run("narrow", narrow_kernel<S>, 256, 0, static_cast<const float*>(from.data()), to.data(), count);
  bool narrowed = count > 1000;
  for (int i = 0; i < count; ++i) narrowed &= to[i].bits == encode(format, values[i]);
  check(narrowed, std::string("narrow: between all ") + name);
}

void test_tf32() {
  // Ties go away from zero.
  const std::vector<float> values = {
      1, 1 + 0x1p-10f, 1 + 0x1p-12f, 1 + 0x1p-11f, -1 - 0x1p-11f, 2 - 0x1p-12f, 0x1p127f, 0};
  const std::vector<float> expected = {1, 1 + 0x1p-10f, 1, 1 + 0x1p-10f, -1 - 0x1p-10f,
                                       2, 0x1p127f,     0};
  const Buffer<float> from(values.size());
  const Buffer<uint32_t> to(values.size());
  std::memcpy(from.data(), values.data(), values.size() * sizeof(float));
  run("tf32", tf32_kernel, 256, 0, static_cast<const float*>(from.data()), to.data(),
      static_cast<int>(values.size()));
  bool right = true;
  for (size_t i = 0; i < values.size(); ++i) right &= as_float(to[i] & 0xffffe000) == expected[i];
  check(right, "to_tf32 rounds to ten bits, ties away from zero");
}

void test_square_root() {
  const std::vector<double> values = {0, 1, 2, 3, 1e-5, 0x1p-1074, 9.0e16, HUGE_VAL};
  const std::vector<double> expected = {
      0,   1,       0x1.6a09e667f3bcdp+0, 0x1.bb67ae8584caap+0, 0x1.9e7c6e43390b7p-9, 0x1p-537,
      3e8, HUGE_VAL};
  const Buffer<double> from(values.size()), to(values.size());
  std::memcpy(from.data(), values.data(), values.size() * sizeof(double));
  run("square_root", square_root_kernel, 32, 0, static_cast<const double*>(from.data()), to.data(),
      static_cast<int>(values.size()));
  bool right = true;
  for (size_t i = 0; i < values.size(); ++i) right &= to[i] == expected[i];
  check(right, "square_root is rounded to nearest");
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

using Lanes = uint32_t[32][4];
struct Fragments {
  Lanes a, b;
  float c[32][4], d[32][4];
};

// The instructions as types, with the numbers of registers of a and b.
#define FUSEDCNN_INSTRUCTION(function, registers_a, registers_b)                     \
  struct function##_call {                                                           \
    static constexpr int kA = registers_a, kB = registers_b;                         \
    static FUSEDCNN_DEVICE void call(float (&d)[4], const uint32_t (&a)[kA],         \
                                     const uint32_t (&b)[kB], const float (&c)[4]) { \
      function(d, a, b, c);                                                          \
    }                                                                                \
  };
FUSEDCNN_INSTRUCTION(mma_tf32_k8, 4, 2)
FUSEDCNN_INSTRUCTION(mma_tf32_k4, 2, 1)
FUSEDCNN_INSTRUCTION(mma_float16_k16, 4, 2)
FUSEDCNN_INSTRUCTION(mma_bfloat16_k16, 4, 2)
FUSEDCNN_INSTRUCTION(mma_float16_k8, 2, 1)
FUSEDCNN_INSTRUCTION(mma_bfloat16_k8, 2, 1)
#undef FUSEDCNN_INSTRUCTION

template <typename Call>
FUSEDCNN_KERNEL(32)
mma_kernel(Fragments* f) {
  const int lane = thread_index();
  uint32_t a[Call::kA], b[Call::kB];
  float c[4], d[4];
  for (int i = 0; i < Call::kA; ++i) a[i] = f->a[lane][i];
  for (int i = 0; i < Call::kB; ++i) b[i] = f->b[lane][i];
  for (int i = 0; i < 4; ++i) c[i] = f->c[lane][i];
  Call::call(d, a, b, c);
  for (int i = 0; i < 4; ++i) f->d[lane][i] = d[i];
}

// Puts matrix[place] into the lanes' registers.
void distribute(const Instruction& one, const Layout& layout, const std::vector<double>& matrix,
                Lanes* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < layout.elements; ++i) {
      const double value = matrix[static_cast<size_t>(layout.place(lane, i))];
      if (one.wide) {
        (*lanes)[lane][i] = as_bits(static_cast<float>(value));
      } else {
        (*lanes)[lane][i / 2] |= static_cast<uint32_t>(encode(one.format, value)) << (i % 2 * 16);
      }
    }
  }
}

template <typename Call>
void test_mma(const Instruction& one) {
  // Small integers, all products and sums exact; every element differs from its neighbours.
  std::vector<double> a(16 * one.depth), b(8 * one.depth), c(128);
  for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<double>(i * 7 % 23) - 11;
  for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<double>(i * 5 % 19) - 9;
  for (size_t i = 0; i < c.size(); ++i) c[i] = static_cast<double>(i);
  const Buffer<Fragments> f(1);
  distribute(one, one.a, a, &f->a);
  distribute(one, one.b, b, &f->b);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) f->c[lane][i] = static_cast<float>(c[kD.place(lane, i)]);
  }
  run(one.name, mma_kernel<Call>, 32, 0, f.data());
  bool right = true;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int at = kD.place(lane, i), row = at % 16, col = at / 16;
      double expected = c[at];
      for (int k = 0; k < one.depth; ++k) expected += a[row + 16 * k] * b[col + 8 * k];
      right &= f->d[lane][i] == expected;
    }
  }
  check(right, std::string(one.name) + " multiplies by the layouts of its fragments");
}

// That a tf32 operand which was not rounded is truncated.
void test_tf32_truncation() {
  const Buffer<Fragments> f(1);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      f->a[lane][i] = as_bits(1 + 0x1.8p-11f);
      f->b[lane][i] = as_bits(1);
    }
  }
  run("mma", mma_kernel<mma_tf32_k8_call>, 32, 0, f.data());
  check(f->d[3][2] == 8, "mma_tf32 ignores the low bits of its operands");
}

// ---- ldmatrix -----------------------------------------------------------------------------------

struct Matrices {
  uint32_t plain[32][4], transposed[32][4];
};

FUSEDCNN_KERNEL(32) load_matrices_kernel(Matrices* m) {
  SharedMemory memory;
  const Shared<uint16_t> values = memory.array<uint16_t>(32 * 8);
  const int lane = thread_index();
  for (int i = 0; i < 8; ++i) values[lane * 8 + i] = static_cast<uint16_t>(lane * 8 + i);
  sync_warp();
  uint32_t r[4];
  load_matrices(r, values + lane * 8);
  for (int i = 0; i < 4; ++i) m->plain[lane][i] = r[i];
  load_matrices_transposed(r, values + lane * 8);
  for (int i = 0; i < 4; ++i) m->transposed[lane][i] = r[i];
}

void test_load_matrices() {
  const Buffer<Matrices> m(1);
  run("ldmatrix", load_matrices_kernel, 32, shared_bytes<uint16_t>(32 * 8), m.data());
  bool right = true;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      // Thread (l0, l1) holds elements 2 l0 + v of row l1: 64 to a matrix, 8 to a row.
      const uint32_t at = static_cast<uint32_t>(64 * i + lane / 4 * 8 + lane % 4 * 2);
      right &= m->plain[lane][i] == (at | (at + 1) << 16);
      const uint32_t turned = static_cast<uint32_t>(64 * i + lane % 4 * 16 + lane / 4);
      right &= m->transposed[lane][i] == (turned | (turned + 8) << 16);
    }
  }
  check(right, "load_matrices, plain and transposed");
}

void test_mma() {
  const Format wide{11, -126, 127};
  test_mma<mma_tf32_k8_call>(
      {"mma_tf32_k8", 8, {4, 16, 1, {8, 64, 0}}, {2, 8, 1, {32, 0, 0}}, wide, true});
  test_mma<mma_tf32_k4_call>(
      {"mma_tf32_k4", 4, {2, 16, 1, {8, 0, 0}}, {1, 8, 1, {0, 0, 0}}, wide, true});
  const Layout a16{8, 32, 1, {16, 8, 128}}, b16{4, 16, 1, {8, 64, 0}};
  const Layout a8{4, 32, 1, {16, 8, 0}}, b8{2, 16, 1, {8, 0, 0}};
  test_mma<mma_float16_k16_call>({"mma_float16_k16", 16, a16, b16, kFloat16Format, false});
  test_mma<mma_bfloat16_k16_call>({"mma_bfloat16_k16", 16, a16, b16, kBFloat16Format, false});
  test_mma<mma_float16_k8_call>({"mma_float16_k8", 8, a8, b8, kFloat16Format, false});
  test_mma<mma_bfloat16_k8_call>({"mma_bfloat16_k8", 8, a8, b8, kBFloat16Format, false});
}

void test_all() {
  test_warp();
  test_copies<4>();
  test_copies<8>();
  test_copies<16>();
  test_load_matrices();
  test_mma();
  test_tf32_truncation();
}

}  // namespace

void test_device() {
#if defined(FUSEDCNN_CUDA_ON_CPU)
  const auto before = cuda_on_cpu::options();
  for (const bool late : {true, false}) {
    for (const auto order : {cuda_on_cpu::Order::kForward, cuda_on_cpu::Order::kReverse,
                             cuda_on_cpu::Order::kRunAhead}) {
      cuda_on_cpu::options().late_copies = late;
      cuda_on_cpu::options().order = order;
      test_all();
    }
  }
  cuda_on_cpu::options() = before;
#else
  test_all();
#endif
  test_conversions<BFloat16>(kBFloat16Format, "bfloat16");
  test_conversions<Float16>(kFloat16Format, "float16");
  test_tf32();
  test_square_root();
}

}  // namespace selftest
