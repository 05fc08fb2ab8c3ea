// Files of float32 values, as NumPy's `tofile` and `fromfile` write and read them.
#pragma once

#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

inline std::vector<float> read_values(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error("cannot read " + path);
  std::vector<float> values(static_cast<size_t>(file.tellg()) / sizeof(float));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(values.data()), values.size() * sizeof(float));
  return values;
}

inline void write_values(const std::string& path, const std::vector<float>& values) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}
