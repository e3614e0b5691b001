// A look at a model's layers that costs little at every call.
#pragma once

#include <pybind11/pybind11.h>

namespace fusedcnn {

// What parameters_as_built of python/fusedcnn/inference.py says; see there.
pybind11::object parameters_as_built(pybind11::handle model, const pybind11::tuple& names,
                                     const pybind11::tuple& layers,
                                     pybind11::handle parameter_type);

}  // namespace fusedcnn
