// The epilogue on registers of sixteen sums, by AVX-512.
#pragma once

#include "avx512_lanes.h"

#ifdef JAXQUANT_AVX512

namespace jaxquant {

using Channels16 = ChannelsOf<Avx512Lanes>;

// The epilogue on 16 sums in a register.
class Avx512Sums {
 public:
  static constexpr int kCount = 16;
  using Lanes = Avx512Lanes;
  const Form form;
  const Quantized<Lanes> quantized;

  Avx512Sums(const Epilogue& e, int64_t channels)
      : form(e.form(channels)), quantized(e), e_(e), low_(_mm512_set1_ps(e.low)),
        high_(_mm512_set1_ps(e.high)), low_after_(_mm512_set1_ps(e.low_after)),
        high_after_(_mm512_set1_ps(e.high_after)), inv_scale_(_mm512_set1_ps(e.inv_scale)),
        q_low_(_mm512_set1_ps(float(kLeast - e.zero_point))),
        q_high_(_mm512_set1_ps(float(kLargest - e.zero_point))),
        residual_scale_(_mm512_set1_ps(e.residual_scale)),
        residual_zero_point_(_mm512_set1_epi32(e.residual_zero_point)),
        residual_flip_(_mm_set1_epi8(char(e.residual_flip))),
        // Only the lowest byte of a sum is stored, so adding 128 flips the bit that uint8 flips.
        zero_point_(_mm512_set1_epi32(e.zero_point + e.out_flip)) {}

  int64_t bytes() const { return e_.bytes(); }

  // Fetches what will be added to `n` channels of `height` output pixels, the first of them at `at`.
  void prefetch(int64_t at, int64_t height, int64_t pixel, int64_t n) const {
    if (!e_.residual_f) return;
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t c = 0; c < n; c += 16)
        _mm_prefetch(e_.residual_f + at + i * pixel + c, _MM_HINT_T0);
    }
  }

  // Channels [c, c + 16), of which `n` are there, none where that is negative.
  Channels16 channels(int64_t c, int64_t n) const {
    const int64_t count = std::min<int64_t>(std::max<int64_t>(n, 0), kCount);
    return {c, count, Lanes::load(e_.multiplier + c, count),
            e_.bias ? Lanes::load(e_.bias + c, count) : Lanes::splat(0.0f)};
  }

  // Stores the results of an epilogue of any form; `at` is where channel 0 of this pixel is in the
  // output.
  void store(__m512i sums, const Channels16& of, int64_t at) const {
    const int64_t first = at + of.channel;
    const __mmask16 mask = (1u << of.count) - 1;
    if (e_.sums) return _mm512_mask_storeu_epi32(e_.sums + first, mask, sums);
    __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), (__m512)of.multiplier, (__m512)of.bias);
    y = clamp(y, low_, high_);
    if (e_.residual_q) {
      const __m128i bytes = _mm_maskz_loadu_epi8(mask, e_.residual_q + first);
      const __m512i q = _mm512_cvtepi8_epi32(_mm_xor_si128(bytes, residual_flip_));
      y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(q, residual_zero_point_)),
                          residual_scale_, y);
    }
    if (e_.residual_f)
      y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, e_.residual_f + first));
    y = clamp(y, low_after_, high_after_);
    if (e_.out_f) {
      if (e_.streams && first % 16 == 0 && mask == 0xffff)
        _mm512_stream_ps(e_.out_f + first, y);
      else
        _mm512_mask_storeu_ps(e_.out_f + first, mask, y);
    }
    if (e_.out_q) {
      const __m128i q = _mm512_cvtepi32_epi8(round(y, zero_point_));
      // Of all stores that narrow or have a mask of bytes some processors make a hundred steps.
      if (of.count == kCount) _mm_storeu_si128(reinterpret_cast<__m128i*>(e_.out_q + first), q);
      else std::memcpy(e_.out_q + first, &q, of.count);
    }
  }

  // After the last sum of a task: what went past the caches is there for other threads.
  void flush() const {
    if (e_.streams) _mm_sfence();
  }

  // `n` sums of one output pixel, for the channels from `c`.
  void apply(const int32_t* sums, int64_t c, int64_t n, int64_t at) const {
    for (int64_t i = 0; i < n; i += 16) {
      const Channels16 some = channels(c + i, n - i);
      store(_mm512_maskz_loadu_epi32((1u << some.count) - 1, sums + i), some, at);
    }
  }

 private:
  // A NaN passes: the second operand is the result if either is one.
  static __m512 clamp(__m512 y, __m512 low, __m512 high) {
    return _mm512_min_ps(high, _mm512_max_ps(low, y));
  }
  __m512i round(__m512 y, __m512i plus) const {
    y = clamp(_mm512_mul_ps(y, inv_scale_), q_low_, q_high_);
    return _mm512_add_epi32(_mm512_cvtps_epi32(y), plus);
  }

  Epilogue e_;
  __m512 low_, high_, low_after_, high_after_, inv_scale_, q_low_, q_high_, residual_scale_;
  __m512i residual_zero_point_;
  __m128i residual_flip_;
  __m512i zero_point_;
};

}  // namespace jaxquant

#endif
