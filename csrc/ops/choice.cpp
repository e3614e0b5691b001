#include "ops/choice.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>

namespace fusedcnn {
namespace {

std::string list(std::initializer_list<int64_t> values) {
  std::string text;
  for (const int64_t value : values) text += (text.empty() ? "" : ", ") + std::to_string(value);
  return text;
}

}  // namespace

std::string description(const Problem& problem) {
  const Geometry& g = problem.geometry;
  const Axis &h = g.h, &w = g.w;
  std::string text = std::string(name(problem.type)) + " [" +
                     list({g.batch, g.in_channels, h.in, w.in}) + "] x [" +
                     list({g.out_channels, g.in_channels_per_group(), h.kernel, w.kernel}) + "]";
  const auto add = [&](const char* what, std::initializer_list<int64_t> values, int64_t usual) {
    bool unusual = false;
    for (const int64_t value : values) unusual = unusual || value != usual;
    if (unusual) text += std::string(", ") + what + " " + list(values);
  };
  add("stride", {h.stride, w.stride}, 1);
  add("padding", {h.padding, h.padding_after, w.padding, w.padding_after}, 0);
  add("dilation", {h.dilation, w.dilation}, 1);
  add("groups", {g.groups}, 1);
  add("pool", {h.pool_kernel, w.pool_kernel}, 0);
  add("pool stride", {h.pool_stride, w.pool_stride}, 0);
  add("pool padding", {h.pool_padding, w.pool_padding}, 0);
  add("pool dilation", {h.pool_dilation, w.pool_dilation}, 1);
  if (g.ceil_mode) text += ", ceil_mode";
  if (problem.channels_last) text += ", channels_last";
  return text;
}

bool logging() {
  static const bool on = [] {
    const char* const level = std::getenv("FUSEDCNN_LOG");
    return level && std::strcmp(level, "debug") == 0;
  }();
  return on;
}

void log_choice(const char* device, Pass pass, const Problem& problem, const char* chosen,
                const std::vector<Verdict>& verdicts) {
  std::string line = std::string("fusedcnn: ") + device + " " + name(pass) + " of " +
                     description(problem) + ": " + chosen;
  static std::mutex mutex;
  static std::set<std::string> met;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!met.insert(line).second) return;
  }
  std::string reasons;
  for (const Verdict& verdict : verdicts) {
    if (std::strcmp(verdict.kernel, chosen) == 0) break;
    if (!verdict.why_not) continue;
    reasons += std::string(reasons.empty() ? " (not " : "; not ") + verdict.kernel + ": " +
               verdict.why_not;
  }
  line += reasons + (reasons.empty() ? "\n" : ")\n");
  std::fputs(line.c_str(), stderr);
}

}  // namespace fusedcnn
