// Counting checks of the self-test: each prints what it was about when it fails.
#pragma once

#include <string>

namespace selftest {

// Counts the check and returns `ok`. Failures print `what`, the first few dozen of them.
bool check(bool ok, const std::string& what);

// From now on a failure ends the program, with 1.
void stop_at_first_failure();

int passed();
int failed();

}  // namespace selftest
