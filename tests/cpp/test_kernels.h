// Every kernel of one ISA against the reference.
#pragma once

#include "cpu/select.h"

namespace selftest {

// All cases, types, codes, layouts and pools; `quick` takes each pool with some layouts only.
void test_exact(const fusedcnn::cpu::Isa& isa, bool quick);

// NaN, infinities, negative zeros, ties, gradients where ReLU is off.
void test_special_values(const fusedcnn::cpu::Isa& isa);

// Results that may be left out, and operands that are then null; expanded tensors.
void test_optional_arguments(const fusedcnn::cpu::Isa& isa);

// Float data: the same bits whatever the threads.
void test_determinism(const fusedcnn::cpu::Isa& isa);

}  // namespace selftest
