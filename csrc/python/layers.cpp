// The look reads some hundred lines of memory, which the call before has driven out of the caches.
// Here the processor waits for many of them at a time; among the interpreter's instructions it
// waits for each.
#include "python/layers.h"

#include <array>

namespace py = pybind11;

namespace fusedcnn {
namespace {

constexpr size_t kMostLayers = 32;

PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }

// The dictionaries of an object and of its layers are alive as long as it is: references are
// borrowed throughout.
PyObject* attributes_of(PyObject* object) {
  PyObject* const attributes = PyObject_GenericGetDict(object, nullptr);
  Py_XDECREF(attributes);
  return attributes;
}

PyObject* get(PyObject* dict, PyObject* key) {
  return dict && PyDict_Check(dict) ? PyDict_GetItemWithError(dict, key) : nullptr;
}

bool is_empty(PyObject* dict) { return dict && PyDict_Check(dict) && PyDict_GET_SIZE(dict) == 0; }

// Whether each item of `expected` is in `attributes`.
bool holds(PyObject* attributes, PyObject* expected) {
  Py_ssize_t at = 0;
  PyObject *key, *value;
  while (PyDict_Next(expected, &at, &key, &value)) {
    PyObject* const found = get(attributes, key);
    if (!found) return false;
    if (found != value && PyObject_RichCompareBool(found, value, Py_EQ) != 1) return false;
  }
  return true;
}

// The list, or null.
PyObject* look(PyObject* model, PyObject* names, PyObject* layers, PyObject* parameter_type) {
  static PyObject* const kModules = name("_modules");
  static PyObject* const kParameters = name("_parameters");
  static PyObject* const kForward = name("forward");
  static PyObject* const kHooks = name("_forward_hooks");
  static PyObject* const kPreHooks = name("_forward_pre_hooks");
  static PyObject* const kWeight = name("weight");
  static PyObject* const kBias = name("bias");

  std::array<PyObject*, kMostLayers> found;
  size_t count = 0;
  PyObject* const sequentials = get(attributes_of(model), kModules);
  const Py_ssize_t wanted = PyTuple_GET_SIZE(names);
  if (!sequentials || PyDict_GET_SIZE(sequentials) != wanted) return nullptr;
  for (Py_ssize_t i = 0; i < wanted; ++i) {
    PyObject* const name = PyTuple_GET_ITEM(names, i);
    PyObject* const sequential = get(sequentials, name);
    if (!sequential || get(attributes_of(model), name)) return nullptr;
    found[count++] = sequential;
  }
  for (Py_ssize_t i = 0; i < wanted; ++i) {
    // Of nothing but a Sequential are these known to be layers in a row: checked below.
    PyObject* const children = get(attributes_of(found[i]), kModules);
    if (!children) return nullptr;
    Py_ssize_t at = 0;
    PyObject *key, *child;
    while (PyDict_Next(children, &at, &key, &child)) {
      if (count == kMostLayers) return nullptr;
      found[count++] = child;
    }
  }
  if (count != static_cast<size_t>(PyTuple_GET_SIZE(layers))) return nullptr;

  py::list parameters;
  for (size_t i = 0; i < count; ++i) {
    PyObject* const layer = PyTuple_GET_ITEM(layers, i);  // kind, attributes, has parameters
    if (reinterpret_cast<PyObject*>(Py_TYPE(found[i])) != PyTuple_GET_ITEM(layer, 0)) {
      return nullptr;
    }
    PyObject* const attributes = attributes_of(found[i]);
    // A tensor in place of a parameter is an attribute or a buffer.
    if (get(attributes, kForward) || get(attributes, kWeight) || get(attributes, kBias) ||
        !is_empty(get(attributes, kHooks)) || !is_empty(get(attributes, kPreHooks)) ||
        !holds(attributes, PyTuple_GET_ITEM(layer, 1))) {
      return nullptr;
    }
    const bool has_parameters = PyTuple_GET_ITEM(layer, 2) == Py_True;
    PyObject* const of_layer = get(attributes, kParameters);
    if (!of_layer || is_empty(of_layer) == has_parameters) return nullptr;
    if (!has_parameters) continue;
    for (PyObject* const key : {kWeight, kBias}) {
      PyObject* const parameter = get(of_layer, key);
      if (!parameter || reinterpret_cast<PyObject*>(Py_TYPE(parameter)) != parameter_type) {
        return nullptr;
      }
      if (PyList_Append(parameters.ptr(), parameter) != 0) return nullptr;
    }
  }
  return parameters.release().ptr();
}

}  // namespace

py::object parameters_as_built(py::handle model, const py::tuple& names, const py::tuple& layers,
                               py::handle parameter_type) {
  PyObject* const parameters = look(model.ptr(), names.ptr(), layers.ptr(), parameter_type.ptr());
  if (parameters) return py::reinterpret_steal<py::object>(parameters);
  PyErr_Clear();  // of a comparison: not as built
  return py::none();
}

}  // namespace fusedcnn
