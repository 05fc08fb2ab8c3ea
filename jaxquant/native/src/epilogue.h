// The epilogue of an accumulating operation: int32 sums to float32, and on to int8.
//
//   y = sum * multiplier[c] + bias[c]            (one fused multiply-add, as XLA contracts it)
//   y = clamp(y, low, high)
//   y = y + (residual - residual_zero_point) * residual_scale     (one fused multiply-add)
//   y = clamp(y, low_after, high_after)
//   q = round_half_even(clamp(y * inv_scale, kLeast - zero_point, kLargest - zero_point)) + zero_point
//
// The bounds of the last clamp are integers, so clamping before rounding gives what clamping after
// it does, and nothing overflows in the conversion.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#define JAXQUANT_AVX512 1
#include <immintrin.h>
#endif

namespace jaxquant {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int32_t kLeast = -128, kLargest = 127;  // of int8
constexpr int64_t kStreamedBytes = 1 << 21;  // a float output of so many is written past the caches

struct Epilogue {
  const float* multiplier = nullptr;  // [C]
  const float* bias = nullptr;        // [C], or null
  float low = -kInfinity, high = kInfinity;
  const int8_t* residual_q = nullptr;  // of the output's shape, or null
  const float* residual_f = nullptr;   // of the output's shape, or null
  float residual_scale = 1.0f;
  int32_t residual_zero_point = 0;
  uint8_t residual_flip = 0;  // 0x80 for uint8, which holds q + 128
  float low_after = -kInfinity, high_after = kInfinity;
  float* out_f = nullptr;   // of the output's shape, or null
  bool streams = false;     // out_f goes past the caches: no line is read to be written
  int8_t* out_q = nullptr;  // of the output's shape, or null
  float inv_scale = 1.0f;
  int32_t zero_point = 0;
  uint8_t out_flip = 0;

  // Low and high before the residual, low and high behind it; without one, one clamp.
  void set_clamps(const float* bounds, bool has_residual) {
    low = bounds[0], high = bounds[1], low_after = bounds[2], high_after = bounds[3];
    if (has_residual) return;
    low = std::min(std::max(low, low_after), high_after);
    high = std::min(std::max(high, low_after), high_after);
    low_after = -kInfinity, high_after = kInfinity;
  }
  // A float output of `size` bytes; large ones go past the caches where whole vectors do.
  void write_floats(void* data, int64_t size, int64_t channels) {
    out_f = static_cast<float*>(data);
    streams = size >= kStreamedBytes && channels % 16 == 0 &&
              reinterpret_cast<uintptr_t>(data) % 64 == 0;
  }

  // Read and written for one sum.
  int64_t bytes() const {
    return (out_f ? 4 : 0) + (out_q ? 1 : 0) + (residual_f ? 4 : 0) + (residual_q ? 1 : 0);
  }
  // An int8 output and nothing else: the form that the kernels keep in registers.
  bool plain() const { return out_q && !out_f && !residual_q && !residual_f; }

  // True where the clamp changes nothing: what it cuts saturates anyway.  Holds for `plain`.
  bool clamp_is_saturation() const {
    auto grid = [this](float y) { return std::nearbyintf(y * inv_scale) + zero_point; };
    return grid(low) <= kLeast && grid(high) >= kLargest;
  }
};

#ifdef JAXQUANT_AVX512

// What belongs to 16 channels: `mask` has those that are there.
struct Lanes {
  int64_t channel;
  __mmask16 mask;
  __m512 multiplier, bias;
};

// The epilogue on 16 sums in a register.
class SumsEpilogue {
 public:
  const bool plain, clamps;  // as of Epilogue; `clamps`: the clamp of `to_grid` is needed

  explicit SumsEpilogue(const Epilogue& e)
      : plain(e.plain()), clamps(!e.clamp_is_saturation()), e_(e), low_(_mm512_set1_ps(e.low)),
        high_(_mm512_set1_ps(e.high)), low_after_(_mm512_set1_ps(e.low_after)),
        high_after_(_mm512_set1_ps(e.high_after)), inv_scale_(_mm512_set1_ps(e.inv_scale)),
        q_low_(_mm512_set1_ps(float(kLeast - e.zero_point))),
        q_high_(_mm512_set1_ps(float(kLargest - e.zero_point))),
        residual_scale_(_mm512_set1_ps(e.residual_scale)),
        residual_zero_point_(_mm512_set1_epi32(e.residual_zero_point)),
        residual_flip_(_mm_set1_epi8(char(e.residual_flip))),
        // Of a sum the lowest byte is kept, so adding 128 flips the bit that uint8 has flipped.
        zero_point_(_mm512_set1_epi32(e.zero_point + e.out_flip)) {}

  const Epilogue& given() const { return e_; }
  int64_t bytes() const { return e_.bytes(); }

  // What will be added to `n` channels of `height` output pixels, the first of them at `at`.
  void prefetch(int64_t at, int64_t height, int64_t pixel, int64_t n) const {
    if (!e_.residual_f) return;
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t c = 0; c < n; c += 16)
        _mm_prefetch(e_.residual_f + at + i * pixel + c, _MM_HINT_T0);
    }
  }

  // Channels [c, c + 16), of which `n` are there.
  Lanes lanes(int64_t c, int64_t n) const {
    const __mmask16 mask = n >= 16 ? 0xffff : __mmask16((1u << std::max<int64_t>(n, 0)) - 1);
    return {c, mask, _mm512_maskz_loadu_ps(mask, e_.multiplier + c),
            e_.bias ? _mm512_maskz_loadu_ps(mask, e_.bias + c) : _mm512_setzero_ps()};
  }

  // Of a `plain` epilogue, which has one clamp: the integers to store; `plus` is the zero point.
  template <bool kClamps>
  __m512i to_grid(__m512i sums, __m512 multiplier, __m512 bias, __m512i plus) const {
    __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), multiplier, bias);
    if constexpr (kClamps) y = clamp(y, low_, high_);
    return round(y, plus);
  }
  template <bool kClamps>
  void store_plain(__m512i sums, const Lanes& lanes, int64_t at) const {
    const __m512i q = to_grid<kClamps>(sums, lanes.multiplier, lanes.bias, zero_point_);
    _mm512_mask_cvtepi32_storeu_epi8(e_.out_q + at + lanes.channel, lanes.mask, q);
  }

  // Of any; `at` is where channel 0 of this pixel is in the output.
  void store(__m512i sums, const Lanes& lanes, int64_t at) const {
    const int64_t first = at + lanes.channel;
    __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), lanes.multiplier, lanes.bias);
    y = clamp(y, low_, high_);
    if (e_.residual_q) {
      const __m128i bytes = _mm_maskz_loadu_epi8(lanes.mask, e_.residual_q + first);
      const __m512i q = _mm512_cvtepi8_epi32(_mm_xor_si128(bytes, residual_flip_));
      y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(q, residual_zero_point_)),
                          residual_scale_, y);
    }
    if (e_.residual_f)
      y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(lanes.mask, e_.residual_f + first));
    y = clamp(y, low_after_, high_after_);
    if (e_.out_f) {
      if (e_.streams && first % 16 == 0 && lanes.mask == 0xffff)
        _mm512_stream_ps(e_.out_f + first, y);
      else
        _mm512_mask_storeu_ps(e_.out_f + first, lanes.mask, y);
    }
    if (e_.out_q) {
      const __m512i q = round(y, zero_point_);
      _mm512_mask_cvtepi32_storeu_epi8(e_.out_q + first, lanes.mask, q);
    }
  }

  // After the last sum of a task: what went past the caches is there for other threads.
  void flush() const {
    if (e_.streams) _mm_sfence();
  }

  // `n` sums of one output pixel, for the channels from `c`.
  void apply(const int32_t* sums, int64_t c, int64_t n, int64_t at) const {
    for (int64_t i = 0; i < n; i += 16) {
      const Lanes some = lanes(c + i, n - i);
      store(_mm512_maskz_loadu_epi32(some.mask, sums + i), some, at);
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

#else  // portable

class SumsEpilogue {
 public:
  const bool plain, clamps = true;

  explicit SumsEpilogue(const Epilogue& e) : plain(e.plain()), e_(e) {}
  int64_t bytes() const { return e_.bytes(); }
  void flush() const {}

  // `n` sums of one output pixel, for the channels from `c`; `at` is where its channel 0 is in the
  // output.
  void apply(const int32_t* sums, int64_t c, int64_t n, int64_t at) const {
    for (int64_t start = 0; start < n; start += 16) {
      const int64_t m = std::min<int64_t>(16, n - start), channel = c + start;
      float y[16];
      for (int64_t k = 0; k < m; ++k) {
        const float offset = e_.bias ? e_.bias[channel + k] : 0.0f;
        const float value = std::fma(float(sums[start + k]), e_.multiplier[channel + k], offset);
        y[k] = std::min(std::max(value, e_.low), e_.high);
      }
      const int64_t first = at + channel;
      if (e_.residual_q) {
        for (int64_t k = 0; k < m; ++k) {
          const int32_t q = int8_t(e_.residual_q[first + k] ^ e_.residual_flip);
          y[k] = std::fma(float(q - e_.residual_zero_point), e_.residual_scale, y[k]);
        }
      }
      if (e_.residual_f) {
        for (int64_t k = 0; k < m; ++k) y[k] += e_.residual_f[first + k];
      }
      for (int64_t k = 0; k < m; ++k)
        y[k] = std::min(std::max(y[k], e_.low_after), e_.high_after);
      if (e_.out_f) {
        for (int64_t k = 0; k < m; ++k) e_.out_f[first + k] = y[k];
      }
      if (e_.out_q) {
        const float q_low = kLeast - e_.zero_point, q_high = kLargest - e_.zero_point;
        for (int64_t k = 0; k < m; ++k) {
          const float scaled = std::min(std::max(y[k] * e_.inv_scale, q_low), q_high);
          const int32_t q = int32_t(std::nearbyintf(scaled)) + e_.zero_point;
          e_.out_q[first + k] = int8_t(q ^ e_.out_flip);
        }
      }
    }
  }

 private:
  Epilogue e_;
};

#endif

}  // namespace jaxquant
