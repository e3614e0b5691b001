// The geometries that every kernel of every ISA meets, each here for what its name says.
#pragma once

#include <string>
#include <vector>

#include "core/geometry.h"

namespace selftest {

struct Case {
  std::string name;
  fusedcnn::Geometry geometry;
};

const std::vector<Case>& cases();

// The case of this name.
const Case& case_named(const std::string& name);

}  // namespace selftest
