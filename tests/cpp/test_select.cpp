#include "test_select.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "cases.h"
#include "check.h"

namespace selftest {

namespace cpu = fusedcnn::cpu;
using cpu::Isa;
using cpu::Kernel;
using cpu::Pass;

namespace {

bool force_throws(const std::string& isa, const std::string& kernel) {
  const std::string isa_before = cpu::forced_isa(), kernel_before = cpu::forced_kernel();
  try {
    cpu::force(isa, kernel);
  } catch (const std::invalid_argument&) {
    // A refused choice changes nothing.
    return cpu::forced_isa() == isa_before && cpu::forced_kernel() == kernel_before;
  }
  return false;
}

}  // namespace

void test_select() {
  check(!cpu::isas().empty() && std::strcmp(cpu::isas().back().name, "baseline") == 0 &&
            cpu::isas().back().supported,
        "the last ISA is the baseline, which every machine has");
  for (const Isa& isa : cpu::isas()) {
    if (!isa.supported) {
      check(force_throws(isa.name, ""),
            std::string("forcing ") + isa.name + ", which this machine lacks, is refused");
      continue;
    }
    cpu::force(isa.name, "");
    check(&cpu::selected_isa() == &isa && cpu::forced_isa() == isa.name,
          std::string("force selects ") + isa.name);
    for (int k = 0; k < isa.list.count; ++k) {
      const Kernel& kernel = isa.list.kernels[k];
      const std::string what = std::string(isa.name) + " " + name(kernel.pass) + " " + kernel.name;
      check((kernel.pass == Pass::kForward ? kernel.forward : nullptr) != nullptr ||
                kernel.backward != nullptr,
            what + ": has its function");
      cpu::force(isa.name, kernel.name);
      for (const Case& one : cases()) {
        const cpu::Problem problem{one.geometry, fusedcnn::DataType::kFloat32,
                                   one.geometry.window() > fusedcnn::kLargestByteWindow};
        std::string reason;
        const Kernel* selected = cpu::select(kernel.pass, problem, &reason);
        const char* why_not = kernel.why_not(problem);
        check(why_not ? !selected && reason.find(why_not) != std::string::npos
                      : selected == &kernel && reason.find(kernel.name) == std::string::npos,
              what + " on " + one.name + ": selected where it covers the problem, and only there");
      }
    }
    cpu::force(isa.name, "");
    for (const Case& one : cases()) {
      const cpu::Problem problem{one.geometry, fusedcnn::DataType::kFloat32,
                                 one.geometry.window() > fusedcnn::kLargestByteWindow};
      for (const Pass pass : {Pass::kForward, Pass::kGradWeight, Pass::kGradInput}) {
        check(cpu::select(pass, problem, nullptr) != nullptr,
              std::string(isa.name) + " " + name(pass) + " on " + one.name + ": some kernel");
      }
    }
  }
  cpu::force("", "");
  const Isa* widest = nullptr;
  for (const Isa& isa : cpu::isas()) {
    if (isa.supported && !widest) widest = &isa;
  }
  check(&cpu::selected_isa() == widest && cpu::forced_isa().empty() && cpu::forced_kernel().empty(),
        "without force, the widest supported ISA");
  check(force_throws("mmx", ""), "an unknown ISA is refused");
  check(force_throws("", "fastest"), "an unknown kernel is refused");
}

}  // namespace selftest
