// Classifies images with a package of export.py, without Python.
//
//     classify LIBFUSEDCNN PACKAGE IMAGES [--batch N] [--time CALLS]
//
// LIBFUSEDCNN: path of libfusedcnn.so, as export.py prints it. IMAGES: uint8 [N, 3, 32, 32], as
// numpy.save writes them. Prints a line for each image: its class and how sure the model is. Calls
// take --batch images (64); --time times so many calls with the first batch instead. Threads are
// OpenMP's: OMP_NUM_THREADS counts. Exit status: 0, or 2 and one line on stderr.

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Logging.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "files.h"

namespace {

using torch::inductor::AOTIModelPackageLoader;
using Metadata = std::unordered_map<std::string, std::string>;

struct Options {
  std::string library, package, images;
  int64_t batch = 64;
  int64_t calls = 0;  // to be timed
};

Options parse(const std::vector<std::string>& arguments) {
  Options options;
  std::vector<std::string> paths;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& name = arguments[i];
    if (name == "--batch" || name == "--time") {
      const std::string value = ++i < arguments.size() ? arguments[i] : "";
      const int64_t number = std::strtoll(value.c_str(), nullptr, 10);
      if (number < 1 || number > 1000000 || value != std::to_string(number)) {
        throw std::runtime_error(name + ": expected 1 to 1000000, got '" + value + "'");
      }
      (name == "--batch" ? options.batch : options.calls) = number;
    } else {
      paths.push_back(name);
    }
  }
  if (paths.size() != 3) {
    throw std::runtime_error("expected LIBFUSEDCNN PACKAGE IMAGES [--batch N] [--time CALLS]");
  }
  options.library = paths[0];
  options.package = paths[1];
  options.images = paths[2];
  return options;
}

// Loads the operators that packages call, which the library's static initialisers register.
std::string load_library(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW);
  if (library == nullptr) {
    throw std::runtime_error(dlerror());
  }
  const auto version = reinterpret_cast<const char* (*)()>(dlsym(library, "fusedcnn_version"));
  if (version == nullptr) {
    throw std::runtime_error(path + ": expected libfusedcnn, got another or an older library");
  }
  return version();
}

std::string torch_version() {
  const uint64_t version = aoti_torch_abi_version();
  return std::to_string(version >> 56) + "." + std::to_string(version >> 48 & 255);
}

// Reads what export.py wrote into the package, and checks that the package can run here. Loading
// the package runs its code: all that may be wrong is found before.
Metadata read_metadata(const std::string& package, const std::string& library_version) {
  check_checksums(package);
  Metadata metadata;
  try {
    metadata = AOTIModelPackageLoader::load_metadata_from_package(package, "model");
  } catch (const std::exception& error) {
    throw std::runtime_error(package + ": " + error.what());
  }
  const std::pair<std::string, std::string> here[] = {
      {"format", "fusedcnn examples/serve, version 1"},
      {"fusedcnn", library_version},
      {"torch", torch_version()},
  };
  for (const auto& [key, value] : here) {
    const auto found = metadata.find(key);
    if (found == metadata.end()) {
      throw std::runtime_error(package + ": expected a package of export.py, got another one");
    }
    if (found->second != value) {
      throw std::runtime_error(package + ": made for " + key + " " + found->second + ", this is " +
                               value);
    }
  }
  const std::string& cpu = metadata["cpu"];
  const std::string capability = at::get_cpu_capability();
  if (cpu != "any" && !(cpu == "avx2" && capability.starts_with("AVX"))) {
    throw std::runtime_error(package + ": made for CPUs with " + cpu + ", this one has " +
                             capability);
  }
  return metadata;
}

// The images, whose memory is the array's; ``image`` holds their sizes, such as "3, 32, 32".
at::Tensor images_of(Array& array, const std::string& image, const std::string& path) {
  const size_t comma = array.shape.find(", ");
  if (array.type != "|u1" || array.column_major || comma == std::string::npos ||
      array.shape.substr(comma + 2) != image) {
    throw std::runtime_error(path + ": expected |u1 (uint8) [N, " + image + "], row by row, got " +
                             array.type + " [" + array.shape + "]" +
                             (array.column_major ? ", column by column" : ""));
  }
  std::vector<int64_t> sizes;
  int64_t elements = 1;
  for (const char* at = array.shape.c_str(); *at != '\0';) {
    char* end = nullptr;
    sizes.push_back(std::strtoll(at, &end, 10));
    elements *= sizes.back();
    at = *end == ',' ? end + 1 : end;
  }
  const auto bytes = static_cast<int64_t>(array.bytes.size());
  if (elements < 1 || elements != bytes) {
    throw std::runtime_error(path + ": expected an image or more, and all of their bytes, got " +
                             std::to_string(bytes) + " bytes");
  }
  return at::from_blob(array.bytes.data(), sizes, at::kByte);
}

void print_time(AOTIModelPackageLoader& model, const at::Tensor& batch, int64_t calls) {
  constexpr int64_t kWarmUp = 10;
  std::vector<double> times;
  for (int64_t i = 0; i < kWarmUp + calls; ++i) {
    const auto started = std::chrono::steady_clock::now();
    model.run({batch});
    const std::chrono::duration<double, std::micro> time =
        std::chrono::steady_clock::now() - started;
    times.push_back(time.count());
  }
  times.erase(times.begin(), times.begin() + kWarmUp);
  std::sort(times.begin(), times.end());
  std::printf("%lld images, %d threads: median %.1f us, least %.1f us\n",
              static_cast<long long>(batch.size(0)), at::get_num_threads(), times[times.size() / 2],
              times[0]);
}

void run(const Options& options) {
  Metadata metadata = read_metadata(options.package, load_library(options.library));
  std::vector<std::string> names(1);
  for (const char letter : metadata["classes"]) {
    letter == '\n' ? names.emplace_back() : names.back() += letter;
  }
  Array array = read_array(options.images);
  const at::Tensor images = images_of(array, metadata["image"], options.images);
  AOTIModelPackageLoader model(options.package);
  const c10::InferenceMode no_autograd;
  const std::vector<at::Tensor> batches = images.split(options.batch);
  if (options.calls != 0) {
    print_time(model, batches[0], options.calls);
  } else {
    for (const at::Tensor& batch : batches) {
      const std::vector<at::Tensor> answer = model.run({batch});
      const auto* label = answer.at(0).const_data_ptr<int64_t>();
      const auto* probability = answer.at(1).const_data_ptr<float>();
      for (int64_t i = 0; i < batch.size(0); ++i) {
        std::printf("%s\t%.3f\n", names.at(static_cast<size_t>(label[i])).c_str(), probability[i]);
      }
    }
  }
  if (std::fflush(stdout) != 0) {
    throw std::runtime_error("cannot write the answer");
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);  // where nobody reads the answer, writing it fails
  setenv("TORCH_CPP_LOG_LEVEL", "ERROR", 0);
  c10::initLogging();
  std::string line = "unknown error";
  try {
    run(parse({argv + 1, argv + argc}));
    return 0;
  } catch (const std::exception& error) {
    line = error.what();  // torch's go on with a stack of calls
  } catch (...) {
  }
  std::cerr << "classify: " << line.substr(0, line.find('\n')) << '\n';
  return 2;
}
