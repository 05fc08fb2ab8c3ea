// Registers of sixteen float32 or int32, for the epilogue of `quantized.h`.
#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define JAXQUANT_AVX512 1
#include <immintrin.h>

#include <cstring>

#include "quantized.h"
#include "vectors.h"

namespace jaxquant {

struct Avx512Lanes {
  static constexpr int kCount = 16;
  using Floats = VectorTypes<16>::Floats;
  using Ints = VectorTypes<16>::Ints;

  static Floats splat(float value) { return (Floats)_mm512_set1_ps(value); }
  static Ints splat(int32_t value) { return (Ints)_mm512_set1_epi32(value); }
  static Ints splat_words(int16_t value) { return (Ints)_mm512_set1_epi16(value); }
  static Ints splat_bytes(int8_t value) { return (Ints)_mm512_set1_epi8(value); }

  static Floats load(const float* from, int64_t n) {
    return (Floats)(n == kCount ? _mm512_loadu_ps(from)
                                : _mm512_maskz_loadu_ps((1u << n) - 1, from));
  }
  static Ints load_bytes(const int8_t* from, int64_t n) {
    const __m128i bytes = n == kCount ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))
                                      : _mm_maskz_loadu_epi8((1u << n) - 1, from);
    return (Ints)_mm512_cvtepi8_epi32(bytes);
  }

  static Floats fma(Floats a, Floats b, Floats c) {
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  }
  static Floats floats(Ints ints) { return (Floats)_mm512_cvtepi32_ps((__m512i)ints); }
  static Ints rounded(Floats floats) { return (Ints)_mm512_cvtps_epi32((__m512)floats); }

  // Of two registers each, which has them in 16 bytes side by side.
  static Ints to_words(Ints a, Ints b) {
    return (Ints)_mm512_packs_epi32((__m512i)a, (__m512i)b);
  }
  static Ints to_bytes(Ints a, Ints b) {
    return (Ints)_mm512_packs_epi16((__m512i)a, (__m512i)b);
  }
  static Ints add_words(Ints a, Ints b) {
    return (Ints)_mm512_adds_epi16((__m512i)a, (__m512i)b);
  }
  static Ints least_bytes(Ints a, Ints b) {
    return (Ints)_mm512_min_epi8((__m512i)a, (__m512i)b);
  }
  static Ints most_bytes(Ints a, Ints b) {
    return (Ints)_mm512_max_epi8((__m512i)a, (__m512i)b);
  }
  template <int R>
  static void store_two(int8_t* to_a, int8_t* to_b, Ints bytes) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i ordered = _mm512_permutexvar_epi32(order, (__m512i)bytes);
    const __m256i low = _mm512_castsi512_si256(ordered);
    const __m256i a = low;
    const __m256i b = R == 2 ? _mm512_extracti64x4_epi64(ordered, 1)
                             : _mm256_castsi128_si256(_mm256_extracti128_si256(low, 1));
    store_some<R>(to_a, a);
    store_some<R>(to_b, b);
  }

 private:
  template <int R>
  static void store_some(int8_t* to, __m256i bytes) {
    if (R == 2) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
    else _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(bytes));
  }
};

}  // namespace jaxquant

#endif
