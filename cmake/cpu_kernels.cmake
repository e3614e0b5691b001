# Builds csrc/cpu: selection once, kernels.cpp once per ISA, into the static library `fusedcnn_cpu`.
# FUSEDCNN_ISAS lists the variants, widest first; each is compiled in a namespace of its own.

if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set(FUSEDCNN_ISAS avx512 avx2 baseline)
  # 512-bit vectors are asked for by the kernels themselves; the preference covers the loops that
  # the compiler vectorises.
  set(FUSEDCNN_FLAGS_avx512 -march=x86-64-v4 -mprefer-vector-width=512)
  set(FUSEDCNN_FLAGS_avx2 -march=x86-64-v3)
  set(FUSEDCNN_FLAGS_baseline -march=x86-64)
else()
  set(FUSEDCNN_ISAS baseline) # aarch64: NEON is part of the baseline
  set(FUSEDCNN_FLAGS_baseline "")
endif()

if(FUSEDCNN_SANITIZE)
  set(FUSEDCNN_KERNEL_OPTIMISATION "") # as everything else in such a build
else()
  set(FUSEDCNN_KERNEL_OPTIMISATION -O3)
endif()

add_library(fusedcnn_cpu STATIC
  csrc/core/geometry.cpp csrc/cpu/codes.cpp csrc/cpu/derived_weights.cpp csrc/cpu/plan.cpp csrc/cpu/scratch.cpp
  csrc/cpu/select.cpp)
target_link_libraries(fusedcnn_cpu PRIVATE $<BUILD_INTERFACE:fusedcnn_options>)
target_include_directories(fusedcnn_cpu PUBLIC csrc)
find_package(Threads REQUIRED) # pthread_atfork
target_link_libraries(fusedcnn_cpu PUBLIC Threads::Threads)
foreach(isa IN LISTS FUSEDCNN_ISAS)
  add_library(fusedcnn_cpu_${isa} OBJECT csrc/cpu/kernels.cpp)
  target_compile_definitions(fusedcnn_cpu_${isa} PRIVATE FUSEDCNN_ISA=${isa})
  # -ffp-contract=fast: a multiply and an add may become one FMA, as in the stock layers' kernels.
  # -fno-math-errno and -fno-trapping-math change no result; NaN and signed zeros stay exact.
  target_compile_options(fusedcnn_cpu_${isa} PRIVATE
    ${FUSEDCNN_FLAGS_${isa}} ${FUSEDCNN_KERNEL_OPTIMISATION}
    -ffp-contract=fast -fno-math-errno -fno-trapping-math)
  target_link_libraries(fusedcnn_cpu_${isa} PRIVATE fusedcnn_options)
  if(isa STREQUAL avx512 AND CMAKE_CXX_COMPILER_ID STREQUAL GNU)
    # GCC 12's own intrinsic headers read an undefined vector on purpose and warn about it.
    target_compile_options(fusedcnn_cpu_${isa} PRIVATE
      -Wno-uninitialized -Wno-maybe-uninitialized)
  endif()
  target_sources(fusedcnn_cpu PRIVATE $<TARGET_OBJECTS:fusedcnn_cpu_${isa}>)
  string(APPEND FUSEDCNN_ISA_LIST "X(${isa}) ")
endforeach()
target_compile_definitions(fusedcnn_cpu PRIVATE "FUSEDCNN_ISA_LIST=${FUSEDCNN_ISA_LIST}")
