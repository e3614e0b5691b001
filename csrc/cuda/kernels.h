// The entry points of the kernels, each defined in the .cu file of its kernel.
#pragma once

#include "cuda/kernel.h"

namespace fusedcnn::cuda {

// The one list of kernels: selection and tests read it. Within a pass, first come, first served.
KernelList kernels();

const char* why_not_general(const Problem& problem, const Target& target);
const char* why_not_windows(const Problem& problem, const Target& target);
const char* why_not_weight_windows(const Problem& problem, const Target& target);
const char* why_not_weight_lanes(const Problem& problem, const Target& target);
const char* why_not_input_windows(const Problem& problem, const Target& target);
const char* why_not_mma(const Problem& problem, const Target& target);
const char* why_not_mma3(const Problem& problem, const Target& target);
void forward_general(const ForwardArgs& args, const Execution& execution);
void forward_mma(const ForwardArgs& args, const Execution& execution);
void forward_mma3(const ForwardArgs& args, const Execution& execution);
int64_t forward_mma3_shared(const Problem& problem);  // of a block
// Cycles of a multiprocessor that an image takes, counted rather than measured, of sm_90.
int64_t forward_mma3_cycles(const Problem& problem);
int64_t forward_windows_cycles(const Problem& problem);
void forward_windows(const ForwardArgs& args, const Execution& execution);
int64_t grad_weight_general_workspace(const Problem& problem);
void grad_weight_general(const BackwardArgs& args, const Execution& execution);
int64_t grad_weight_lanes_workspace(const Problem& problem);
void grad_weight_lanes(const BackwardArgs& args, const Execution& execution);
int64_t grad_weight_mma_workspace(const Problem& problem);
void grad_weight_mma(const BackwardArgs& args, const Execution& execution);
int64_t grad_weight_windows_shared(const Problem& problem);  // of a block
int64_t grad_weight_windows_workspace(const Problem& problem);
void grad_weight_windows(const BackwardArgs& args, const Execution& execution);
void grad_input_mma(const BackwardArgs& args, const Execution& execution);
int64_t grad_input_windows_shared(const Problem& problem);  // of a block
void grad_input_windows(const BackwardArgs& args, const Execution& execution);
void grad_input_general(const BackwardArgs& args, const Execution& execution);

}  // namespace fusedcnn::cuda
