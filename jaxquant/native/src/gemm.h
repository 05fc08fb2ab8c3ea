// The matrix kernel: sums of products of u8 activations and s8 weights for a few output pixels.
//
// A tile is two segments of H pixels each.  The pixels of a segment are `stride` bytes apart; the
// bytes that a pixel multiplies are `taps` runs of 4 * `groups` bytes, at the same offsets from
// every pixel.  Weights are packed as [tap][group][channel][4 bytes], for 16 * NR channels.
#pragma once

#include <cstring>

#include "epilogue.h"

namespace jaxquant {

constexpr int kSegment = 7;  // pixels at most: two segments of 14 x 2 sums fill 28 registers
constexpr int kBlock = 32;   // output channels of a block; the last one of a group may have 16

struct Runs {
  const ptrdiff_t* offsets;  // [taps]
  int64_t taps;
  int64_t groups;  // of four bytes, in one run
  ptrdiff_t stride;
  // Segments that run on over the ends of rows: of every `row` pixels `kept` are outputs, and what
  // comes of the others is dropped.  Only the AMX kernel has such.
  int64_t row = 1, kept = 1;
};

struct Segment {
  const uint8_t* in;
  int64_t out;  // where its first pixel is in the output, channel 0
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

#ifdef JAXQUANT_AVX512

template <int H, int NR, bool kClamps, bool kPlain>
void tile(const Segment& s0, const Segment& s1, const Runs& runs, const Block& block,
          const SumsEpilogue& epilogue) {
  __m512i sums[2 * H][NR];
#pragma GCC unroll 2
  for (int r = 0; r < NR; ++r) {
    const __m512i init = _mm512_loadu_si512(block.init + 16 * r);
#pragma GCC unroll 14
    for (int i = 0; i < 2 * H; ++i) sums[i][r] = init;
  }
  const int8_t* w = block.weights;
  const ptrdiff_t stride = runs.stride;
  for (int64_t t = 0; t < runs.taps; ++t) {
    // Three pointers a segment, so that every pixel is one addressing mode away.
    const uint8_t* a0 = s0.in + runs.offsets[t];
    const uint8_t* b0 = s1.in + runs.offsets[t];
    const uint8_t *a3 = a0 + 3 * stride, *a6 = a0 + 6 * stride;
    const uint8_t *b3 = b0 + 3 * stride, *b6 = b0 + 6 * stride;
    for (int64_t k = 0; k < runs.groups; ++k) {
      __m512i weights[NR];
#pragma GCC unroll 2
      for (int r = 0; r < NR; ++r) weights[r] = _mm512_load_si512(w + 64 * r);
      w += 64 * NR;
#pragma GCC unroll 7
      for (int i = 0; i < H; ++i) {
        const uint8_t* p = (i < 3 ? a0 : i < 6 ? a3 : a6) + (i % 3) * stride;
        int32_t four;
        std::memcpy(&four, p, 4);
        const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 2
        for (int r = 0; r < NR; ++r) sums[i][r] = _mm512_dpbusd_epi32(sums[i][r], x, weights[r]);
      }
#pragma GCC unroll 7
      for (int i = 0; i < H; ++i) {
        const uint8_t* p = (i < 3 ? b0 : i < 6 ? b3 : b6) + (i % 3) * stride;
        int32_t four;
        std::memcpy(&four, p, 4);
        const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 2
        for (int r = 0; r < NR; ++r)
          sums[H + i][r] = _mm512_dpbusd_epi32(sums[H + i][r], x, weights[r]);
      }
      a0 += 4, a3 += 4, a6 += 4, b0 += 4, b3 += 4, b6 += 4;
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < NR; ++r) {
    const Lanes lanes = epilogue.lanes(block.channel + 16 * r, block.channels - 16 * r);
#pragma GCC unroll 14
    for (int i = 0; i < 2 * H; ++i) {
      const int64_t at = (i < H ? s0.out : s1.out) + (i < H ? i : i - H) * block.pixel;
      if constexpr (kPlain) epilogue.store_plain<kClamps>(sums[i][r], lanes, at);
      else epilogue.store(sums[i][r], lanes, at);
    }
  }
}

#else  // portable

template <int H, int NR, bool kClamps, bool kPlain>
void tile(const Segment& s0, const Segment& s1, const Runs& runs, const Block& block,
          const SumsEpilogue& epilogue) {
  constexpr int kLanes = 16 * NR;
  for (int i = 0; i < 2 * H; ++i) {
    const Segment& segment = i < H ? s0 : s1;
    const int64_t pixel = i < H ? i : i - H;
    int32_t sums[kLanes];
    std::memcpy(sums, block.init, sizeof(sums));
    const int8_t* w = block.weights;
    for (int64_t t = 0; t < runs.taps; ++t) {
      const uint8_t* in = segment.in + runs.offsets[t] + pixel * runs.stride;
      for (int64_t k = 0; k < runs.groups; ++k, in += 4, w += 4 * kLanes) {
        for (int o = 0; o < kLanes; ++o) {
          int32_t sum = 0;
          for (int b = 0; b < 4; ++b) sum += int32_t(in[b]) * int32_t(w[4 * o + b]);
          sums[o] = int32_t(uint32_t(sums[o]) + uint32_t(sum));
        }
      }
    }
    const int64_t at = segment.out + pixel * block.pixel;
    epilogue.apply(sums, block.channel, block.channels, at);
  }
}

#endif

using Tile = void (*)(const Segment&, const Segment&, const Runs&, const Block&,
                      const SumsEpilogue&);

template <int NR, bool kClamps, bool kPlain>
Tile tile_of_height(int64_t height) {
  switch (height) {
    case 1: return tile<1, NR, kClamps, kPlain>;
    case 2: return tile<2, NR, kClamps, kPlain>;
    case 3: return tile<3, NR, kClamps, kPlain>;
    case 4: return tile<4, NR, kClamps, kPlain>;
    case 5: return tile<5, NR, kClamps, kPlain>;
    case 6: return tile<6, NR, kClamps, kPlain>;
    default: return tile<7, NR, kClamps, kPlain>;
  }
}

inline Tile find_tile(int64_t height, bool wide, const SumsEpilogue& epilogue) {
  if (!epilogue.plain) {
    return wide ? tile_of_height<2, true, false>(height) : tile_of_height<1, true, false>(height);
  }
  if (epilogue.clamps) {
    return wide ? tile_of_height<2, true, true>(height) : tile_of_height<1, true, true>(height);
  }
  return wide ? tile_of_height<2, false, true>(height) : tile_of_height<1, false, true>(height);
}

}  // namespace jaxquant
