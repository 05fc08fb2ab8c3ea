// The numbers that a call gives, as records of named fields.
//
// `jaxquant.native.fields` says which there are, and hands their names to the compiler: Python
// writes a record in the order in which it is read here.
#pragma once

#include <cstdint>
#include <cstring>

namespace jaxquant {

struct Geometry {
  int64_t JAXQUANT_GEOMETRY;
};
struct ZeroPoints {
  int32_t JAXQUANT_ZEROPOINTS;
};
struct Clamps {
  float JAXQUANT_CLAMPS;
};
struct Image {
  int64_t JAXQUANT_IMAGE;
};
struct Places {
  int64_t JAXQUANT_PLACES;
};

// Record number `i` of a list of numbers, `Span` of XLA or a vector.
template <class Record, class Span>
Record record(const Span& numbers, int64_t i = 0) {
  Record read;
  std::memcpy(&read, numbers.begin() + i * (sizeof(Record) / sizeof(*numbers.begin())),
              sizeof(Record));
  return read;
}

// Whether the numbers are `count` records.
template <class Record, class Span>
bool holds(const Span& numbers, int64_t count = 1) {
  return int64_t(numbers.size() * sizeof(*numbers.begin())) == count * int64_t(sizeof(Record));
}

}  // namespace jaxquant
