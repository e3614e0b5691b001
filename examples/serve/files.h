// What the program reads: arrays of numpy.save, as far as uint8 images need them, and the checksums
// of a package.
#pragma once

#include <array>
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

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream content;
  file.peek();  // fails on a folder
  content << file.rdbuf();
  if (!file.is_open() || file.bad()) {
    throw std::runtime_error(path + ": cannot read it");
  }
  return content.str();
}

// The unsigned number in ``size`` bytes, the lowest first.
inline size_t number_at(const std::string& data, size_t at, size_t size) {
  if (size > data.size() || at > data.size() - size) {
    throw std::out_of_range("a number behind the end");
  }
  size_t value = 0;
  for (size_t i = size; i-- > 0;) {
    value = value << 8 | static_cast<unsigned char>(data[at + i]);
  }
  return value;
}

// Reads an array: "\x93NUMPY", two bytes of version, the length of a header in two bytes (version
// 1) or four, the header, such as {'descr': '|u1', 'fortran_order': False, 'shape': (5, 3, 32, 32),
// }, and the elements.
inline Array read_array(const std::string& path) {
  const std::string data = read_file(path);
  const auto not_an_array = std::runtime_error(path + ": expected an array of numpy.save");
  if (data.size() < 12 || data.compare(0, 6, "\x93NUMPY") != 0) {
    throw not_an_array;
  }
  const size_t begin = data[6] == 1 ? 10 : 12;
  const size_t length = number_at(data, 8, begin - 8);
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

// The CRC-32 of zip archives.
inline uint32_t crc32_of(const std::string& data, size_t begin, size_t size) {
  std::array<uint32_t, 256> table;
  for (uint32_t i = 0; i < 256; ++i) {
    table[i] = i;
    for (int bit = 0; bit < 8; ++bit) {
      table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xEDB88320u : 0);
    }
  }
  uint32_t crc = ~0u;
  for (size_t i = begin; i < begin + size; ++i) {
    crc = crc >> 8 ^ table[(crc ^ static_cast<unsigned char>(data[i])) & 255];
  }
  return ~crc;
}

// Throws unless a package's files have the checksums that it names for them: torch does not look,
// and would run what is damaged. A zip archive ends with the place of its directory, whose entries
// say where each file is; packages do not compress theirs.
inline void check_checksums(const std::string& path) {
  const std::string data = read_file(path);
  try {
    const size_t end = data.rfind("PK\5\6");
    if (end == std::string::npos) {
      throw std::out_of_range("no directory");
    }
    size_t entry = number_at(data, end + 16, 4);
    for (size_t left = number_at(data, end + 10, 2); left > 0; --left) {
      const size_t size = number_at(data, entry + 20, 4);
      const size_t local = number_at(data, entry + 42, 4);
      const size_t begin =
          local + 30 + number_at(data, local + 26, 2) + number_at(data, local + 28, 2);
      if (number_at(data, entry + 10, 2) != 0 || begin > data.size() ||
          size > data.size() - begin ||
          crc32_of(data, begin, size) != number_at(data, entry + 16, 4)) {
        throw std::out_of_range("a wrong checksum");
      }
      entry += 46 + number_at(data, entry + 28, 2) + number_at(data, entry + 30, 2) +
               number_at(data, entry + 32, 2);
    }
  } catch (const std::out_of_range&) {
    throw std::runtime_error(path + ": no package, or a damaged one");
  }
}
