// csrc/cuda/device.h on a CPU: the same names, the same meaning, and checks. See machine.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cuda/launch.h"
#include "cuda_on_cpu/machine.h"

#define FUSEDCNN_KERNEL(threads) void
#define FUSEDCNN_KERNEL_RESIDENT(threads, blocks) void
#define FUSEDCNN_DEVICE inline
#define FUSEDCNN_UNROLL
#define FUSEDCNN_NO_UNROLL

// Default arguments that name the caller's line.
#define FUSEDCNN_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace fusedcnn::cuda {

// ---- threads ------------------------------------------------------------------------------------

inline int thread_index() { return cuda_on_cpu::current->index; }
inline int fresh_thread_index() { return thread_index(); }
inline int block_threads() { return cuda_on_cpu::block.threads; }
inline int64_t block_index() { return cuda_on_cpu::block.index; }
inline int64_t grid_blocks() { return cuda_on_cpu::block.count; }

inline void sync_threads(FUSEDCNN_SITE) { cuda_on_cpu::barrier({file, line}); }
inline void sync_warp(FUSEDCNN_SITE) { cuda_on_cpu::meet_and_order({file, line}); }

template <typename T>
T lane_value(const unsigned char* values, int lane) {
  T value;
  std::memcpy(&value, values + lane * cuda_on_cpu::kLaneBytes, sizeof value);
  return value;
}

template <typename T>
T shuffle(T value, int lane, FUSEDCNN_SITE) {
  return lane_value<T>(cuda_on_cpu::meet(2, {file, line}, &value, sizeof value, nullptr),
                       lane & (kWarp - 1));
}
template <typename T>
T shuffle_xor(T value, int mask, FUSEDCNN_SITE) {
  return lane_value<T>(cuda_on_cpu::meet(3, {file, line}, &value, sizeof value, nullptr),
                       (cuda_on_cpu::current->lane ^ mask) & (kWarp - 1));
}
inline uint32_t ballot(bool predicate, FUSEDCNN_SITE) {
  const unsigned char* const values =
      cuda_on_cpu::meet(4, {file, line}, &predicate, sizeof predicate, nullptr);
  uint32_t bits = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    bits |= static_cast<uint32_t>(lane_value<bool>(values, lane)) << lane;
  }
  return bits;
}
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

// ---- shared memory ------------------------------------------------------------------------------

template <int N, typename T>
struct alignas(N * sizeof(T)) Pack {
  T values[N];
};

// A pointer into shared memory that knows its array, and notes every access.
template <typename T>
class Shared {
 public:
  class Reference {
   public:
    Reference(cuda_on_cpu::SharedArray* array, int64_t at) : array_(array), at_(at) {}
    operator T() const {
      cuda_on_cpu::check_bounds(*array_, at_, 1);
      cuda_on_cpu::note_read(*array_, at_);
      return reinterpret_cast<const T*>(array_->data)[at_];
    }
    const Reference& operator=(T value) const {
      cuda_on_cpu::check_bounds(*array_, at_, 1);
      cuda_on_cpu::note_write(*array_, at_);
      reinterpret_cast<T*>(array_->data)[at_] = value;
      return *this;
    }
    const Reference& operator=(const Reference& other) const {
      return *this = static_cast<T>(other);
    }
    const Reference& operator+=(T value) const { return *this = static_cast<T>(*this) + value; }

   private:
    cuda_on_cpu::SharedArray* array_;
    int64_t at_;
  };

  Shared() = default;
  Shared(cuda_on_cpu::SharedArray* array, int64_t at) : array_(array), at_(at) {}
  Reference operator[](int64_t i) const { return {array_, at_ + i}; }
  Reference operator*() const { return {array_, at_}; }
  Shared operator+(int64_t i) const { return {array_, at_ + i}; }
  Shared operator-(int64_t i) const { return {array_, at_ - i}; }
  Shared& operator+=(int64_t i) { return at_ += i, *this; }

  cuda_on_cpu::SharedArray* array() const { return array_; }
  int64_t at() const { return at_; }
  // `count` elements from here on, checked to lie in the array and to be aligned.
  T* checked(int64_t count, int64_t alignment) const {
    cuda_on_cpu::check_bounds(*array_, at_, count);
    if (at_ * static_cast<int64_t>(sizeof(T)) % alignment) {
      cuda_on_cpu::fail_access(*array_, at_, "is not aligned for this access", -1);
    }
    return reinterpret_cast<T*>(array_->data) + at_;
  }

 private:
  cuda_on_cpu::SharedArray* array_ = nullptr;
  int64_t at_ = 0;
};

class SharedMemory {
 public:
  template <typename T>
  Shared<T> array(int64_t count) {
    return {cuda_on_cpu::shared_array(sizeof(T), count), 0};
  }
};

template <int N, typename T>
Pack<N, T> load_pack(Shared<T> from) {
  const T* const at = from.checked(N, N * sizeof(T));
  for (int i = 0; i < N; ++i) cuda_on_cpu::note_read(*from.array(), from.at() + i);
  Pack<N, T> pack;
  std::memcpy(pack.values, at, sizeof pack.values);
  return pack;
}
template <int N, typename T>
void store_pack(Shared<T> to, const Pack<N, T>& pack) {
  T* const at = to.checked(N, N * sizeof(T));
  for (int i = 0; i < N; ++i) cuda_on_cpu::note_write(*to.array(), to.at() + i);
  std::memcpy(at, pack.values, sizeof pack.values);
}
inline void check_global_alignment(const void* at, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(at) % bytes) {
    cuda_on_cpu::fail("misaligned access of " + std::to_string(bytes) + " bytes of global memory");
  }
}
template <int N, typename T>
Pack<N, T> load_pack(const T* from) {
  check_global_alignment(from, N * sizeof(T));
  Pack<N, T> pack;
  std::memcpy(pack.values, from, sizeof pack.values);
  return pack;
}
template <int N, typename T>
void store_pack(T* to, const Pack<N, T>& pack) {
  check_global_alignment(to, N * sizeof(T));
  std::memcpy(to, pack.values, sizeof pack.values);
}

// ---- global memory ------------------------------------------------------------------------------

template <typename T>
T load_constant(const T* from) {
  return *from;
}

template <int Bytes, typename T>
void copy_async(Shared<T> to, const T* from, int valid = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  if (valid < 0 || valid > Bytes) cuda_on_cpu::fail("asynchronous copy of an impossible size");
  if (valid) check_global_alignment(from, Bytes);
  T* const at = to.checked(Bytes / sizeof(T), Bytes);
  cuda_on_cpu::issue_copy({reinterpret_cast<unsigned char*>(at),
                           reinterpret_cast<const unsigned char*>(from), Bytes, valid, to.array(),
                           to.at()});
}
inline void commit_copies() { cuda_on_cpu::commit_copies(); }
template <int Pending>
void wait_copies() {
  cuda_on_cpu::wait_copies(Pending);
}

// ---- numbers ------------------------------------------------------------------------------------

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
inline float widen(Float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // Multiplying by 2^112 moves the exponent's bias, and normalises what is subnormal.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

template <typename S>
S narrow(Accumulator<S> value) {
  return value;
}
template <>
inline BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Float16 narrow<Float16>(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const auto with_sign = [&](uint32_t result) {
    return Float16{static_cast<uint16_t>(sign | result)};
  };
  if (magnitude > 0x7f800000) return {0x7fff};
  if (magnitude >= 0x477ff000) return with_sign(0x7c00);  // 65520 and more round to infinity
  if (magnitude < 0x38800000) {
    // Subnormal: adding 0.5 makes the sum's own rounding drop the right bits.
    return with_sign(bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
  }
  const uint32_t rebased = magnitude - 0x38000000;
  return with_sign((rebased + 0xfff + (rebased >> 13 & 1)) >> 13);
}

inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline double multiply_add(double a, double b, double c) { return std::fma(a, b, c); }
inline float max_or_nan(float a, float b) { return a > b || a != a ? a : b; }
inline double square_root(double value) { return std::sqrt(value); }
template <typename T>
T infinity() {
  return std::numeric_limits<T>::infinity();
}

inline uint32_t to_tf32(float value) {
  const uint32_t bits = bits_of(value);
  // Half of the last kept place added to the magnitude rounds ties away from zero.
  return value != value ? 0x7fffffff : (bits + 0x1000) & 0xffffe000;
}

}  // namespace fusedcnn::cuda

#include "cuda_on_cpu/matrix_on_cpu.h"

namespace fusedcnn::cuda {

// ---- launch -------------------------------------------------------------------------------------

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
            int64_t shared, const Execution&, const Arguments&... arguments) {
  const auto body = [&] { kernel(arguments...); };
  cuda_on_cpu::run(
      name, blocks, threads, shared,
      [](void* context) { (*static_cast<decltype(body)*>(context))(); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace fusedcnn::cuda
