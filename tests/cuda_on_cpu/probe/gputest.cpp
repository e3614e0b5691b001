// Self-test of the CUDA kernels on a GPU: no torch, nothing but their own launches, so that
// compute-sanitizer has nothing else to look at. Exits with 1 when a check failed and with 2 on bad
// arguments.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#include "check.h"
#include "gpu_backend.h"
#include "test_batch_norm.h"
#include "test_kernels.h"
#include "test_products.h"
#include "test_transpose.h"

namespace {

constexpr char kUsage[] =
    "usage: fusedcnn_cuda_gputest [--quick] [--share K/N] [--stop] [--seconds S]\n"
    "  --quick      each layout in one way of running only\n"
    "  --share K/N  share K (from 0) of the calls, of N that make the whole together\n"
    "  --stop       ends with the first failure\n"
    "  --seconds    begins nothing more after so many, and says how much was left out\n";

}  // namespace

int main(int count, char** arguments) {
  bool quick = false;
  double seconds = 0;
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
    } else if (argument == "--seconds" && i + 1 < count && std::atof(arguments[i + 1]) > 0) {
      seconds = std::atof(arguments[++i]);
    } else {
      std::fputs(kUsage, stderr);
      return 2;
    }
  }
  try {
    const selftest::Backend backend = selftest::gpu_backend(seconds);
    // Few calls first: where a sanitizer is slow, they are what it gets to see.
    selftest::test_transpose(selftest::gpu_transpose_backend());
    selftest::test_batch_norm(selftest::gpu_norm_backend(), quick || seconds > 0);
    selftest::test_optional_arguments(backend);
    selftest::test_special_values(backend);
    selftest::test_float32_products(backend);
    selftest::test_tf32_rounding(backend);
    selftest::test_stray_codes(backend);
    selftest::test_determinism(backend);
    selftest::test_exact(backend, quick);
  } catch (const std::exception& error) {
    selftest::check(false, error.what());
  }
  if (const auto left_out = static_cast<long long>(selftest::problems_left_out())) {
    std::printf("the time was over: %lld problems left out\n", left_out);
  }
  std::printf("%d passed, %d failed\n", selftest::passed(), selftest::failed());
  return selftest::failed() ? 1 : 0;
}
