// A block with batch normalisation, forward and backward, on one ISA's kernels and passes.
#pragma once

#include "cpu/select.h"

namespace selftest {

// Every case against a reference in double, in all types and layouts, in each way to run the tasks
// (where `quick`, one way by turns).
void test_batch_norm(const fusedcnn::cpu::Isa& isa, bool quick);

}  // namespace selftest
