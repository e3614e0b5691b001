// The kernels of one ISA, run on one thread in order, on one in reverse order, and on three.
#pragma once

#include "backend.h"
#include "cpu/select.h"

namespace selftest {

Backend cpu_backend(const fusedcnn::cpu::Isa& isa);

}  // namespace selftest
