#include "ops/choose.h"

#include <stdexcept>
#include <string>

#include "cpu/select.h"
#include "ops/choice.h"

namespace fusedcnn {

const cpu::Kernel& choose(Pass pass, const Problem& problem) {
  const cpu::Kernel* const kernel = cpu::select(pass, problem);
  if (!kernel) {
    const std::string forced = cpu::forced_kernel();
    throw std::runtime_error(
        refusal(pass, cpu::explain(pass, problem), forced.empty() ? nullptr : forced.c_str()));
  }
  if (logging()) {
    log_choice("CPU", pass, problem, kernel->name, cpu::explain(pass, problem));
  }
  cpu::chosen(pass, *kernel);
  return *kernel;
}

}  // namespace fusedcnn
