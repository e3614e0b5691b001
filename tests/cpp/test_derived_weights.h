// Tests of the cache of derived weights.
#pragma once

namespace selftest {

void test_derived_weights();

}  // namespace selftest
