// The instruction set of ARM with sums of four products of bytes.
#pragma once

#include "neon_lanes.h"

#ifdef JAXQUANT_NEON
#include "depthwise_registers.h"
#include "tile.h"
#include "window.h"

namespace jaxquant {

// sum + the products of four signed bytes with four, in each lane.
struct NeonProducts {
  using Vector = NeonLanes::Ints;
  using Values = Vector;
  using Packed = Vector;
  using Sums = NeonSums;
  static constexpr int kVectors = 4, kChannels = 4, kGroupBytes = 4;
  static constexpr int kPixels = 3;  // of a segment: two of 3 x 4 sums are 24 of 32 registers

  static Vector start(const int32_t* from) { return NeonLanes::load_ints(from, 4); }
  static Values values(const uint8_t* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return NeonLanes::splat(four);
  }
  static Packed packed(const int8_t* from) { return NeonBytes::load_bytes(from); }
  static Vector add(Vector sum, Values x, Packed weights) {
    return (Vector)vdotq_s32((int32x4_t)sum, (int8x16_t)x, (int8x16_t)weights);
  }
  static Vector result(const Vector* sums, int r) { return sums[r]; }
};

struct NeonDepthwise : InterleavedDepthwise<NeonBytes, NeonProducts> {
  static constexpr auto activations = Activations::as_s8;
  static void row(const DepthwiseRow& row, int64_t channels, const Sums& sums) {
    depthwise_row_in_registers<NeonDepthwise>(row, channels, sums);
  }
};

struct Neon : RegisterSet<NeonProducts, NeonDepthwise> {
  static constexpr const char* kName = "NEON";
  static constexpr double kProductsPerNs = 100;
  static constexpr int64_t kSegment = kAsFewAsPossible;
  static constexpr auto activations = Activations::as_s8;
};

}  // namespace jaxquant

#endif
