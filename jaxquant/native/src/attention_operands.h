// What attention is computed of.
#pragma once

#include <cstdint>

namespace jaxquant {

// A matrix in a tensor, by its strides.
template <class T>
struct Strided {
  T* data;
  int64_t line, place;
};

// One product of matrices after another, of one batch and one head.
struct Attention {
  int64_t rows, keys, depth, values;  // q [rows, depth], k [keys, depth], v [keys, values]
  float scale;                        // of the products
  float fill;                         // a score where the mask is false
};

// `T` is what keys and values are of: floats, or bfloat16 as its bits.
template <class T>
struct AttentionOperands {
  Strided<const float> q;
  Strided<const T> k, v;
  Strided<const float> bias;    // [keys, rows], added to the scaled products; null without one
  Strided<const uint8_t> mask;  // [keys, rows]; null without one
  Strided<float> out;           // [rows, values]
};

}  // namespace jaxquant
