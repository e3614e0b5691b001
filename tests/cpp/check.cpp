#include "check.h"

#include <cstdio>
#include <cstdlib>

namespace selftest {
namespace {

constexpr int kPrinted = 40;  // failures beyond these are only counted
int pass_count = 0;
int fail_count = 0;
bool stops = false;
uint64_t share = 0;
uint64_t shares = 1;
uint64_t asked = 0;

}  // namespace

bool check(bool ok, const std::string& what) {
  if (ok) {
    ++pass_count;
  } else if (++fail_count <= kPrinted) {
    std::printf("FAILED: %s\n", what.c_str());
  }
  if (!ok && stops) std::exit(1);
  return ok;
}

void stop_at_first_failure() { stops = true; }

void take_share(int64_t index, int64_t count) {
  share = static_cast<uint64_t>(index);
  shares = static_cast<uint64_t>(count);
}

// Not in turn: calls that follow each other differ in their layout and their way, which a share
// would see some of only.
bool in_share() { return (asked++ * 0x9e3779b97f4a7c15 >> 32) % shares == share; }

int passed() { return pass_count; }
int failed() { return fail_count; }

}  // namespace selftest
