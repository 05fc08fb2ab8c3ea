// Registers of eight float32 or int32, for the epilogue of `lane_epilogue.h`.
#pragma once

#if defined(__AVX2__) && defined(__FMA__)
#define JAXQUANT_AVX2 1
#include <immintrin.h>

#include <cstring>

#include "lane_epilogue.h"
#include "vectors.h"

namespace jaxquant {

struct Avx2Lanes {
  static constexpr int kCount = 8;
  using Floats = VectorTypes<8>::Floats;
  using Ints = VectorTypes<8>::Ints;

  static Floats splat(float value) { return (Floats)_mm256_set1_ps(value); }
  static Ints splat(int32_t value) { return (Ints)_mm256_set1_epi32(value); }

  static Floats load(const float* from, int64_t n) {
    return (Floats)(n == kCount ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, first(n)));
  }
  static Ints load_ints(const int32_t* from, int64_t n) {
    return (Ints)(n == kCount ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                              : _mm256_maskload_epi32(from, first(n)));
  }
  static Ints load_bytes(const int8_t* from, int64_t n) {
    int64_t bytes = 0;
    std::memcpy(&bytes, from, n == kCount ? 8 : n);
    return (Ints)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes));
  }
  static void store(float* to, Floats floats, int64_t n) {
    if (n == kCount) _mm256_storeu_ps(to, (__m256)floats);
    else _mm256_maskstore_ps(to, first(n), (__m256)floats);
  }
  static void store_bytes(int8_t* to, Ints ints, int64_t n) {
    const __m256i lowest = _mm256_set1_epi32(0x0c080400);
    const __m256i fours = _mm256_shuffle_epi8((__m256i)ints, lowest);
    const int64_t bytes = _mm_cvtsi128_si64(_mm_unpacklo_epi32(
        _mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1)));
    std::memcpy(to, &bytes, n == kCount ? 8 : n);
  }
  static Ints splat_words(int16_t value) { return (Ints)_mm256_set1_epi16(value); }
  static Ints splat_bytes(int8_t value) { return (Ints)_mm256_set1_epi8(value); }
  // Of two registers each, which has them in 16 bytes side by side.
  static Ints to_words(Ints a, Ints b) {
    return (Ints)_mm256_packs_epi32((__m256i)a, (__m256i)b);
  }
  static Ints to_bytes(Ints a, Ints b) {
    return (Ints)_mm256_packs_epi16((__m256i)a, (__m256i)b);
  }
  static Ints add_words(Ints a, Ints b) {
    return (Ints)_mm256_adds_epi16((__m256i)a, (__m256i)b);
  }
  static Ints least_bytes(Ints a, Ints b) {
    return (Ints)_mm256_min_epi8((__m256i)a, (__m256i)b);
  }
  static Ints most_bytes(Ints a, Ints b) {
    return (Ints)_mm256_max_epi8((__m256i)a, (__m256i)b);
  }
  template <int R>
  static void store_two(int8_t* to_a, int8_t* to_b, Ints bytes) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i ordered = _mm256_permutevar8x32_epi32((__m256i)bytes, order);
    const __m128i low = _mm256_castsi256_si128(ordered);
    const __m128i a = low;
    const __m128i b = R == 2 ? _mm256_extracti128_si256(ordered, 1) : _mm_unpackhi_epi64(low, low);
    store_some<R>(to_a, a);
    store_some<R>(to_b, b);
  }
  static void stream(float* to, Floats floats) { _mm256_stream_ps(to, (__m256)floats); }
  static void fence() { _mm_sfence(); }

  static Floats fma(Floats a, Floats b, Floats c) {
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  }
  static Floats least(Floats a, Floats b) { return (Floats)_mm256_min_ps((__m256)a, (__m256)b); }
  static Floats most(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
  static Floats floats(Ints ints) { return (Floats)_mm256_cvtepi32_ps((__m256i)ints); }
  static Ints rounded(Floats floats) { return (Ints)_mm256_cvtps_epi32((__m256)floats); }

 private:
  template <int R>
  static void store_some(int8_t* to, __m128i bytes) {
    if (R == 2) _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
    else _mm_storel_epi64(reinterpret_cast<__m128i*>(to), bytes);
  }
  // A mask of the first `n` lanes.
  static __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int32_t(n)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

using Avx2Sums = LaneSums<Avx2Lanes>;

// What the depthwise kernels do with registers of 32 bytes.
struct Avx2Bytes {
  using Vector = Avx2Lanes::Ints;
  using Sums = Avx2Sums;
  static constexpr int kBytes = 32;

  static Vector load_ints(const int32_t* from) { return Avx2Lanes::load_ints(from, 8); }
  static Vector load_bytes(const void* from) {
    return (Vector)_mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  static Vector low_bytes(Vector a, Vector b) {
    return (Vector)_mm256_unpacklo_epi8((__m256i)a, (__m256i)b);
  }
  static Vector high_bytes(Vector a, Vector b) {
    return (Vector)_mm256_unpackhi_epi8((__m256i)a, (__m256i)b);
  }
  static Vector low_pairs(Vector a, Vector b) {
    return (Vector)_mm256_unpacklo_epi16((__m256i)a, (__m256i)b);
  }
  static Vector high_pairs(Vector a, Vector b) {
    return (Vector)_mm256_unpackhi_epi16((__m256i)a, (__m256i)b);
  }
  static void store(int8_t* to, Vector bytes, int64_t n) {
    if (n >= kBytes) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)bytes);
    else std::memcpy(to, &bytes, n);
  }
};

}  // namespace jaxquant

#endif
