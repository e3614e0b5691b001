// The entry points of the kernels, each defined in the .cu file of its kernel.
#pragma once

#include "cuda/kernel.h"

namespace fusedcnn::cuda {

// The one list of kernels: selection and tests read it. Within a pass, first come, first served.
KernelList kernels();

const char* why_not_general(const Problem& problem, const Target& target);
const char* why_not_cuda_cores_3x3(const Problem& problem, const Target& target);
const char* why_not_grad_weight_winners_3x3(const Problem& problem, const Target& target);
const char* why_not_winners_3x3_few_channels(const Problem& problem, const Target& target);
const char* why_not_grad_input_winners_3x3(const Problem& problem, const Target& target);
const char* why_not_tensor_cores_3x3(const Problem& problem, const Target& target);
const char* why_not_tensor_cores_3xtf32(const Problem& problem, const Target& target);
void forward_general(const ForwardArgs& args, const Execution& execution);
void forward_tensor_cores_3x3(const ForwardArgs& args, const Execution& execution);
void forward_tensor_cores_3xtf32(const ForwardArgs& args, const Execution& execution);
int64_t forward_tensor_cores_3xtf32_shared(const Problem& problem);  // of a block
// Cycles of a multiprocessor that an image takes, counted rather than measured, of sm_90.
int64_t forward_tensor_cores_3xtf32_cycles(const Problem& problem);
int64_t forward_cuda_cores_3x3_cycles(const Problem& problem);
void forward_cuda_cores_3x3(const ForwardArgs& args, const Execution& execution);
int64_t grad_weight_general_workspace(const Problem& problem);
void grad_weight_general(const BackwardArgs& args, const Execution& execution);
int64_t grad_weight_winners_3x3_few_channels_workspace(const Problem& problem);
void grad_weight_winners_3x3_few_channels(const BackwardArgs& args, const Execution& execution);
int64_t grad_weight_tensor_cores_3x3_workspace(const Problem& problem);
void grad_weight_tensor_cores_3x3(const BackwardArgs& args, const Execution& execution);
int64_t grad_weight_winners_3x3_shared(const Problem& problem);  // of a block
int64_t grad_weight_winners_3x3_workspace(const Problem& problem);
void grad_weight_winners_3x3(const BackwardArgs& args, const Execution& execution);
void grad_input_tensor_cores_3x3(const BackwardArgs& args, const Execution& execution);
int64_t grad_input_winners_3x3_shared(const Problem& problem);  // of a block
void grad_input_winners_3x3(const BackwardArgs& args, const Execution& execution);
void grad_input_general(const BackwardArgs& args, const Execution& execution);

}  // namespace fusedcnn::cuda
