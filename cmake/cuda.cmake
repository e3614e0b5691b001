# csrc/cuda: the kernels' units, one .cu file each. FUSEDCNN_CUDA_UNITS also feeds the self-test that
# runs them on a CPU (tests/cuda_on_cpu), which needs no CUDA toolkit.
file(GLOB FUSEDCNN_CUDA_UNITS CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/csrc/cuda/kernels/*.cu)

set(FUSEDCNN_CUDA AUTO CACHE STRING
    "CUDA kernels: AUTO (where torch has CUDA and a CUDA compiler is found), ON (an error when none is) or OFF")
set_property(CACHE FUSEDCNN_CUDA PROPERTY STRINGS AUTO ON OFF)

# The default of CMAKE_CUDA_ARCHITECTURES: the GPUs present, else 75-virtual and what the toolkit
# offers through 100, the newest also as PTX for GPUs to come.
function(fusedcnn_default_cuda_architectures result)
  find_program(FUSEDCNN_NVIDIA_SMI nvidia-smi)
  if(FUSEDCNN_NVIDIA_SMI)
    execute_process(
      COMMAND ${FUSEDCNN_NVIDIA_SMI} --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE present OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
    string(REPLACE "." "" present "${present}")
    string(REGEX MATCHALL "[0-9]+" present "${present}")
    list(REMOVE_DUPLICATES present)
    if(NOT failed AND present)
      set(${result} "${present}" PARENT_SCOPE)
      return()
    endif()
  endif()
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch
                  OUTPUT_VARIABLE offered COMMAND_ERROR_IS_FATAL ANY)
  set(chosen "")
  foreach(architecture IN ITEMS 80 86 90 100)
    if(offered MATCHES "compute_${architecture}[\r\n]")
      list(APPEND chosen ${architecture}-real)
    endif()
  endforeach()
  list(POP_BACK chosen newest)
  string(REPLACE "-real" "" newest "${newest}")
  if(offered MATCHES "compute_75[\r\n]")
    list(PREPEND chosen 75-virtual)
  endif()
  set(${result} "${chosen};${newest}" PARENT_SCOPE)
endfunction()

set(FUSEDCNN_WITH_CUDA OFF)
if(FUSEDCNN_CUDA STREQUAL "AUTO" AND FUSEDCNN_KERNELS_ONLY)
  # Cross builds, sanitizers and emulators: for the CPU.
elseif(FUSEDCNN_CUDA STREQUAL "AUTO" AND NOT EXISTS ${FUSEDCNN_TORCH_DIR}/lib/libtorch_cuda.so)
  message(STATUS "CUDA kernels: not built, this torch has no CUDA (FUSEDCNN_CUDA=ON builds them)")
elseif(FUSEDCNN_CUDA STREQUAL "AUTO" OR FUSEDCNN_CUDA)
  if(NOT DEFINED ENV{CUDACXX} AND NOT CMAKE_CUDA_COMPILER)
    find_program(FUSEDCNN_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin PATHS /usr/local/cuda/bin)
    if(FUSEDCNN_NVCC)
      set(CMAKE_CUDA_COMPILER ${FUSEDCNN_NVCC})
    endif()
  endif()
  include(CheckLanguage)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    set(architectures_unset ON)
  endif()
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    if(architectures_unset)
      fusedcnn_default_cuda_architectures(CMAKE_CUDA_ARCHITECTURES)
    endif()
    enable_language(CUDA)
    set(FUSEDCNN_WITH_CUDA ON)
    message(STATUS "CUDA kernels: ${CMAKE_CUDA_COMPILER_ID} ${CMAKE_CUDA_COMPILER_VERSION}, "
                   "for ${CMAKE_CUDA_ARCHITECTURES}")
  elseif(FUSEDCNN_CUDA STREQUAL "AUTO")
    message(STATUS "CUDA kernels: not built, no working CUDA compiler (nvcc) was found")
  else()
    message(FATAL_ERROR
      "FUSEDCNN_CUDA=${FUSEDCNN_CUDA} asks for the CUDA kernels, but no working CUDA compiler was "
      "found. Put nvcc on the PATH, set CUDACXX or CUDA_HOME, or set FUSEDCNN_CUDA to AUTO or OFF.")
  endif()
else()
  message(STATUS "CUDA kernels: not built, FUSEDCNN_CUDA=${FUSEDCNN_CUDA}")
endif()

# What CUDA sources are compiled with.
function(fusedcnn_compile_cuda target)
  # -lineinfo lets profilers and compute-sanitizer name source lines; the code is the same.
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -Wno-deprecated-gpu-targets
      -lineinfo
      -Xcompiler=-Wall,-Wextra,-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=>)
  if(FUSEDCNN_CUDA_VERBOSE)
    # What scripts/check_cuda_build.py reads: registers and spills of every kernel.
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-v>)
  endif()
endfunction()
