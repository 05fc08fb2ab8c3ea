// What the depthwise kernels do with registers of 64 bytes.
#pragma once

#include "avx512_epilogue.h"

#ifdef JAXQUANT_AVX512

namespace jaxquant {

struct Avx512Bytes {
  using Vector = __m512i;
  using Sums = Avx512Sums;
  static constexpr int kBytes = 64;

  static Vector load_ints(const int32_t* from) { return _mm512_loadu_si512(from); }
  static Vector load_bytes(const void* from) { return _mm512_loadu_si512(from); }
  static Vector low_bytes(Vector a, Vector b) { return _mm512_unpacklo_epi8(a, b); }
  static Vector high_bytes(Vector a, Vector b) { return _mm512_unpackhi_epi8(a, b); }
  static Vector low_pairs(Vector a, Vector b) { return _mm512_unpacklo_epi16(a, b); }
  static Vector high_pairs(Vector a, Vector b) { return _mm512_unpackhi_epi16(a, b); }
  static void store(int8_t* to, Vector bytes, int64_t n) {
    const __mmask64 mask = n >= kBytes ? ~__mmask64(0) : (__mmask64(1) << n) - 1;
    _mm512_mask_storeu_epi8(to, mask, bytes);
  }
};

}  // namespace jaxquant

#endif
