#include "ops/cuda_session.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/select.h"
#include "ops/choice.h"
#include "ops/measured.h"
#include "ops/torch_cuda.h"

namespace fusedcnn {

using torch::stable::Tensor;

namespace {

// torch's current stream on the device.
void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t device_index, void** stream);
  static const auto function =
      reinterpret_cast<Function>(torch_cuda_function("aoti_torch_get_current_cuda_stream"));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

cuda::Target target_of(int index) {
  const cuda::Device& device = cuda::use_device(index);
  return {device, cuda::tf32_allowed(), cuda::refused_on(index, device)};
}

}  // namespace

void check_coordinates(const Geometry& g) {
  for (const Axis* axis : {&g.h, &g.w}) {
    if (axis->padded() + axis->reach() >= int64_t{1} << 29) {
      throw std::runtime_error(
          "input, padding: expected fewer than 2^29 elements along each axis on CUDA");
    }
  }
}

Session::Session(const Tensor& input)
    : input_(input),
      guard_(input.get_device_index()),
      target_(target_of(input.get_device_index())),
      stream_(current_stream(input.get_device_index())) {}

const cuda::Kernel* Session::quickest(Pass pass, const Problem& problem, int wanted,
                                      const std::function<void(const cuda::Kernel&)>& run) const {
  static Winners<cuda::Kernel> winners;
  const std::string key = std::string(name(pass)) + " " +
                          std::to_string(input_.get_device_index()) + " " + std::to_string(wanted) +
                          (target_.allow_tf32 ? " tf32 " : " ") + description(problem);
  const auto seconds = [&](const cuda::Kernel& kernel) {
    return least_time([&] { return cuda::seconds_of(kernel.name, stream_, [&] { run(kernel); }); });
  };
  return winners.quickest(key, cuda::candidates(pass, problem, target_), !cuda::capturing(stream_),
                          seconds);
}

const cuda::Kernel& Session::choose(Pass pass, const Problem& problem, int wanted,
                                    const std::function<void(const cuda::Kernel&)>& run) const {
  const cuda::Kernel* kernel = cuda::select(pass, problem, target_);
  if (!kernel) {
    const std::string forced = cuda::forced_kernel();
    throw std::runtime_error(
        refusal(pass, explain(pass, problem), forced.empty() ? nullptr : forced.c_str()));
  }
  if (cuda::benchmarking() && cuda::forced_kernel().empty()) {
    if (const cuda::Kernel* const quick = quickest(pass, problem, wanted, run)) kernel = quick;
  }
  if (logging()) log_choice("CUDA", pass, problem, kernel->name, explain(pass, problem));
  return *kernel;
}

std::vector<Verdict> Session::explain(Pass pass, const Problem& problem) const {
  return cuda::explain(pass, problem, target_);
}

void Session::check_batch_norm() const {
  const char* const* const refused = target_.refused;
  const char* const because = refused ? refused[cuda::kernels().count] : nullptr;
  if (because && cuda::forced_kernel().empty()) {
    throw std::runtime_error(std::string("fusedcnn: no kernel of a BatchNorm runs here: ") +
                             because);
  }
}

bool Session::on_tensor_cores(DataType type) const {
  const bool half = type == DataType::kBFloat16 || type == DataType::kFloat16;
  const bool tf32 = type == DataType::kFloat32 && target_.allow_tf32;
  return half || (tf32 && target_.device.capability >= 80);
}

}  // namespace fusedcnn
