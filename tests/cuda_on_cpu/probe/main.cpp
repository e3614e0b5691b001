// Every function of csrc/cuda/device.h on a GPU: what the kernels rest on, and what the self-test
// on the CPU can only imitate. Exits with 1 when a check failed. Needs sm_80 or later.
#include <cstdio>
#include <exception>

#include "check.h"
#include "test_device.h"

int main() {
  try {
    selftest::test_device();
  } catch (const std::exception& error) {
    selftest::check(false, error.what());
  }
  std::printf("%d passed, %d failed\n", selftest::passed(), selftest::failed());
  return selftest::failed() ? 1 : 0;
}
