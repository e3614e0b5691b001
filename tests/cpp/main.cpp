// Self-test of the CPU kernels, free of torch and of Python: for sanitizers, emulators and cross
// builds. Exits with 1 when a check failed and with 2 on bad arguments.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/select.h"
#include "cpu_backend.h"
#include "fuzz.h"
#include "test_batch_norm.h"
#include "test_dense_gradients.h"
#include "test_derived_weights.h"
#include "test_kernels.h"
#include "test_linear.h"
#include "test_moments.h"
#include "test_scratch.h"
#include "test_select.h"
#include "test_tiles.h"
#include "test_without_relu.h"

namespace {

constexpr char kUsage[] =
    "usage: fusedcnn_selftest [--quick] [--share K/N] [--isa NAME] [--expect NAME]\n"
    "                         [--fuzz COUNT [--seed S]]\n"
    "  --quick        a third of the calls: every kernel, case, type and layout, but not each\n"
    "                 layout with each way of running the tasks\n"
    "  --share K/N    share K (from 0) of the calls, of N that make the whole together\n"
    "  --isa NAME     only this ISA; fails when the machine lacks it\n"
    "  --expect NAME  fails unless this ISA is the one selected on this machine\n"
    "  --fuzz COUNT   instead of all that: as many geometries drawn at random, for each ISA\n"
    "  --seed S       of the random numbers (default: 1)\n";

}  // namespace

int main(int count, char** arguments) {
  bool quick = false;
  std::string only, expected;
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
    } else if (argument == "--isa" && i + 1 < count) {
      only = arguments[++i];
    } else if (argument == "--expect" && i + 1 < count) {
      expected = arguments[++i];
    } else if (argument == "--fuzz" && i + 1 < count) {
      fuzz_count = std::atoll(arguments[++i]);
    } else if (argument == "--seed" && i + 1 < count) {
      seed = std::strtoull(arguments[++i], nullptr, 10);
    } else {
      std::fputs(kUsage, stderr);
      return 2;
    }
  }

  const std::string selected = fusedcnn::cpu::selected_isa().name;
  std::printf("selected ISA: %s\n", selected.c_str());
  if (!expected.empty()) {
    selftest::check(selected == expected, "expected ISA " + expected + ", selected " + selected);
  }
  if (fuzz_count == 0) {
    selftest::test_select();
    selftest::test_scratch();
    selftest::test_derived_weights();
  }
  bool found = only.empty();
  std::vector<fusedcnn::cpu::Isa> isas = fusedcnn::cpu::isas();
  for (const fusedcnn::cpu::Isa& emulated : selftest::emulated_isas()) isas.push_back(emulated);
  for (const fusedcnn::cpu::Isa& isa : isas) {
    if (!only.empty() && only != isa.name) continue;
    found = true;
    if (!isa.supported) {
      std::printf("  %-8s NOT RUN: this machine lacks it\n", isa.name);
      selftest::check(only.empty(), "this machine lacks " + only);
      continue;
    }
    const selftest::Backend backend = selftest::cpu_backend(isa);
    if (fuzz_count > 0) {
      selftest::fuzz(backend, seed, fuzz_count);
      continue;
    }
    if (!isa.base) selftest::test_conversions(isa);  // a feature has none of its own
    selftest::test_tile_products(isa);
    selftest::test_exact(backend, quick);
    selftest::test_special_values(backend);
    selftest::test_without_relu(backend, quick);
    selftest::test_dense_gradients(backend, quick);
    selftest::test_moments(backend);
    selftest::test_optional_arguments(backend);
    selftest::test_rounding(backend);
    selftest::test_determinism(backend);
    if (isa.list.norm) selftest::test_batch_norm(isa, quick);
    if (isa.list.linear) selftest::test_linear(isa);
  }
  selftest::check(found, "no ISA named " + only + " was compiled in");
  std::printf("%d passed, %d failed\n", selftest::passed(), selftest::failed());
  return selftest::failed() ? 1 : 0;
}
