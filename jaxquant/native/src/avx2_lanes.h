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

  static Vector splat(int32_t value) { return Avx2Lanes::splat(value); }
  static Avx2Lanes::Floats load(const float* from) { return Avx2Lanes::load(from, 8); }
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
  // Of two registers each, which has them in 16 bytes side by side.
  static Vector to_words(Vector a, Vector b) {
    return (Vector)_mm256_packs_epi32((__m256i)a, (__m256i)b);
  }
  static Vector to_bytes(Vector (&sums)[4], uint8_t flip) {
    const Vector low = to_words(sums[0], sums[1]), high = to_words(sums[2], sums[3]);
    return (Vector)_mm256_xor_si256(_mm256_packs_epi16((__m256i)low, (__m256i)high),
                                    _mm256_set1_epi8(char(flip)));
  }
  static void store(int8_t* to, Vector bytes, int64_t n) {
    if (n >= kBytes) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)bytes);
    else std::memcpy(to, &bytes, n);
  }
};

}  // namespace jaxquant

#endif
