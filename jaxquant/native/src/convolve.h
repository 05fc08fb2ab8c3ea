// int8 convolutions and dots of any kind, by the kernels that do them.
#pragma once

#include "conv.h"
#include "depthwise.h"
#include "instructions.h"

namespace jaxquant {

// x [n, h, w, c] as a call gives it, with the zero point that pads it; the sums take `subtracted` away
// from each of its values: the zero point, or 0 where the bias takes that away.
struct Input {
  const void* data;
  bool is_int8;  // else uint8
  int32_t zero_point, subtracted;
};

inline PackedMatrix packed_matrix(const ConvShape& s) {
  return {s.groups, s.group_out(), s.taps() * s.run_groups()};
}

inline PackedMatrix packed_dot(int64_t inputs, int64_t columns) {
  return {1, columns, ceil_div(inputs, 4)};
}

inline int64_t packed_size(const ConvShape& s) {
  return s.depthwise() ? PackedDepthwise{s.c, s.kh * s.kw}.size() : packed_matrix(s).size();
}

template <class Set>
void convolve_by(Threads& threads, const Input& x, const ConvShape& s, const int8_t* packed,
                 const Epilogue& epilogue) {
  if (s.depthwise()) {
    depthwise<Set>(threads, Activations::as_u8(x.data, x.is_int8, x.zero_point, x.subtracted), s,
                   packed, epilogue);
    return;
  }
  const Activations a = Set::activations(x.data, x.is_int8, x.zero_point, x.subtracted);
  conv(threads, a, s, Product<Set>(packed_matrix(s), packed, epilogue, s.o, a.zero_point));
}

// x [rows, inputs] times packed weights [inputs, columns].
template <class Set>
void multiply_by(Threads& threads, const Input& x, int64_t rows, int64_t inputs, int64_t columns,
                 const int8_t* packed, const Epilogue& epilogue) {
  const Activations a = Set::activations(x.data, x.is_int8, x.zero_point, x.subtracted);
  dot(threads, a, rows, inputs,
      Product<Set>(packed_dot(inputs, columns), packed, epilogue, columns, a.zero_point));
}

inline void convolve(Threads& threads, const Input& x, const ConvShape& s, const int8_t* packed,
                     const Epilogue& epilogue) {
  with_instructions([&](auto set) {
    convolve_by<decltype(set)>(threads, x, s, packed, epilogue);
  });
}

inline void multiply(Threads& threads, const Input& x, int64_t rows, int64_t inputs,
                     int64_t columns, const int8_t* packed, const Epilogue& epilogue) {
  with_instructions([&](auto set) {
    multiply_by<decltype(set)>(threads, x, rows, inputs, columns, packed, epilogue);
  });
}

// Products side by side, x [products, rows, inputs], whose rows are in groups, one after the other,
// each with a weight of its own.
struct Groups {
  int64_t products, rows, inputs, columns, groups;
  const int32_t* ends;    // [products, groups], of rows; the last group has all that are left
  bool own;               // whether each product has weights of its own, else all the same
  const int8_t* packed;   // [products or 1, groups, bytes]

  int64_t bytes() const { return packed_dot(inputs, columns).size(); }
};

// The multiplier and the bias of the epilogue are [products or 1, groups, columns], as the weights are.
inline void multiply_groups(Threads& threads, const Input& x, const Groups& s,
                            const Epilogue& epilogue) {
  constexpr int64_t kProductsOfThread = 1 << 16;  // which is awake
  for (int64_t p = 0; p < s.products; ++p) {
    int64_t first = 0;
    for (int64_t g = 0; g < s.groups; ++g) {
      const int64_t end = g + 1 == s.groups ? s.rows : s.ends[p * s.groups + g];
      const int64_t last = std::min(std::max(end, first), s.rows), count = last - first;
      if (count == 0) continue;
      const int64_t row = p * s.rows + first, weight = (s.own ? p : 0) * s.groups + g;
      Input rows = x;
      rows.data = static_cast<const uint8_t*>(x.data) + row * s.inputs;
      Epilogue own = epilogue.from(row, s.columns);
      own.multiplier += weight * s.columns;
      if (own.bias) own.bias += weight * s.columns;
      Some some(threads, 1 + count * s.inputs * s.columns / kProductsOfThread);
      multiply(some, rows, count, s.inputs, s.columns, s.packed + weight * s.bytes(), own);
      first = last;
    }
  }
}

}  // namespace jaxquant
