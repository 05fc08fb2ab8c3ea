// The epilogue of sums that become int8 and nothing else, in registers.
//
// Of what `epilogue.h` has to do that leaves
//
//   q = clamp(round_half_even((sum * multiplier[c] + bias[c] + residual) * inv_scale) + zero_point)
//
// where the bounds of floats are bounds of q, since rounding keeps the order.  So sums are rounded
// without any bound, packing saturates, and the zero point and the bounds come when a register
// holds as many results as it has bytes.  `Epilogue::form` sees to it that no float overflows an
// int32 on the way.  Registers that are not all there, at the end of the channels, are left to the
// epilogue of any form.
//
// `L` is a struct that knows the registers, as in `lane_epilogue.h`, and beside that:
//
//   splat_words, splat_bytes  one value in all lanes of int16 and int8
//   to_words, to_bytes        int16 of two vectors of int32, int8 of two of int16; both saturate
//   add_words                 the sum, which saturates
//   least_bytes, most_bytes   of two
//   store_two                 what `to_bytes` made of `R` vectors of a pixel and `R` of another;
//                             `store_all` of four of one pixel, where a tile has so many
#pragma once

#include <cstddef>

#include "epilogue.h"

namespace jaxquant {

// What belongs to the channels of one register: `count` of them are there.
template <class L>
struct ChannelsOf {
  int64_t channel, count;
  typename L::Floats multiplier, bias;
};

template <class L>
class Quantized {
 public:
  using Floats = typename L::Floats;
  using Ints = typename L::Ints;

  explicit Quantized(const Epilogue& e)
      : residual_(e.residual_q), out_(e.out_q), inv_scale_(L::splat(e.inv_scale)),
        residual_scale_(L::splat(e.residual_scale)),
        residual_zero_point_(L::splat(e.residual_zero_point)),
        zero_point_(L::splat_words(int16_t(e.zero_point))),
        low_(L::splat_bytes(e.quantized(std::max(e.low, e.low_after)))),
        high_(L::splat_bytes(e.quantized(std::min(e.high, e.high_after)))),
        flip_(L::splat_bytes(int8_t(e.out_flip))) {}

  // How many steps of the result's scale sums are away from the zero point; `at` is where the
  // first of them is in the output.
  template <bool kAdds>
  Ints steps(Ints sums, const ChannelsOf<L>& of, int64_t at) const {
    Floats y = L::fma(L::floats(sums), of.multiplier, of.bias);
    if constexpr (kAdds) {
      const Ints q = L::load_bytes(residual_ + at, L::kCount);
      y = L::fma(L::floats(q - residual_zero_point_), residual_scale_, y);
    }
    return L::rounded(y * inv_scale_);
  }
  Ints steps(Ints sums, Floats multiplier, Floats bias) const {
    return L::rounded(L::fma(L::floats(sums), multiplier, bias) * inv_scale_);
  }
  Ints words(Ints a, Ints b) const { return L::add_words(L::to_words(a, b), zero_point_); }
  // Bytes of two vectors of `words`.
  Ints bytes(Ints a, Ints b) const {
    const Ints q = L::to_bytes(a, b);
    return L::least_bytes(high_, L::most_bytes(low_, q)) ^ flip_;
  }
  int8_t* out() const { return out_; }

  // Stores the steps of `R` vectors at one place of the output, and of others at another.
  template <int R>
  void store_two(const Ints (&a)[R], int64_t at_a, const Ints (&b)[R], int64_t at_b) const {
    if constexpr (R == 4) {
      L::store_all(out_ + at_a, bytes(words(a[0], a[1]), words(a[2], a[3])));
      L::store_all(out_ + at_b, bytes(words(b[0], b[1]), words(b[2], b[3])));
    } else {
      const Ints left = R == 1 ? words(a[0], b[0]) : words(a[0], a[R - 1]);
      const Ints right = R == 1 ? left : words(b[0], b[R - 1]);
      L::template store_two<R>(out_ + at_a, out_ + at_b, bytes(left, right));
    }
  }

 private:
  const int8_t* residual_;
  int8_t* out_;
  Floats inv_scale_, residual_scale_;
  Ints residual_zero_point_, zero_point_, low_, high_, flip_;
};

}  // namespace jaxquant
