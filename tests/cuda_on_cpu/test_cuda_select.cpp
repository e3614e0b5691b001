#include "test_cuda_select.h"

#include <string>

#include "cases.h"
#include "check.h"
#include "cuda/select.h"

namespace selftest {

void test_cuda_select() {
  using fusedcnn::DataType;
  using fusedcnn::Pass;
  using fusedcnn::cuda::Target;
  static constexpr char kWide[] = "block2 of 128 channels";
  struct Row {
    const char* case_name;
    DataType type;
    int capability;
    int shared_kib;
    bool tf32;
    const char* kernel;
    Pass pass = Pass::kForward;
    int code = 0;   // what the GPU's code was compiled for; 0: for that GPU
    int batch = 0;  // 0: the case's
    bool channels_last = false;
  };
  constexpr Row kRows[] = {
      {"block2", DataType::kFloat32, 90, 227, false, "cuda_cores_3x3"},
      {"block2", DataType::kFloat32, 75, 64, false, "cuda_cores_3x3"},
      {"block1", DataType::kFloat32, 90, 227, false, "cuda_cores_3x3"},
      {"one_output", DataType::kFloat32, 90, 227, false, "cuda_cores_3x3"},
      {"many_channels", DataType::kFloat32, 90, 227, false, "library"},
      {"dilation2x3", DataType::kFloat32, 90, 227, false, "library"},
      // On tensor cores where tf32 is allowed, but for few channels; and for halves always.
      {"block2", DataType::kFloat32, 90, 227, true, "tensor_cores_3x3"},
      {"block1", DataType::kFloat32, 86, 99, true, "cuda_cores_3x3"},
      {"block1", DataType::kFloat32, 90, 227, true, "winners_3x3_few_channels", Pass::kGradWeight},
      {"block1", DataType::kFloat32, 90, 227, true, "tensor_cores_3x3", Pass::kGradInput},
      {"block1", DataType::kBFloat16, 90, 227, true, "tensor_cores_3x3", Pass::kGradWeight},
      {"block2", DataType::kBFloat16, 90, 227, false, "tensor_cores_3x3"},
      {"block2", DataType::kFloat64, 90, 227, true, "library"},
      // Many channels, which cuDNN multiplies faster.
      {kWide, DataType::kBFloat16, 90, 227, false, "library"},
      {kWide, DataType::kFloat32, 75, 64, true, "library"},
      {kWide, DataType::kFloat32, 86, 99, false, "library"},
      {kWide, DataType::kBFloat16, 90, 227, false, "library", Pass::kGradInput},
      {kWide, DataType::kBFloat16, 90, 227, false, "library", Pass::kGradWeight},
      {kWide, DataType::kFloat32, 90, 227, false, "library", Pass::kGradWeight},
      {"channels64", DataType::kBFloat16, 90, 227, false, "library"},
      {"channels64", DataType::kBFloat16, 90, 227, false, "tensor_cores_3x3", Pass::kGradInput},
      // Of fewer channels where the input is channels_last.
      {"channels64", DataType::kBFloat16, 90, 227, false, "library", Pass::kGradInput, 0, 0, true},
      {"block2", DataType::kBFloat16, 90, 227, false, "tensor_cores_3x3", Pass::kForward, 0, 0,
       true},
      // And where few outputs leave most of the GPU idle.
      {"block2", DataType::kFloat32, 90, 227, false, "library", Pass::kGradWeight, 0, 64},
      {"block2", DataType::kFloat32, 90, 227, false, "winners_3x3", Pass::kGradWeight, 0, 1024},
      {"block2", DataType::kFloat32, 90, 227, false, "library", Pass::kGradInput, 0, 64},
      // No matrix instructions in code for older GPUs, whatever this one has.
      {"block2", DataType::kFloat32, 80, 163, false, "cuda_cores_3x3", Pass::kForward, 75},
      {"block2", DataType::kBFloat16, 90, 227, false, "library", Pass::kForward, 75},
      {"block2", DataType::kBFloat16, 90, 227, false, "tensor_cores_3x3", Pass::kForward, 80},
      // grad_input on CUDA cores: from 8 input channels on, where shared memory has room.
      {"block1", DataType::kFloat32, 90, 227, false, "library", Pass::kGradInput},
      {"block2", DataType::kFloat32, 90, 227, false, "winners_3x3", Pass::kGradInput, 0, 1024},
      {"block2", DataType::kFloat32, 90, 227, true, "tensor_cores_3x3", Pass::kGradInput},
      {"block2", DataType::kFloat32, 75, 64, false, "winners_3x3", Pass::kGradInput, 0, 1024},
      {"bands", DataType::kFloat32, 75, 64, false, "library", Pass::kGradInput, 0, 1 << 20},
      {"bands", DataType::kFloat32, 86, 99, false, "winners_3x3", Pass::kGradInput, 0, 1 << 20},
      {"many_images", DataType::kFloat32, 90, 227, false, "library", Pass::kGradInput},
  };
  for (const Row& row : kRows) {
    const bool wide = std::string(row.case_name) == kWide;
    fusedcnn::Problem problem{case_named(wide ? "block2" : row.case_name).geometry, row.type,
                              false};
    if (wide) problem.geometry.in_channels = problem.geometry.out_channels = 128;
    if (row.batch) problem.geometry.batch = row.batch;
    problem.channels_last = row.channels_last;
    const Target target{
        {row.capability, row.code ? row.code : row.capability, 132, row.shared_kib * 1024},
        row.tf32};
    const fusedcnn::cuda::Kernel* const kernel = fusedcnn::cuda::select(row.pass, problem, target);
    const std::string got = kernel ? kernel->name : "none";
    check(got == row.kernel, std::string(row.case_name) + ": " + name(row.pass) + " in " +
                                 name(row.type) + " on sm_" + std::to_string(row.capability) +
                                 (row.code ? ", code of sm_" + std::to_string(row.code) : "") +
                                 ": expected " + row.kernel + ", got " + got);
  }
}

}  // namespace selftest
