// An int8 convolution of any kind, by the kernel that does it.
#pragma once

#include "conv.h"
#include "depthwise.h"

namespace jaxquant {

// x [n, h, w, c] as a call gives it.  Where `subtracts` is false the bias takes the zero point away.
struct Input {
  const void* data;
  bool is_int8;  // else uint8
  int32_t zero_point;
  bool subtracts;
};

inline PackedMatrix packed_matrix(const ConvShape& s) {
  return {s.groups, s.group_out(), s.taps() * s.run_groups()};
}

inline int64_t packed_size(const ConvShape& s) {
  return s.depthwise() ? PackedDepthwise{s.c, s.kh * s.kw}.size() : packed_matrix(s).size();
}

inline void convolve(Threads& threads, const Input& x, const ConvShape& s, const int8_t* packed,
                     const Epilogue& epilogue) {
  if (s.depthwise()) {
    depthwise(threads, Activations::as_u8(x.data, x.is_int8, x.zero_point, x.subtracts), s, packed,
              epilogue);
    return;
  }
  const Activations a = Product::activations(x.data, x.is_int8, x.zero_point, x.subtracts);
  conv(threads, a, s, Product(packed_matrix(s), packed, epilogue, s.o, a.zero_point));
}

}  // namespace jaxquant
