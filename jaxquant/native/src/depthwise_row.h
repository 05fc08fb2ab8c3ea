// What one call of a depthwise kernel computes, and the order of its sums.
//
// Four taps of a window are interleaved so that one instruction multiplies and adds them.  The
// interleaving leaves the channels of a 64-byte vector in the order of `channel_of`; packing the
// sums to bytes restores it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "shape.h"

namespace jaxquant {

// Where in the 64 channels the sum number `i` of a step is.
inline int64_t channel_of(int64_t i) { return (i % 16) / 4 * 16 + i / 16 * 4 + i % 4; }

// One output row of one block of 64 channels.
struct DepthwiseRow {
  const uint8_t* in;
  int64_t out;                 // of its first element
  int64_t steps;               // vectors of outputs
  ptrdiff_t in_step, out_step;
  int64_t lanes, last_lanes;   // outputs of a step, of the last step
  const ptrdiff_t* offsets;    // [4 * quads]
  int64_t quads;
  const int8_t* weights;
  const int32_t* init;         // [64], as ordered by `channel_of`, and these two
  const float* multiplier;
  const float* bias;
  int64_t channel;
};

// Stores the sums of a step by an epilogue of any form, the channels in their own order.
template <class Sums>
void store_general(const int32_t (&sums)[kLanes], const DepthwiseRow& row, int64_t lanes,
                   int64_t out, int64_t channels, const Sums& epilogue) {
  int32_t ordered[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) ordered[channel_of(i)] = sums[i];
  for (int64_t i = 0; i < lanes; i += channels) {  // a step of few channels is several pixels
    const int64_t n = std::min(channels, lanes - i);
    epilogue.apply(ordered + i, row.channel, n, out + i - row.channel);
  }
}

}  // namespace jaxquant
