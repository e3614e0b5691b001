// That the machine sees what it is there to see: every fault of a kernel that it claims to find.
#pragma once

namespace selftest {

void test_machine();

}  // namespace selftest
