// What one call of a depthwise kernel computes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "shape.h"

namespace jaxquant {

// One output row of one block of 64 channels.
struct DepthwiseRow {
  const uint8_t* in;
  int64_t out;                 // of its first element
  int64_t steps;               // vectors of outputs
  ptrdiff_t in_step, out_step;
  int64_t lanes, last_lanes;   // outputs of a step, of the last step
  const ptrdiff_t* offsets;    // [taps, rounded up to whole quads]
  int64_t taps;
  const int8_t* weights;       // of the block, as the instruction set's `Taps` have them
  const int32_t* init;         // [64], as ordered by its `channel_of`, and these two
  const float* multiplier;
  const float* bias;
  int64_t channel;
};

// The weights as they are packed.
class PackedTaps {
 public:
  PackedTaps(const PackedDepthwise& layout, const int8_t* packed)
      : layout_(layout), packed_(packed) {}
  const int8_t* block(int64_t index) const { return layout_.block(packed_, index); }

 private:
  PackedDepthwise layout_;
  const int8_t* packed_;
};

// Stores the sums of a step, in the order of `D`, by an epilogue of any form.
template <class D, class Sums>
void store_general(const int32_t (&sums)[kLanes], const DepthwiseRow& row, int64_t lanes,
                   int64_t out, int64_t channels, const Sums& epilogue) {
  int32_t ordered[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) ordered[D::channel_of(i)] = sums[i];
  for (int64_t i = 0; i < lanes; i += channels) {  // a step of few channels is several pixels
    const int64_t n = std::min(channels, lanes - i);
    epilogue.apply(ordered + i, row.channel, n, out + i - row.channel);
  }
}

}  // namespace jaxquant
