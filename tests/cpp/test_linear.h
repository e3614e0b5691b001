// Linear layers of one ISA against sums in double.
#pragma once

#include "cpu/select.h"

namespace selftest {

// Exact on small integers, at sizes around the tiles' and in memory of exactly the tensors' size;
// every gradient by itself; NaN; the same bits whoever runs the tasks.
void test_linear(const fusedcnn::cpu::Isa& isa);

}  // namespace selftest
