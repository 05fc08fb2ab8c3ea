// The instruction set of a processor with AVX-512 and its products of bytes (VNNI).
#pragma once

#include "avx512_epilogue.h"

#ifdef JAXQUANT_AVX512
#include <cstring>

#include "depthwise_row.h"
#include "gemm.h"
#include "window.h"

namespace jaxquant {

// sum += the products of four unsigned bytes with four signed ones, in each lane.  Of the intrinsic
// GCC 12 makes copies of the sums, so that those of a tile do not fit into registers any more.
__attribute__((always_inline)) inline void add_products(__m512i& sum, __m512i x, __m512i weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(weights));
}

template <int H, int NR, bool kClamps, bool kPlain>
void avx512_tile(const Segment& s0, const Segment& s1, const Runs& runs,
                 const Block& block, const Avx512Sums& epilogue) {
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
        for (int r = 0; r < NR; ++r) add_products(sums[i][r], x, weights[r]);
      }
#pragma GCC unroll 7
      for (int i = 0; i < H; ++i) {
        const uint8_t* p = (i < 3 ? b0 : i < 6 ? b3 : b6) + (i % 3) * stride;
        int32_t four;
        std::memcpy(&four, p, 4);
        const __m512i x = _mm512_set1_epi32(four);
#pragma GCC unroll 2
        for (int r = 0; r < NR; ++r) add_products(sums[H + i][r], x, weights[r]);
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

template <int kQuads>
inline void accumulate(const uint8_t* in, const DepthwiseRow& row, __m512i (&sums)[4]) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) sums[j] = _mm512_loadu_si512(row.init + 16 * j);
  const ptrdiff_t* at = row.offsets;
  const int8_t* w = row.weights;
  const int64_t quads = kQuads ? kQuads : row.quads;
#pragma GCC unroll 7
  for (int64_t q = 0; q < quads; ++q, at += 4, w += 256) {
    const __m512i x0 = _mm512_loadu_si512(in + at[0]), x1 = _mm512_loadu_si512(in + at[1]);
    const __m512i x2 = _mm512_loadu_si512(in + at[2]), x3 = _mm512_loadu_si512(in + at[3]);
    const __m512i low01 = _mm512_unpacklo_epi8(x0, x1), high01 = _mm512_unpackhi_epi8(x0, x1);
    const __m512i low23 = _mm512_unpacklo_epi8(x2, x3), high23 = _mm512_unpackhi_epi8(x2, x3);
    add_products(sums[0], _mm512_unpacklo_epi16(low01, low23), _mm512_load_si512(w));
    add_products(sums[1], _mm512_unpackhi_epi16(low01, low23), _mm512_load_si512(w + 64));
    add_products(sums[2], _mm512_unpacklo_epi16(high01, high23), _mm512_load_si512(w + 128));
    add_products(sums[3], _mm512_unpackhi_epi16(high01, high23), _mm512_load_si512(w + 192));
  }
}

template <int kQuads, bool kClamps>
void plain_row(const DepthwiseRow& row, const Avx512Sums& epilogue) {
  const Epilogue& given = epilogue.given();
  __m512 multiplier[4], bias[4];
  for (int j = 0; j < 4; ++j) {
    multiplier[j] = _mm512_loadu_ps(row.multiplier + 16 * j);
    bias[j] = _mm512_loadu_ps(row.bias + 16 * j);
  }
  const __m512i zero_point = _mm512_set1_epi32(given.zero_point);
  const __m512i flip = _mm512_set1_epi8(char(given.out_flip));
  for (int64_t i = 0; i < row.steps; ++i) {
    __m512i sums[4];
    accumulate<kQuads>(row.in + i * row.in_step, row, sums);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      sums[j] = epilogue.to_grid<kClamps>(sums[j], multiplier[j], bias[j], zero_point);
    const __m512i low = _mm512_packs_epi32(sums[0], sums[1]);
    const __m512i high = _mm512_packs_epi32(sums[2], sums[3]);
    const int64_t lanes = i + 1 < row.steps ? row.lanes : row.last_lanes;
    const __mmask64 mask = lanes >= 64 ? ~__mmask64(0) : (__mmask64(1) << lanes) - 1;
    int8_t* out = given.out_q + row.out + i * row.out_step;
    _mm512_mask_storeu_epi8(out, mask, _mm512_xor_si512(_mm512_packs_epi16(low, high), flip));
  }
}

struct Avx512 {
  static constexpr const char* kName = "AVX512-VNNI";
  static constexpr int64_t kPixels = 7;     // of a segment: two of 14 x 2 sums fill 28 registers
  static constexpr int64_t kStep = 4;       // bytes of a run that are read at a time
  static constexpr bool kRunsOn = false;  // segments end where rows do
  using Sums = Avx512Sums;

  static constexpr auto activations = Activations::as_u8;

  static void run(const Share& share, const Weights& weights, const Sums& sums) {
    run_tiles<Avx512>(share, weights, sums);
  }

  template <int NR, bool kClamps, bool kPlain>
  struct Tiles {
    template <int H>
    static constexpr auto at() { return avx512_tile<H, NR, kClamps, kPlain>; }
  };
  template <bool kClamps, bool kPlain>
  static auto find_tile(int64_t height, bool wide) {
    return wide ? tile_of_height<Tiles<2, kClamps, kPlain>>(height)
                : tile_of_height<Tiles<1, kClamps, kPlain>>(height);
  }
  static auto find_tile(int64_t height, bool wide, const Sums& sums) {
    if (!sums.plain) return find_tile<true, false>(height, wide);
    return sums.clamps ? find_tile<true, true>(height, wide) : find_tile<false, true>(height, wide);
  }

  static void depthwise_row(const DepthwiseRow& row, int64_t channels, const Avx512Sums& epilogue) {
    if (epilogue.plain) {
      if (row.quads == 3)
        return epilogue.clamps ? plain_row<3, true>(row, epilogue) : plain_row<3, false>(row, epilogue);
      if (row.quads == 7)
        return epilogue.clamps ? plain_row<7, true>(row, epilogue) : plain_row<7, false>(row, epilogue);
      return plain_row<0, true>(row, epilogue);
    }
    for (int64_t i = 0; i < row.steps; ++i) {
      __m512i sums[4];
      accumulate<0>(row.in + i * row.in_step, row, sums);
      int32_t values[kLanes];
      for (int j = 0; j < 4; ++j) _mm512_storeu_si512(values + 16 * j, sums[j]);
      const int64_t lanes = i + 1 < row.steps ? row.lanes : row.last_lanes;
      store_general(values, row, lanes, row.out + i * row.out_step, channels, epilogue);
    }
  }
};

}  // namespace jaxquant

#endif
