// What people see of selection: the text that fusedcnn.explain reads, and the log.
#pragma once

#include <string>
#include <vector>

#include "core/arguments.h"
#include "core/selection.h"

namespace fusedcnn {

// A line for each kernel of each pass: pass, kernel and reason (empty: chosen), between tabs.
// verdicts_of(pass) is what selection says.
template <typename VerdictsOf>
std::string explanation(const VerdictsOf& verdicts_of) {
  std::string text;
  for (const Pass pass : {Pass::kForward, Pass::kGradWeight, Pass::kGradInput}) {
    for (const Verdict& verdict : verdicts_of(pass)) {
      text += std::string(name(pass)) + '\t' + verdict.kernel + '\t' +
              (verdict.why_not ? verdict.why_not : "") + '\n';
    }
  }
  return text;
}

// "bfloat16 [64, 3, 32, 32] x [16, 3, 3, 3], pool 2, 2, ...": tells problems apart.
std::string description(const Problem& problem);

// Whether FUSEDCNN_LOG=debug was in the environment when this library was loaded.
bool logging();

// Prints which kernel a pass takes and why not those before it, once for each pass and problem.
// verdicts: selection's. chosen: the kernel's name.
void log_choice(const char* device, Pass pass, const Problem& problem, const char* chosen,
                const std::vector<Verdict>& verdicts);

}  // namespace fusedcnn
