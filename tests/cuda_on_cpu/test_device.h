// Every function of csrc/cuda/device.h against what it is to do, the matrix instructions against a
// second statement of their layouts.
#pragma once

namespace selftest {

void test_device();

}  // namespace selftest
