// Selection and forcing, and the conversions of the half types.
#pragma once

#include "cpu/select.h"

namespace selftest {

void test_select();

// widen() and narrow() of one ISA over all 65536 patterns and what lies between them.
void test_conversions(const fusedcnn::cpu::Isa& isa);

}  // namespace selftest
