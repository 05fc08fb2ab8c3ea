// What the matrix kernels of all instruction sets share: pixels, weights, and what one call does.
//
// A tile is two segments of H pixels each.  The pixels of a segment are `stride` bytes apart; the
// bytes that a pixel multiplies are `taps` runs of 4 * `groups` bytes, at the same offsets from
// every pixel.  Weights are packed as [tap][group][channel][4 bytes], for 16 * NR channels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "shape.h"

namespace jaxquant {

constexpr int64_t kNearWeights = 1 << 18;  // bytes of weights that stay in the L2 cache with the rest

// What each segment takes beside its pixels, in quarters of one, where these are all that counts.
constexpr int64_t kAsFewAsPossible = 1 << 20;

struct Runs {
  const ptrdiff_t* offsets;  // [taps]
  int64_t taps;
  int64_t groups;  // groups of four bytes in one run
  ptrdiff_t stride;
  // Segments may run on over the ends of rows where an instruction set `kRunsOn`: of every `row`
  // pixels `kept` are outputs, and what comes of the others is dropped.
  int64_t row = 1, kept = 1;
};

struct Segment {
  const uint8_t* in;
  int64_t out;         // where its first pixel is in the output, channel 0
  int64_t column = 0;  // of its first pixel in the row
};

// What a tile needs of a block of channels.
struct Block {
  const int8_t* weights;
  const int32_t* init;  // [16 * NR]: what the sums start from
  int64_t channel;      // first channel in the output
  int64_t channels;     // how many of the 16 * NR are there
  int64_t pixel;        // distance of two pixels in the output
};

// The packed weights of a product, block by block, with what each sum starts from.
class Weights {
 public:
  // The sums take `zero_point` times the sum of the weights away from the start.
  Weights(const PackedMatrix& layout, const int8_t* packed, int64_t outputs, int32_t zero_point)
      : layout_(layout), packed_(packed), outputs_(outputs),
        init_(layout.groups * layout.padded_out() + kBlock) {
    const int32_t* sums = layout.sums(packed);
    for (int64_t i = 0; i < layout.groups * layout.padded_out(); ++i)
      init_[i] = int32_t(0u - uint32_t(zero_point) * uint32_t(sums[i]));
  }

  const PackedMatrix& layout() const { return layout_; }
  int64_t outputs() const { return outputs_; }
  // Whether a block has all its 32 channels, else 16.
  bool wide(int64_t b) const { return layout_.padded_out() - b * kBlock >= kBlock; }
  Block block(int64_t group, int64_t b) const {
    const int64_t start = b * kBlock;
    return {layout_.block(packed_, group, b), init_.data() + group * layout_.padded_out() + start,
            group * layout_.out + start, std::min<int64_t>(kBlock, layout_.out - start), outputs_};
  }

 private:
  PackedMatrix layout_;
  const int8_t* packed_;
  int64_t outputs_;  // channels of an output pixel, of all groups
  std::vector<int32_t> init_;
};

// What one call of a matrix kernel computes: all channels of blocks [first, last) of a group, for
// segments of `height` pixels.
struct Share {
  const std::vector<Segment>& segments;
  int64_t height;
  const Runs& runs;
  int64_t group, first, last;
  bool is_signed;  // the activations are int8; else u8
};

// An odd segment at the end is a tile of its two halves, which may overlap.
template <class Set>
void run_odd(const Segment& segment, const Share& share, int64_t b, const Block& block,
             const Weights& weights, const typename Set::Sums& sums) {
  const int64_t half = ceil_div(share.height, 2), rest = share.height - half;
  const Segment second{segment.in + rest * share.runs.stride, segment.out + rest * block.pixel};
  Set::find_tile(half, weights.wide(b), sums)(segment, second, share.runs, block, sums);
}

// A share by the tiles of an instruction set.  Block after block, so that the weights of one stay in
// the nearest cache; but where those of all stay in the next one, all of a pixel's channels at once:
// what is read and written of the output is whole lines then, in order.
template <class Set>
void run_tiles(const Share& share, const Weights& weights, const typename Set::Sums& sums) {
  const int64_t blocks = share.last - share.first, pairs = ceil_div(share.segments.size(), 2);
  const int64_t bytes = blocks * kBlock * weights.layout().four_bytes * 4;
  const int64_t pairs_together = bytes > kNearWeights ? pairs : 1;
  for (int64_t i = 0; i < pairs; i += pairs_together) {
    for (int64_t b = share.first; b < share.last; ++b) {
      const auto tile = Set::find_tile(share.height, weights.wide(b), sums);
      const Block block = weights.block(share.group, b);
      for (int64_t k = 2 * i; k < 2 * std::min(pairs, i + pairs_together); k += 2) {
        if (k + 1 < int64_t(share.segments.size())) {
          tile(share.segments[k], share.segments[k + 1], share.runs, block, sums);
        } else {
          run_odd<Set>(share.segments[k], share, b, block, weights, sums);
        }
      }
    }
  }
}

// The function for tiles of two segments of `height` pixels, of those that `Tiles::at<H>` names.
template <class Tiles, int H = Tiles::kHighest>
auto tile_of_height(int64_t height) {
  if constexpr (H > 1) {
    if (height < H) return tile_of_height<Tiles, H - 1>(height);
  }
  return Tiles::template at<H>();
}

}  // namespace jaxquant
