// The XLA FFI handler of products with matrices of stored integers.
#pragma once

#include <type_traits>
#include <vector>

#include "panels.h"
#include "xla.h"

namespace jaxquant {

// The products of `stored_handler`, whose scales are of `kScales`: floats, or bfloat16.
template <ffi::DataType kScales>
ffi::Error multiply_given(ffi::ThreadPool& pool, ffi::AnyBuffer& x, ffi::RemainingArgs& given,
                          ffi::RemainingRets& outs, bool sums_last, int64_t size, Floats codes) {
  using S = std::conditional_t<kScales == ffi::F32, float, uint16_t>;
  const auto in = x.dimensions();
  std::vector<Stored<S>> all;
  double time = 0;
  for (size_t i = 0; i < outs.size(); ++i) {
    auto out = outs.get<ffi::AnyBuffer>(i);
    const auto weights = given.get<ffi::AnyBuffer>(2 * i);
    const auto scale = given.get<ffi::AnyBuffer>(2 * i + 1);
    if (!out.has_value() || !weights.has_value() || !scale.has_value())
      return invalid("wrong types");
    const auto to = (*out)->dimensions();
    if (to.size() != 2 || to[0] != in[0]) return invalid("wrong shapes");
    const bool is_whole = (*out)->element_type() == ffi::S32;
    const Stored<S> s{in[0], in[1], to[1], size, !sums_last, weights->element_type() == ffi::U8,
                      static_cast<const int8_t*>(weights->untyped_data()),
                      is_whole ? nullptr : static_cast<const S*>(scale->untyped_data()),
                      (*out)->untyped_data(), codes.size() ? codes.begin() : nullptr};
    if (int64_t(weights->element_count()) != s.bytes() * s.columns)
      return invalid("the weights are of another shape");
    if (s.groups() > 1 && size % 32) return invalid("groups of a size that no tile has");
    if (!is_whole && int64_t(scale->element_count()) != s.groups() * s.columns)
      return invalid("the scales are of another shape");
    if (is_whole != (x.element_type() == ffi::S8) || scale->element_type() != kScales ||
        (is_whole && kScales != ffi::F32) || (i && s.packed != all[0].packed))
      return invalid("matrices of several kinds");
    all.push_back(s);
    time += time_of_reading(s.bytes() * s.columns, s.rows * s.length * s.columns);
  }
  XlaThreads threads(pool, time);
  return with_memory([&] {
    const auto multiply = [&](const auto* rows, auto to_float) {
      multiply_any<VectorsHere>(threads, all, rows, to_float);
    };
    if (x.element_type() == ffi::S8) {
      if constexpr (kScales == ffi::F32)
        multiply(x.typed_data<int8_t>(), [](int8_t q) { return float(q); });
    } else if (x.element_type() == ffi::BF16) {
      multiply(static_cast<const uint16_t*>(x.untyped_data()),
               [](uint16_t bits) { return VectorsHere::number(bits); });
    } else {
      multiply(x.typed_data<float>(), [](float value) { return value; });
    }
  });
}

// x [M, K] times matrices of stored integers: [K, N], or [N, K] where the sums come last, of int8
// or, packed, of uint8.  `given` are the integers and the scales of each in turn; `codes` what those
// of four bits stand for, if not for themselves.
inline ffi::Error stored_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs given,
                                 ffi::RemainingRets outs, int64_t sums_last, int64_t size,
                                 Floats codes) {
  if (x.dimensions().size() != 2 || size < 1 || given.size() != 2 * outs.size() ||
      (codes.size() != 0 && codes.size() != 16))
    return invalid("wrong shapes");
  const auto first = given.get<ffi::AnyBuffer>(1);
  const bool is_half = first.has_value() && first->element_type() == ffi::BF16;
  const auto multiply = is_half ? multiply_given<ffi::BF16> : multiply_given<ffi::F32>;
  return multiply(pool, x, given, outs, sums_last != 0, size, codes);
}

}  // namespace jaxquant
