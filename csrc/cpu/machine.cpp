#include "cpu/machine.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fusedcnn::cpu {
namespace {

#if defined(__x86_64__)

bool bit(unsigned bits, int index) { return bits >> index & 1; }

// Linux grants the tiles' 8 KB of state to a process that asks for it, and to its later threads.
bool tiles_granted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Machine look() {
  unsigned a = 0, b = 0, c = 0, d = 0, a1 = 0, unused = 0;
  // AVX-512 without the operating system's support for its registers is none.
  if (!__builtin_cpu_supports("avx512bw") || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {};
  if (a >= 1) __get_cpuid_count(7, 1, &a1, &unused, &unused, &unused);
  const bool tiles = bit(d, 22) && bit(d, 24);  // AMX-BF16 and AMX-TILE
  return {bit(a1, 5), tiles && tiles_granted()};
}

#else

Machine look() { return {}; }

#endif

}  // namespace

const Machine& machine() {
  static const Machine here = look();
  return here;
}

}  // namespace fusedcnn::cpu
