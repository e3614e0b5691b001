// The CPU kernel of a pass, as selection says.
#pragma once

#include "cpu/kernel.h"

namespace fusedcnn {

// Throws std::runtime_error where none covers the problem. Logs and notes what it chose.
const cpu::Kernel& choose(Pass pass, const Problem& problem);

}  // namespace fusedcnn
