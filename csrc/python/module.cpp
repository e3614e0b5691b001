// fusedcnn._C: what was built and what runs, and forcing an ISA or a kernel. Knows no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>

#include "cpu/select.h"
#include "python/layers.h"

namespace py = pybind11;
namespace cpu = fusedcnn::cpu;

namespace {

py::list kernels() {
  py::list rows;
  for (const cpu::Isa& isa : cpu::isas()) {
    for (int i = 0; i < isa.list.count; ++i) {
      const cpu::Kernel& kernel = isa.list.kernels[i];
      py::dict row;
      row["isa"] = isa.name;
      row["supported"] = isa.supported;
      row["pass"] = name(kernel.pass);
      row["name"] = kernel.name;
      row["exact"] = kernel.exact;
      row["error"] = kernel.error;
      rows.append(row);
    }
  }
  return rows;
}

py::list isas() {
  py::list rows;
  for (const cpu::Isa& isa : cpu::isas()) {
    py::dict row;
    row["name"] = isa.name;
    row["base"] = isa.base ? py::object(py::str(isa.base->name)) : py::object(py::none());
    row["supported"] = isa.supported;
    row["selected"] = &isa == &cpu::selected_isa();
    row["reason"] = &isa == &cpu::selected_isa()
                        ? (cpu::forced_isa().empty() ? "widest supported" : "forced")
                    : isa.supported ? "a wider one is supported, or another is forced"
                                    : "this machine lacks it";
    rows.append(row);
  }
  return rows;
}

// By pass, the name of the kernel that computed the latest call, or None.
py::dict last_selected() {
  py::dict names;
  for (const cpu::Pass pass :
       {cpu::Pass::kForward, cpu::Pass::kGradWeight, cpu::Pass::kGradInput}) {
    const char* kernel = cpu::last_chosen(pass);
    names[name(pass)] = kernel ? py::object(py::str(kernel)) : py::object(py::none());
  }
  return names;
}

// Throws where the operators would, for shapes of four dimensions.
void check_sizes(const std::array<int64_t, 4>& input, const std::array<int64_t, 4>& weight,
                 const std::array<int64_t, fusedcnn::kPackedGeometrySize>& packed) {
  int64_t shapes[2][4];
  std::copy(input.begin(), input.end(), shapes[0]);
  std::copy(weight.begin(), weight.end(), shapes[1]);
  fusedcnn::unpack(shapes[0], shapes[1], packed.data());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("version") = FUSEDCNN_VERSION;
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "gcc " __VERSION__;
#endif
  m.def("check_sizes", &check_sizes, py::arg("input"), py::arg("weight"), py::arg("geometry"));
  m.def("isas", &isas);
  m.def("kernels", &kernels);
  m.def("last_selected", &last_selected);
  m.def(
      "fma_gflops",
      [](double seconds) { return cpu::selected_isa().whole().list.multiply_add_rate(seconds); },
      py::arg("seconds"), py::call_guard<py::gil_scoped_release>());
  m.def("force", &cpu::force, py::arg("isa"), py::arg("kernel"));
  m.def("allow_winograd", &cpu::allow_winograd, py::arg("allowed"));
  m.def("winograd_allowed", &cpu::winograd_allowed);
  m.def("benchmark", &cpu::benchmark, py::arg("enabled"));
  m.def("benchmarking", &cpu::benchmarking);
  m.def("parameters_as_built", &fusedcnn::parameters_as_built);
  m.def("forced", [] { return py::make_tuple(cpu::forced_isa(), cpu::forced_kernel()); });
}
