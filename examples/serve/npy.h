// The files of numpy.save, as far as uint8 images need them.
#pragma once

#include <cstdint>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Array {
  std::string type;            // "|u1" is uint8
  std::string shape;           // "5, 3, 32, 32"
  bool column_major;           // numpy's "fortran_order"
  std::vector<uint8_t> bytes;  // all elements
};

// Reads a file: "\x93NUMPY", two bytes of version, the length of a header in two bytes (version 1)
// or four, the header, such as {'descr': '|u1', 'fortran_order': False, 'shape': (5, 3, 32, 32), },
// and the elements.
inline Array read_npy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  file.peek();  // fails on a folder
  content << file.rdbuf();
  if (!file.is_open() || file.bad()) {
    throw std::runtime_error(path + ": cannot read it");
  }
  const std::string data = content.str();
  const auto byte = [&](size_t at) { return size_t(static_cast<unsigned char>(data[at])); };
  const auto not_an_array = std::runtime_error(path + ": expected an array of numpy.save");
  if (data.size() < 12 || data.compare(0, 6, "\x93NUMPY") != 0) {
    throw not_an_array;
  }
  const size_t begin = byte(6) == 1 ? 10 : 12;
  size_t length = byte(8) | byte(9) << 8;
  if (begin == 12) {
    length |= byte(10) << 16 | byte(11) << 24;
  }
  if (length > data.size() - begin) {
    throw not_an_array;
  }
  const std::string header = data.substr(begin, length);
  const auto between = [&](const std::string& before, const std::string& after) {
    const size_t from = header.find(before);
    if (from == std::string::npos) {
      throw not_an_array;
    }
    const size_t start = from + before.size();
    return header.substr(start, header.find(after, start) - start);
  };
  return {between("'descr': '", "'"),
          between("'shape': (", ")"),
          between("'fortran_order': ", ",") == "True",
          {data.begin() + static_cast<std::ptrdiff_t>(begin + length), data.end()}};
}
