// Counting checks of the self-test: each prints what it was about when it fails.
#pragma once

#include <string>

namespace selftest {

// Counts the check and returns `ok`. Failures print `what`, the first few dozen of them.
bool check(bool ok, const std::string& what);

int passed();
int failed();

}  // namespace selftest
