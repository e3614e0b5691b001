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
        const Kernel* selected = cpu::select(kernel.pass, problem);
        const char* why_not = kernel.why_not(problem);
        check(selected == (why_not ? nullptr : &kernel),
              what + " on " + one.name + ": selected where it covers the problem, and only there");
        if (!why_not) continue;
        const std::string refusal =
            fusedcnn::refusal(kernel.pass, cpu::explain(kernel.pass, problem), kernel.name);
        check(refusal.find(kernel.name + std::string(": ") + why_not) < refusal.size(),
              what + " on " + one.name + ": the refusal says why");
      }
    }
    cpu::force(isa.name, "");
    for (const Case& one : cases()) {
      const cpu::Problem problem{one.geometry, fusedcnn::DataType::kFloat32,
                                 one.geometry.window() > fusedcnn::kLargestByteWindow};
      for (const Pass pass : {Pass::kForward, Pass::kGradWeight, Pass::kGradInput}) {
        const Kernel* const selected = cpu::select(pass, problem);
        const std::string what = std::string(isa.name) + " " + name(pass) + " on " + one.name;
        check(selected != nullptr, what + ": some kernel");
        int chosen = 0, explained = 0;
        for (const fusedcnn::Verdict& verdict : cpu::explain(pass, problem)) {
          ++explained;
          if (!verdict.why_not) chosen += std::strcmp(verdict.kernel, selected->name) == 0;
        }
        int listed = 0;
        for (const Isa* list = &isa; list; list = list->base) {
          for (int k = 0; k < list->list.count; ++k) listed += list->list.kernels[k].pass == pass;
        }
        check(chosen == 1 && explained == listed, what + ": every kernel explained, one chosen");
        bool possible = false;
        for (const Kernel* candidate : cpu::candidates(pass, problem)) {
          check(!candidate->why_not(problem), what + ": candidates cover the problem");
          possible = possible || candidate == selected;
        }
        check(possible, what + ": the selected kernel is a candidate");
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
