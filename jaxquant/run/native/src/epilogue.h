// The epilogue of an accumulating operation: int32 sums to float32, and on to int8.
//
//   y = sum * multiplier[c] + bias[c]            (one fused multiply-add, as XLA contracts it)
//   y = clamp(y, low, high)
//   y = y + (residual - residual_zero_point) * residual_scale     (one fused multiply-add)
//   y = clamp(y, low_after, high_after)
//   q = round_half_even(clamp(y * inv_scale, q_min - zero_point, q_max - zero_point)) + zero_point
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
  int8_t* out_q = nullptr;  // of the output's shape, or null
  float inv_scale = 1.0f;
  int32_t zero_point = 0;
  int32_t q_min = -128, q_max = 127;
  uint8_t out_flip = 0;

  // An int8 output and nothing else: the form that the kernels keep in registers.
  bool plain() const { return out_q && !out_f && !residual_q && !residual_f; }

  // True where the clamp changes nothing: what it cuts saturates anyway.  Holds for `plain`.
  bool clamp_is_saturation() const {
    auto grid = [this](float y) { return std::nearbyintf(y * inv_scale) + zero_point; };
    return grid(low) <= q_min && grid(high) >= q_max;
  }

  // `n` sums of one output pixel, for the channels from `c`, which are at `at` in the output.
  void apply(const int32_t* sums, int64_t c, int64_t n, int64_t at) const {
    for (int64_t start = 0; start < n; start += 16) {
      const int64_t m = std::min<int64_t>(16, n - start);
      float y[16];
      for (int64_t k = 0; k < m; ++k) {
        const float offset = bias ? bias[c + start + k] : 0.0f;
        const float value = std::fma(float(sums[start + k]), multiplier[c + start + k], offset);
        y[k] = std::min(std::max(value, low), high);
      }
      const int64_t first = at + start;
      if (residual_q) {
        for (int64_t k = 0; k < m; ++k) {
          const int32_t q = int8_t(residual_q[first + k] ^ residual_flip);
          y[k] = std::fma(float(q - residual_zero_point), residual_scale, y[k]);
        }
      }
      if (residual_f) {
        for (int64_t k = 0; k < m; ++k) y[k] += residual_f[first + k];
      }
      for (int64_t k = 0; k < m; ++k) y[k] = std::min(std::max(y[k], low_after), high_after);
      if (out_f) {
        for (int64_t k = 0; k < m; ++k) out_f[first + k] = y[k];
      }
      if (out_q) {
        const float q_low = q_min - zero_point, q_high = q_max - zero_point;
        for (int64_t k = 0; k < m; ++k) {
          const float scaled = std::min(std::max(y[k] * inv_scale, q_low), q_high);
          const int32_t q = int32_t(std::nearbyintf(scaled)) + zero_point;
          out_q[first + k] = int8_t(q ^ out_flip);
        }
      }
    }
  }
};

#ifdef JAXQUANT_AVX512
// The `plain` epilogue on 16 sums in a register.
struct VectorEpilogue {
  __m512 low, high, inv_scale, q_low, q_high;
  bool clamps;

  explicit VectorEpilogue(const Epilogue& e)
      : low(_mm512_set1_ps(std::max(e.low, e.low_after))),
        high(_mm512_set1_ps(std::min(e.high, e.high_after))),
        inv_scale(_mm512_set1_ps(e.inv_scale)),
        q_low(_mm512_set1_ps(float(e.q_min - e.zero_point))),
        q_high(_mm512_set1_ps(float(e.q_max - e.zero_point))),
        clamps(!e.clamp_is_saturation()) {}

  template <bool kClamps>
  __m512i apply(__m512i sums, __m512 multiplier, __m512 bias, __m512i zero_point) const {
    __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums), multiplier, bias);
    if constexpr (kClamps) y = _mm512_min_ps(_mm512_max_ps(y, low), high);
    y = _mm512_mul_ps(y, inv_scale);
    y = _mm512_min_ps(_mm512_max_ps(y, q_low), q_high);
    return _mm512_add_epi32(_mm512_cvtps_epi32(y), zero_point);
  }
};
#endif

}  // namespace jaxquant
