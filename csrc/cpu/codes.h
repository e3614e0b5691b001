// A look at the codes before a backward follows them.
#pragma once

#include "core/arguments.h"

namespace fusedcnn::cpu {

// Whether each code is "off" or names an element of its window that lies on the convolution's
// output. Any other would lead a kernel outside its image.
bool codes_fit(const BackwardArgs& args);

}  // namespace fusedcnn::cpu
