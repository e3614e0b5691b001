// The kernels of one ISA, run on one thread in order, on one in reverse order, and on three.
//
// All memory that a kernel has not written yet holds signalling NaNs, and so do the gaps between
// the elements of its tensors. Arithmetic on one of them (comparisons and conversions included)
// sets the processor's flag of an invalid operation, even where the result is thrown away; copies
// and shuffles, which do no harm, set none. Small integers lead to no other invalid operation.
// Beside subnormals, which would set x86's flag of a denormal operand, a NaN also shows in results,
// works on every processor that has IEEE 754's flags, qemu's included, and leads astray where it is
// taken for a place in a list.
#pragma once

#include "backend.h"
#include "cpu/select.h"

namespace selftest {

Backend cpu_backend(const fusedcnn::cpu::Isa& isa);

// body(pool) in one of the backend's ways, in a thread of its own. Returns what it did with memory
// that nobody had written, as Backend::misuse tells it.
std::string run_watched(fusedcnn::DataType type, int way,
                        const std::function<void(const fusedcnn::cpu::ThreadPool&)>& body);

}  // namespace selftest
