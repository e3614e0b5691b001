# Toolchain file: cross-compiles the kernels and their self-test for aarch64 Linux, statically, so
# that qemu-user runs the result without an aarch64 system. Debian: g++-aarch64-linux-gnu, qemu-user.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
find_program(FUSEDCNN_QEMU NAMES qemu-aarch64 qemu-aarch64-static)
if(FUSEDCNN_QEMU)
  set(CMAKE_CROSSCOMPILING_EMULATOR ${FUSEDCNN_QEMU})
endif()
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
