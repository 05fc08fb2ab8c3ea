// The instruction set of a processor with AVX2 and no products of bytes.
#pragma once

#include "words.h"

#ifdef JAXQUANT_AVX2

namespace jaxquant {

// sum += the products of two pairs of int16, in each lane.
struct Avx2Words {
  using Vector = Avx2Lanes::Ints;
  using Values = Vector;
  using Packed = Vector;
  using Sums = Avx2Sums;
  static constexpr int kVectors = 2, kChannels = 4, kGroupBytes = 8;
  static constexpr int kPixels = 3;  // of a segment: two of 3 x 2 sums are 12 of 16 registers

  static Vector start(const int32_t* from) {
    return (Vector)_mm256_cvtepu32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Values values(const uint8_t* from) {
    int64_t four;
    std::memcpy(&four, from, 8);
    return (Values)_mm256_set1_epi64x(four);
  }
  static Packed packed(const int8_t* from) {
    return (Packed)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Vector add(Vector sum, Values x, Packed weights) {
    return sum + (Vector)_mm256_madd_epi16((__m256i)x, (__m256i)weights);
  }
  // The two sums of every channel, added.
  static Vector result(const Vector* sums, int r) {
    const __m256i both = _mm256_hadd_epi32((__m256i)sums[2 * r], (__m256i)sums[2 * r + 1]);
    return (Vector)_mm256_permute4x64_epi64(both, 0xd8);
  }
};

struct Avx2WordBytes : Avx2Bytes {
  static Vector add_words(Vector sum, Vector x, Vector weights) {
    return Avx2Words::add(sum, x, weights);
  }
  static Vector words_in_order(Vector bytes) {
    return (Vector)_mm256_permute4x64_epi64((__m256i)bytes, 0xd8);
  }
};

struct Avx2 : RegisterSet<Avx2Words, WordDepthwise<Avx2WordBytes>> {
  static constexpr const char* kName = "AVX2";
  static constexpr double kProductsPerNs = 100;
  static constexpr int64_t kSegment = 1;
  static constexpr auto activations = Activations::as_s16;
};

}  // namespace jaxquant

#endif
