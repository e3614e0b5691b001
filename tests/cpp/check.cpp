#include "check.h"

#include <cstdio>
#include <cstdlib>

namespace selftest {
namespace {

constexpr int kPrinted = 40;  // failures beyond these are only counted
int pass_count = 0;
int fail_count = 0;
bool stops = false;

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

int passed() { return pass_count; }
int failed() { return fail_count; }

}  // namespace selftest
