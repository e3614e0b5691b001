// What is thrown where working memory cannot be had. Not for the ISA objects: see CONTRIBUTING.
#pragma once

#include <cstdint>
#include <new>

namespace fusedcnn::cpu {

struct OutOfMemory : std::bad_alloc {
  int64_t bytes;  // that were asked for

  explicit OutOfMemory(int64_t bytes) : bytes(bytes) {}
};

}  // namespace fusedcnn::cpu
