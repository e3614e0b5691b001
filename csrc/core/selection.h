// What selection is on every backend: a list of kernels in order of preference, each of which can
// say why it does not cover a problem. Torch-free.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "core/arguments.h"

namespace fusedcnn {

// The first kernel of the pass that covers the problem, or null; `reason`: why not those before it.
// forced: the only name that may be chosen, or null. why_not(kernel): null where it covers.
template <typename List, typename WhyNot>
auto first_covering(const List& list, Pass pass, const char* forced, const WhyNot& why_not,
                    std::string* reason) -> decltype(list.kernels) {
  if (reason) reason->clear();
  for (int i = 0; i < list.count; ++i) {
    const auto& kernel = list.kernels[i];
    if (kernel.pass != pass || (forced && std::string(forced) != kernel.name)) continue;
    const char* const because = why_not(kernel);
    if (!because) return &kernel;
    if (reason) *reason += std::string(reason->empty() ? "" : "; ") + kernel.name + ": " + because;
  }
  if (reason && reason->empty()) {
    *reason = std::string("no ") + name(pass) + " kernel" +
              (forced ? std::string(" named ") + forced : std::string());
  }
  return nullptr;
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
