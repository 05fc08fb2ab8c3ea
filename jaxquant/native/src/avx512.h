// The instruction set of a processor with AVX-512 and its products of bytes (VNNI).
#pragma once

#include "avx512_bytes.h"

#if defined(JAXQUANT_AVX512) && defined(__AVX512VNNI__)
#define JAXQUANT_AVX512_VNNI 1
#include <cstring>

#include "depthwise_registers.h"
#include "tile.h"
#include "window.h"

namespace jaxquant {

// sum += the products of four unsigned bytes with four signed ones, in each lane.  Of the intrinsic
// GCC 12 makes copies of the sums, so that those of a tile do not fit into registers any more.
struct Avx512Products {
  using Vector = __m512i;
  using Values = __m512i;
  using Packed = __m512i;
  using Sums = Avx512Sums;
  static constexpr int kVectors = 2, kChannels = 16, kGroupBytes = 4;
  static constexpr int kPixels = 7;  // of a segment: two of 7 x 2 sums are 28 of 32 registers

  static Vector start(const int32_t* from) { return _mm512_loadu_si512(from); }
  static Values values(const uint8_t* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return _mm512_set1_epi32(four);
  }
  static Packed packed(const int8_t* from) { return _mm512_load_si512(from); }
  static Vector add(Vector sum, Values x, Packed weights) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weights));
    return sum;
  }
  static Vector result(const Vector* sums, int r) { return sums[r]; }
};

struct Avx512Depthwise : InterleavedDepthwise<Avx512Bytes, Avx512Products> {
  static constexpr auto activations = Activations::as_u8;
  static void row(const DepthwiseRow& row, int64_t channels, const Sums& sums) {
    depthwise_row_in_registers<Avx512Depthwise>(row, channels, sums);
  }
};

struct Avx512 : RegisterSet<Avx512Products, Avx512Depthwise> {
  static constexpr const char* kName = "AVX512-VNNI";
  static constexpr double kProductsPerNs = 500;
  static constexpr int64_t kSegment = kAsFewAsPossible;
  static constexpr auto activations = Activations::as_u8;
};

}  // namespace jaxquant

#endif
