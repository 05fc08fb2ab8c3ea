// The instruction set of a processor with AVX-512 and no products of bytes: those of int16.
#pragma once

#include "avx512_bytes.h"

#ifdef JAXQUANT_AVX512
#include "words.h"

namespace jaxquant {

// sum += the products of two pairs of int16, in each lane.
struct Avx512WordProducts {
  using Vector = __m512i;
  using Values = __m512i;
  using Packed = __m512i;
  using Sums = Avx512Sums;
  static constexpr int kVectors = 2, kChannels = 8, kGroupBytes = 8;
  static constexpr int kPixels = 7;  // of a segment: two of 7 x 2 sums are 28 of 32 registers

  static Vector start(const int32_t* from) {
    return _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Values values(const uint8_t* from) {
    int64_t four;
    std::memcpy(&four, from, 8);
    return _mm512_set1_epi64(four);
  }
  static Packed packed(const int8_t* from) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Vector add(Vector sum, Values x, Packed weights) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(x, weights));
  }
  // The two sums of every channel, added.
  static Vector result(const Vector* sums, int r) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512i a = sums[2 * r], b = sums[2 * r + 1];
    return _mm512_add_epi32(_mm512_permutex2var_epi32(a, even, b),
                            _mm512_permutex2var_epi32(a, odd, b));
  }
};

struct Avx512WordBytes : Avx512Bytes {
  static Vector add_words(Vector sum, Vector x, Vector weights) {
    return Avx512WordProducts::add(sum, x, weights);
  }
  static Vector words_in_order(Vector bytes) {
    const __m512i halves = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    return _mm512_permutexvar_epi64(halves, bytes);
  }
};

struct Avx512Words : RegisterSet<Avx512WordProducts, WordDepthwise<Avx512WordBytes>> {
  static constexpr const char* kName = "AVX-512";
  static constexpr double kProductsPerNs = 200;
  static constexpr int64_t kSegment = 1;
  static constexpr auto activations = Activations::as_s16;
};

}  // namespace jaxquant

#endif
