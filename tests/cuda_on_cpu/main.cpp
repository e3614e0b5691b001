// Self-test of the CUDA kernels on a CPU: no GPU, no CUDA toolkit, no torch. Exits with 1 when a
// check failed and with 2 on bad arguments.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "check.h"
#include "cuda_backend.h"
#include "fuzz.h"
#include "test_batch_norm.h"
#include "test_cuda_select.h"
#include "test_device.h"
#include "test_kernels.h"
#include "test_machine.h"
#include "test_products.h"
#include "test_transpose.h"

namespace {

constexpr char kUsage[] =
    "usage: fusedcnn_cuda_selftest [--quick] [--share K/N] [--stop] [--fuzz COUNT [--seed S]]\n"
    "  --quick  a quarter of the calls: every kernel, case, type and layout, but not each layout "
    "in\n"
    "           each order of threads\n"
    "  --share K/N   share K (from 0) of the calls, of N that make the whole together\n"
    "  --stop   ends with the first failure\n"
    "  --fuzz COUNT  instead of all that: as many geometries drawn at random\n"
    "  --seed S      of the random numbers (default: 1)\n";

void all_tests(bool quick) {
  selftest::test_machine();
  selftest::test_device();
  selftest::test_cuda_select();
  selftest::test_transpose(selftest::transpose_backend());
  selftest::test_batch_norm(selftest::norm_backend(), quick);
  const selftest::Backend backend = selftest::cuda_backend();
  selftest::test_float32_products(backend);  // few calls, which tell much
  selftest::test_tf32_rounding(backend);
  selftest::test_rounding(selftest::cuda_backend(/*allow_tf32=*/false));
  selftest::test_exact(backend, quick);
  selftest::test_special_values(backend);
  selftest::test_optional_arguments(backend);
  selftest::test_stray_codes(backend);
  selftest::test_determinism(backend);
}

}  // namespace

int main(int count, char** arguments) {
  bool quick = false;
  int64_t fuzz_count = 0;
  uint64_t seed = 1;
  int share = 0, shares = 1;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--quick") {
      quick = true;
    } else if (argument == "--share" && i + 1 < count &&
               std::sscanf(arguments[i + 1], "%d/%d", &share, &shares) == 2 && share >= 0 &&
               share < shares) {
      selftest::take_share(share, shares);
      ++i;
    } else if (argument == "--stop") {
      selftest::stop_at_first_failure();
    } else if (argument == "--fuzz" && i + 1 < count) {
      fuzz_count = std::atoll(arguments[++i]);
    } else if (argument == "--seed" && i + 1 < count) {
      seed = std::strtoull(arguments[++i], nullptr, 10);
    } else {
      std::fputs(kUsage, stderr);
      return 2;
    }
  }
  if (fuzz_count > 0) {
    selftest::fuzz(selftest::cuda_backend(), seed, fuzz_count);
  } else {
    all_tests(quick);
  }
  std::printf("%d passed, %d failed\n", selftest::passed(), selftest::failed());
  return selftest::failed() ? 1 : 0;
}
