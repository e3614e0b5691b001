// Weights in a kernel's own layout, kept from call to call. Torch-free.
#pragma once

#include <cstdint>
#include <memory>

#include "core/geometry.h"

namespace fusedcnn::cpu {

struct DerivedEntry;

// What a derived array depends on besides the weight's values.
struct DerivedKey {
  const void* kernel;  // whatever tells kernels and ISAs apart
  const void* weight;
  Strides strides;
  DataType type;
  int64_t out_channels, in_channels, kernel_h, kernel_w;
};

// One call's hold on a derived array. An earlier call's array is reused only while the weight's
// bytes equal the copy that is kept beside it: a weight that was changed in place, by whatever
// means, or another one at the same address never meets what was derived before.
//
// Members are compiled once, outside the ISA objects.
class DerivedWeights {
 public:
  // bytes: of the weight, which lies in one piece; 0 where it does not, and nothing is kept.
  // floats: size of the derived array.
  DerivedWeights(const DerivedKey& key, int64_t bytes, int64_t floats);
  ~DerivedWeights();
  DerivedWeights(const DerivedWeights&) = delete;
  DerivedWeights& operator=(const DerivedWeights&) = delete;

  // Whether the array already holds what the weight's bytes lead to. If not, the caller fills it
  // from source() and calls keep().
  bool filled() const { return filled_; }
  float* data() const;         // 64-byte aligned
  const void* source() const;  // the weight, or the copy of it that later calls compare with
  bool usable() const;         // what keep() was told

  // The array is complete. usable: the caller's remark on the values, kept with them.
  void keep(bool usable);

 private:
  std::shared_ptr<DerivedEntry> entry_;
  bool filled_;
};

}  // namespace fusedcnn::cpu
