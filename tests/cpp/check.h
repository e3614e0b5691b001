// Counting checks of the self-test: each prints what it was about when it fails.
#pragma once

#include <cstdint>
#include <string>

namespace selftest {

// Counts the check and returns `ok`. Failures print `what`, the first few dozen of them.
bool check(bool ok, const std::string& what);

// From now on a failure ends the program, with 1.
void stop_at_first_failure();

// From now on only calls of share `index` of `count` are made. The shares are equal and drawn by a
// fixed hash of the calls' order; all of them together make the whole.
void take_share(int64_t index, int64_t count);

// Whether the next call is to be made.
bool in_share();

int passed();
int failed();

}  // namespace selftest
