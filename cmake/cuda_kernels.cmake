# csrc/cuda: the kernels' units, one .cu file each. FUSEDCNN_CUDA_UNITS also feeds the self-test that
# runs them on a CPU (tests/cuda_on_cpu), which needs no CUDA toolkit.
set(FUSEDCNN_CUDA_UNITS
  ${PROJECT_SOURCE_DIR}/csrc/cuda/forward_general.cu
  ${PROJECT_SOURCE_DIR}/csrc/cuda/backward_weight_general.cu
  ${PROJECT_SOURCE_DIR}/csrc/cuda/backward_input_general.cu)
