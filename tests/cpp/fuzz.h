// Every kernel on geometries, layouts and data that nobody thought of.
#pragma once

#include <cstdint>

#include "backend.h"

namespace selftest {

// Draws `count` geometries from `seed` and runs each on all kernels that cover it, in an element
// type, a layout and an order of tasks drawn for each call. The tensors lie at pages that nobody
// may touch, memory that nobody wrote holds signalling NaNs. Prints how many geometries and calls
// there were.
void fuzz(const Backend& backend, uint64_t seed, int64_t count);

}  // namespace selftest
