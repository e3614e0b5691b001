#include "test_cuda_select.h"

#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "cases.h"
#include "check.h"
#include "cuda/select.h"

namespace selftest {
namespace {

using fusedcnn::Pass;
using fusedcnn::cuda::Device;
using fusedcnn::cuda::Target;

constexpr int kIndex = 3;
const Device kOtherGpu{120, 120, 170, 99 * 1024};

// The forward of block2 on a device, under what was said of its kernels; and what explain calls it.
std::string chosen_on(const Device& device) {
  const Target target{device, fusedcnn::cuda::tf32_allowed(),
                      fusedcnn::cuda::refused_on(kIndex, device)};
  const fusedcnn::Problem problem{case_named("block2").geometry, fusedcnn::DataType::kFloat32,
                                  false};
  const fusedcnn::cuda::Kernel* const kernel =
      fusedcnn::cuda::select(Pass::kForward, problem, target);
  const std::string got = kernel ? kernel->name : "none";
  for (const fusedcnn::Verdict& verdict :
       fusedcnn::cuda::explain(Pass::kForward, problem, target)) {
    const bool serves = !verdict.why_not;
    if (serves != (got == verdict.kernel)) return got + ", but explain differs";
  }
  return got;
}

void check_chosen(const Device& device, const std::string& expected, const std::string& when) {
  const std::string got = chosen_on(device);
  check(got == expected, "block2's forward on sm_" + std::to_string(device.capability) + " " +
                             when + ": expected " + expected + ", got " + got);
}

// Kernels that must not run, since nobody has checked them or a check found them wrong.
void test_refused() {
  using fusedcnn::cuda::kernels;
  using fusedcnn::cuda::measured;
  using fusedcnn::cuda::settle;
  for (const int architecture : fusedcnn::cuda::kMeasured) {
    check(measured({architecture, architecture, 1, 0}), "a measured architecture is");
    check(!measured({architecture, 75, 1, 0}), "code for an older GPU is not");
  }
  check(!measured(kOtherGpu), "sm_120 is not");
  check_chosen(kOtherGpu, "library", "before a check");

  std::vector<const char*> refused(static_cast<size_t>(kernels().count) + 1, nullptr);
  settle(kIndex, refused.data());
  check_chosen(kOtherGpu, "cuda_cores_3x3", "after its check");
  check(fusedcnn::cuda::refused_on(kIndex + 1, kOtherGpu)[0], "another device has had no check");
  check(fusedcnn::cuda::refused_on(-1, kOtherGpu) && fusedcnn::cuda::refused_on(64, kOtherGpu),
        "an index beyond all");

  char reason[] = "it is wrong";
  for (int i = 0; i < kernels().count; ++i) {
    if (!std::strcmp(kernels().kernels[i].name, "cuda_cores_3x3")) refused[i] = reason;
  }
  refused.back() = reason;
  settle(kIndex, refused.data());
  reason[0] = '!';  // a copy was taken
  check_chosen(kOtherGpu, "library", "with a wrong kernel");
  const char* const* const said = fusedcnn::cuda::refused_on(kIndex, kOtherGpu);
  check(!said[0] && said[1] == std::string("it is wrong") &&
            said[kernels().count] == std::string("it is wrong"),
        "what was said is kept, kernel by kernel");

  // What is measured: all that serve but what is refused, the slower ones, too.
  const auto measured_on = [](const Device& device) {
    std::string names;
    const fusedcnn::Problem problem{case_named("block2").geometry, fusedcnn::DataType::kFloat32,
                                    false};
    const Target target{device, true, fusedcnn::cuda::refused_on(kIndex, device)};
    for (const fusedcnn::cuda::Kernel* kernel :
         fusedcnn::cuda::candidates(Pass::kForward, problem, target)) {
      names += std::string(kernel->name) + " ";
    }
    return names;
  };
  check(measured_on(kOtherGpu) == "tensor_cores_3x3 library ", "a refused kernel is not measured");

  // Forcing is for tests: it asks nobody. A trial is this thread's alone.
  fusedcnn::cuda::force("library");
  fusedcnn::cuda::try_kernel("cuda_cores_3x3", false);
  check_chosen(kOtherGpu, "cuda_cores_3x3", "in a trial");
  std::thread([] { check_chosen(kOtherGpu, "library", "beside another thread's trial"); }).join();
  fusedcnn::cuda::try_kernel("tensor_cores_3x3", true);
  check_chosen(kOtherGpu, "tensor_cores_3x3", "in a trial with tf32");
  fusedcnn::cuda::try_kernel("", true);
  check(!fusedcnn::cuda::tf32_allowed(), "tf32 ends with a trial");
  fusedcnn::cuda::force("cuda_cores_3x3");
  check_chosen(kOtherGpu, "cuda_cores_3x3", "forced");
  fusedcnn::cuda::force("");

  settle(kIndex, nullptr);
  check_chosen(kOtherGpu, "library", "as if nobody had looked");
}

}  // namespace

void test_cuda_select() {
  test_refused();
  using fusedcnn::DataType;
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
      {"block1", DataType::kFloat32, 90, 227, true, "winners_3x3", Pass::kGradWeight},
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
      // grad_input on CUDA cores: of many outputs, where images fill tiles.
      {"block1", DataType::kFloat32, 90, 227, false, "library", Pass::kGradInput},
      {"block2", DataType::kFloat32, 90, 227, false, "cuda_cores_3x3", Pass::kGradInput, 0, 1024},
      {"block2", DataType::kFloat32, 90, 227, true, "tensor_cores_3x3", Pass::kGradInput},
      {"block2", DataType::kFloat32, 75, 64, false, "cuda_cores_3x3", Pass::kGradInput, 0, 1024},
      {"block1", DataType::kFloat32, 86, 99, false, "cuda_cores_3x3", Pass::kGradInput, 0, 1024},
      {"bands", DataType::kFloat32, 75, 64, false, "cuda_cores_3x3", Pass::kGradInput, 0, 1 << 20},
      {"many_images", DataType::kFloat32, 90, 227, false, "library", Pass::kGradInput, 0, 1 << 20},
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
