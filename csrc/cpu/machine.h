// What this machine can do beyond the ISAs.
#pragma once

namespace fusedcnn::cpu {

struct Machine {
  bool avx512_bf16;  // vdpbf16ps
  bool amx_bf16;     // tiles of bfloat16, which the operating system lets this process use
};

const Machine& machine();

}  // namespace fusedcnn::cpu
