// The epilogue on registers of sums, for instruction sets without masks: AVX2 and NEON.
//
// `L` is a struct of static members that knows the registers:
//
//   kCount, Floats, Ints   vectors of so many float32 and int32, with the compiler's operators
//   splat                  one value in all lanes, of either kind
//   load, store            floats from and to memory, the first `n` of them; zeros behind them
//   load_ints              the same of int32
//   load_bytes             int8 made int32, the first `n`
//   store_bytes            the lowest byte of each int32, the first `n`
//   stream, fence          whole vectors of floats past the caches, and what makes them seen
//   fma                    a * b + c, rounded once
//   least, most            of two; the second where either is NaN
//   floats, rounded        int32 to float32, and back to the nearest, ties to even
#pragma once

#include <cstring>

#include "quantized.h"

namespace jaxquant {

template <class L>
class LaneSums {
 public:
  using Lanes = L;
  using Floats = typename L::Floats;
  using Ints = typename L::Ints;
  using Channels = ChannelsOf<L>;
  static constexpr int kCount = L::kCount;
  const Form form;
  const Quantized<L> quantized;

  LaneSums(const Epilogue& e, int64_t channels)
      : form(e.form(channels)), quantized(e), e_(e), low_(L::splat(e.low)),
        high_(L::splat(e.high)), low_after_(L::splat(e.low_after)),
        high_after_(L::splat(e.high_after)), inv_scale_(L::splat(e.inv_scale)),
        q_low_(L::splat(float(kLeast - e.zero_point))),
        q_high_(L::splat(float(kLargest - e.zero_point))),
        residual_scale_(L::splat(e.residual_scale)),
        residual_zero_point_(L::splat(e.residual_zero_point)),
        residual_flip_(L::splat(int32_t(int8_t(e.residual_flip)))),
        // Only the lowest byte of a sum is stored, so adding 128 flips the bit that uint8 flips.
        zero_point_(L::splat(e.zero_point + e.out_flip)) {}

  int64_t bytes() const { return e_.bytes(); }

  // Channels [c, c + kCount), of which `n` are there, none where that is negative.
  Channels channels(int64_t c, int64_t n) const {
    const int64_t count = std::min<int64_t>(std::max<int64_t>(n, 0), kCount);
    return {c, count, L::load(e_.multiplier + c, count),
            e_.bias ? L::load(e_.bias + c, count) : L::splat(0.0f)};
  }

  // Stores the results of an epilogue of any form; `at` is where channel 0 of this pixel is in the
  // output.
  void store(Ints sums, const Channels& of, int64_t at) const {
    const int64_t first = at + of.channel, n = of.count;
    if (e_.sums) {
      std::memcpy(e_.sums + first, &sums, n * sizeof(int32_t));
      return;
    }
    Floats y = clamp(L::fma(L::floats(sums), of.multiplier, of.bias), low_, high_);
    if (e_.residual_q) {
      const Ints q = L::load_bytes(e_.residual_q + first, n) ^ residual_flip_;
      y = L::fma(L::floats(q - residual_zero_point_), residual_scale_, y);
    }
    if (e_.residual_f) y = y + L::load(e_.residual_f + first, n);
    y = clamp(y, low_after_, high_after_);
    if (e_.out_f) {
      if (e_.streams && first % kCount == 0 && n == kCount) L::stream(e_.out_f + first, y);
      else L::store(e_.out_f + first, y, n);
    }
    if (e_.out_q) L::store_bytes(e_.out_q + first, round(y, zero_point_), n);
  }

  // After the last sum of a task: what went past the caches is there for other threads.
  void flush() const {
    if (e_.streams) L::fence();
  }

  // `n` sums of one output pixel, for the channels from `c`.
  void apply(const int32_t* sums, int64_t c, int64_t n, int64_t at) const {
    for (int64_t i = 0; i < n; i += kCount) {
      const Channels some = channels(c + i, n - i);
      store(L::load_ints(sums + i, some.count), some, at);
    }
  }

 private:
  static Floats clamp(Floats y, Floats low, Floats high) {
    return L::least(high, L::most(low, y));
  }
  Ints round(Floats y, Ints plus) const {
    return L::rounded(clamp(y * inv_scale_, q_low_, q_high_)) + plus;
  }

  Epilogue e_;
  Floats low_, high_, low_after_, high_after_, inv_scale_, q_low_, q_high_, residual_scale_;
  Ints residual_zero_point_, residual_flip_, zero_point_;
};

}  // namespace jaxquant
