// Tests of the fully connected layer.
#pragma once

#include "cpu/select.h"

namespace selftest {

// Exact on small integers, for sizes around those of tiles and vectors; nothing read or written
// outside of its operands; an output's bits those of the same output on its own.
void test_linear(const fusedcnn::cpu::Isa& isa);

}  // namespace selftest
