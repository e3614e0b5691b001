// Every kernel of one backend (an ISA of the CPU's, or CUDA) against the reference.
#pragma once

#include "backend.h"

namespace selftest {

// All cases, types, codes, layouts and ways; `quick` takes each way with some layouts only.
void test_exact(const Backend& backend, bool quick);

// NaN, infinities, negative zeros, ties, large values, gradients where ReLU is off.
void test_special_values(const Backend& backend);

// Results that may be left out, and operands that are then null; expanded tensors.
void test_optional_arguments(const Backend& backend);

// Long sums of float data: their rounding errors, beside those of sums in short chains.
void test_rounding(const Backend& backend);

// Where codes are taken as they come: those that name no element of their windows move no gradient,
// and lead nowhere.
void test_stray_codes(const Backend& backend);

// Float data: the same bits whatever the way.
void test_determinism(const Backend& backend);

}  // namespace selftest
