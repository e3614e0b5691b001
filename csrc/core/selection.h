// What selection is on every backend: a list of kernels in order of preference, each of which can
// say why it does not serve a problem. Torch-free.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "core/arguments.h"

namespace fusedcnn {

// What selection says of one kernel.
struct Verdict {
  const char* kernel;
  const char* why_not;  // null for the one that is chosen
};

// The first kernel of the pass that serves, or null. forced: the only name that may be chosen, or
// null. why_not(kernel): null where it serves.
template <typename List, typename WhyNot>
auto first_serving(const List& list, Pass pass, const char* forced, const WhyNot& why_not)
    -> decltype(list.kernels) {
  for (int i = 0; i < list.count; ++i) {
    const auto& kernel = list.kernels[i];
    const bool named = !forced || std::string(forced) == kernel.name;
    if (kernel.pass == pass && named && !why_not(kernel)) return &kernel;
  }
  return nullptr;
}

// Adds what that search says of each kernel of the pass. found: whether one serves already.
template <typename List, typename WhyNot>
void add_verdicts(const List& list, Pass pass, const char* forced, const WhyNot& why_not,
                  std::vector<Verdict>& verdicts, bool& found) {
  for (int i = 0; i < list.count; ++i) {
    const auto& kernel = list.kernels[i];
    if (kernel.pass != pass) continue;
    const bool named = !forced || std::string(forced) == kernel.name;
    const char* because = named ? why_not(kernel) : "another is forced";
    if (!because && found) because = "one before it serves";
    found = found || !because;
    verdicts.push_back({kernel.name, because});
  }
}

// Why none serves: what an operator throws then.
inline std::string refusal(Pass pass, const std::vector<Verdict>& verdicts, const char* forced) {
  std::string reasons;
  for (const Verdict& verdict : verdicts) {
    if (forced && std::string(forced) != verdict.kernel) continue;
    reasons += std::string(reasons.empty() ? "" : "; ") + verdict.kernel + ": " + verdict.why_not;
  }
  if (reasons.empty()) {
    reasons = std::string("no ") + name(pass) + " kernel" +
              (forced ? std::string(" named ") + forced : std::string());
  }
  return std::string("fusedcnn: no ") + name(pass) + " kernel covers this call: " + reasons;
}

// The listed name that equals `kernel`, or null where `kernel` is empty: "choose". Names may be
// listed several times. Throws std::invalid_argument.
template <typename List>
const char* listed_name(const std::vector<List>& lists, const std::string& kernel) {
  std::string names;
  for (const List& list : lists) {
    for (int i = 0; i < list.count; ++i) {
      if (kernel == list.kernels[i].name) return list.kernels[i].name;
      const std::string listed = std::string(", ") + list.kernels[i].name;
      if ((names + ",").find(listed + ",") == std::string::npos) names += listed;
    }
  }
  if (kernel.empty()) return nullptr;
  throw std::invalid_argument("kernel: expected one of " + names.substr(2) + ", got '" + kernel +
                              "'");
}

}  // namespace fusedcnn
