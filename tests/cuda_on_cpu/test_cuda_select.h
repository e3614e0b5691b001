// Tests of csrc/cuda/select.cpp and the kernels' reasons.
#pragma once

namespace selftest {

// Which forward kernel serves a problem on which GPU.
void test_cuda_select();

}  // namespace selftest
