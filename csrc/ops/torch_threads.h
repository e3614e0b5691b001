// What CPU operators run kernels with: torch's threads, and its words for a shortage of memory.
#pragma once

#include <stdexcept>

#include "core/geometry.h"
#include "cpu/kernel.h"
#include "cpu/out_of_memory.h"
#include "ops/checks.h"

namespace fusedcnn {

// torch's own threads, or where the work is too little to share out, the calling one.
cpu::ThreadPool thread_pool(double multiply_adds);
cpu::ThreadPool thread_pool(const Geometry& g);

double multiply_adds(const Geometry& g);

// body(), with a shortage of working memory as the error that torch's own allocator raises.
template <typename Body>
void with_memory(const Body& body) {
  try {
    body();
  } catch (const cpu::OutOfMemory& error) {
    throw std::runtime_error(out_of_memory_text(error.bytes));
  }
}

}  // namespace fusedcnn
