// The instruction set of a processor with products of bytes in registers of 32 bytes: AVX-VNNI, or
// what AVX-512 has of it for such registers.
#pragma once

#include "avx2_lanes.h"

#if defined(JAXQUANT_AVX2) && \
    (defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__)))
#define JAXQUANT_AVX_VNNI 1
#include "depthwise_registers.h"
#include "tile.h"
#include "window.h"

namespace jaxquant {

// sum += the products of four unsigned bytes with four signed ones, in each lane.  Written out for
// the reason that `Avx512Products` has.
struct AvxVnniProducts {
  using Vector = Avx2Lanes::Ints;
  using Values = Vector;
  using Packed = Vector;
  using Sums = Avx2Sums;
  static constexpr int kVectors = 2, kChannels = 8, kGroupBytes = 4;
  static constexpr int kPixels = 3;  // of a segment: two of 3 x 2 sums are 12 of 16 registers

  static Vector start(const int32_t* from) { return Avx2Lanes::load_ints(from, 8); }
  static Values values(const uint8_t* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return Avx2Lanes::splat(four);
  }
  static Packed packed(const int8_t* from) { return Avx2Bytes::load_bytes(from); }
  static Vector add(Vector sum, Values x, Packed weights) {
#if defined(__AVXVNNI__)
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(weights));
#else
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weights));
#endif
    return sum;
  }
  static Vector result(const Vector* sums, int r) { return sums[r]; }
};

struct AvxVnniDepthwise : InterleavedDepthwise<Avx2Bytes, AvxVnniProducts> {
  static constexpr auto activations = Activations::as_u8;
  static void row(const DepthwiseRow& row, int64_t channels, const Sums& sums) {
    depthwise_row_in_registers<AvxVnniDepthwise>(row, channels, sums);
  }
};

struct AvxVnni : RegisterSet<AvxVnniProducts, AvxVnniDepthwise> {
  static constexpr const char* kName = "AVX-VNNI";
  static constexpr double kProductsPerNs = 250;
  static constexpr int64_t kSegment = 2;
  static constexpr auto activations = Activations::as_u8;
};

}  // namespace jaxquant

#endif
