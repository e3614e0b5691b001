// The CPU kernels of a feature beside AVX-512. Compiled once per feature, with FUSEDCNN_ISA naming
// its namespace.
#include "cpu/kernel.h"

namespace fusedcnn::cpu::FUSEDCNN_ISA {

// The feature's own kernels; what they do not cover is left to the list of AVX-512.
KernelList kernels();

KernelList kernels() { return {nullptr, 0, nullptr, nullptr}; }

}  // namespace fusedcnn::cpu::FUSEDCNN_ISA
