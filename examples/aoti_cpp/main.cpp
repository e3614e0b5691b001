// Runs a package of export.py, without Python.
//
//     run_simple_cnn LIBFUSEDCNN PACKAGE IMAGES LOGITS
//
// LIBFUSEDCNN: path of libfusedcnn.so, as export.py prints it. IMAGES: float32 [N, 3, 32, 32] in
// this machine's byte order, and nothing else; N is taken from the file's size. LOGITS receives
// float32 [N, num_classes].

#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <exception>
#include <fstream>
#include <ios>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int64_t kImageElements = 3 * 32 * 32;

at::Tensor read_images(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const int64_t image_bytes = kImageElements * static_cast<int64_t>(sizeof(float));
  const auto size = static_cast<int64_t>(bytes.size());
  if (size == 0 || size % image_bytes != 0) {
    throw std::runtime_error("IMAGES: expected a multiple of " + std::to_string(image_bytes) +
                             " bytes in " + path + ", got " + std::to_string(size));
  }
  return at::from_blob(bytes.data(), {size / image_bytes, 3, 32, 32}, at::kFloat).clone();
}

void write_logits(const at::Tensor& logits, const std::string& path) {
  const at::Tensor dense = logits.contiguous();
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(dense.const_data_ptr<float>()),
             static_cast<std::streamsize>(dense.nbytes()));
  if (!file.flush()) {
    throw std::runtime_error("LOGITS: cannot write " + path);
  }
}

void run(const std::vector<std::string>& arguments) {
  if (arguments.size() != 4) {
    throw std::runtime_error("expected LIBFUSEDCNN PACKAGE IMAGES LOGITS");
  }
  // Its static initialisers register the operators that the package calls.
  if (dlopen(arguments[0].c_str(), RTLD_NOW) == nullptr) {
    throw std::runtime_error(std::string("LIBFUSEDCNN: ") + dlerror());
  }
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  const at::Tensor logits = model.run({read_images(arguments[2])}).at(0);
  write_logits(logits, arguments[3]);
  std::cout << "logits [" << logits.size(0) << ", " << logits.size(1) << "]\n";
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(std::vector<std::string>(argv + 1, argv + argc));
  } catch (const std::exception& error) {
    std::cerr << "run_simple_cnn: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
