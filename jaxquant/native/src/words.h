// Products of int16, for processors that have no sums of four products of bytes.
//
// `vpmaddwd` adds the products of two int16 as int32, and is exact for any, while `vpmaddubsw`, of
// bytes, saturates.  So the activations are copied as int16, once, and the weights, packed as
// [channel][4 bytes], become int16 as they are read.  A register of products then holds two sums of
// two products for every channel, and these meet at the end:
//
//   x  x0 x1  x2 x3  x0 x1  x2 x3  ...
//   w  a0 a1  a2 a3  b0 b1  b2 b3  ...
//   +  a      a      b      b
#pragma once

#include "avx2_lanes.h"

#ifdef JAXQUANT_AVX2
#include <vector>

#include "depthwise_registers.h"
#include "tile.h"
#include "window.h"

namespace jaxquant {

// A pair of taps for each register of products, as int16: [pairs][64 sums in order of `D`][2].
template <class D>
class WordTaps {
 public:
  WordTaps(const PackedDepthwise& layout, const int8_t* packed)
      : block_(2 * layout.quads() * kPair), words_(layout.padded() / kLanes * block_) {
    for (int64_t b = 0; b < layout.padded() / kLanes; ++b) {
      const int8_t* from = layout.block(packed, b);
      int16_t* to = words_.data() + b * block_;
      for (int64_t q = 0; q < layout.quads(); ++q, to += 2 * kPair) {
        for (int vector = 0; vector < 4; ++vector) {
          for (int part = 0; part < 4; ++part, from += 16) {
            // Four channels of four taps: the first two taps of all, then the others.
            const __m256i four = _mm256_cvtepi8_epi16(
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
            const __m256i apart =
                _mm256_permute4x64_epi64(_mm256_shuffle_epi32(four, 0xd8), 0xd8);
            int16_t* at = to + 2 * D::sum_of(16 * part + 4 * vector);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm256_castsi256_si128(apart));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(at + kPair),
                             _mm256_extracti128_si256(apart, 1));
          }
        }
      }
    }
  }
  const int8_t* block(int64_t index) const {
    return reinterpret_cast<const int8_t*>(words_.data() + index * block_);
  }

 private:
  static constexpr int64_t kPair = 2 * kLanes;
  int64_t block_;  // int16 of 64 channels
  std::vector<int16_t> words_;
};

// Two taps are interleaved in every 16 bytes of a register by themselves, of eight channels: the
// first four are one sum's, the others the next one's.
template <class R>
struct WordDepthwise : R {
  static constexpr int kChannels = R::kBytes;
  static constexpr auto activations = Activations::as_s16;
  using Vector = typename R::Vector;
  using Taps = WordTaps<WordDepthwise>;

  static constexpr int64_t channel_of(int64_t i) {
    constexpr int64_t kParts = R::kBytes / 16;  // of 16 bytes
    const int64_t within = i % R::kBytes, part = within / 4 % kParts;
    const int64_t vector = within / 4 / kParts;
    return i / R::kBytes * R::kBytes + vector / 2 * 8 * kParts + 8 * part + vector % 2 * 4 + i % 4;
  }
  // Which of 64 sums that of a channel is.
  static constexpr int64_t sum_of(int64_t channel) {
    constexpr int64_t kParts = R::kBytes / 16;
    const int64_t within = channel % R::kBytes, half = within / (8 * kParts);
    const int64_t vector = 2 * half + within / 4 % 2, part = within % (8 * kParts) / 8;
    return channel / R::kBytes * R::kBytes + (vector * kParts + part) * 4 + channel % 4;
  }

  template <int kTaps>
  __attribute__((always_inline)) static void accumulate(const uint8_t* in, const DepthwiseRow& row,
                                                        int64_t c, Vector (&sums)[4]) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] = R::load_ints(row.init + c + j * (R::kBytes / 4));
    const ptrdiff_t* at = row.offsets;
    const int8_t* w = row.weights + 4 * c;
    const int64_t pairs = kTaps ? (kTaps + 1) / 2 : ceil_div(row.taps, 2);
    in += 2 * c;
#pragma GCC unroll 5
    for (int64_t t = 0; t < pairs; ++t, at += 2, w += 4 * kLanes) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const Vector x0 = R::load_bytes(in + at[0] + half * R::kBytes);
        const Vector x1 = R::load_bytes(in + at[1] + half * R::kBytes);
        const int8_t* of_half = w + 2 * half * R::kBytes;
        sums[2 * half] =
            R::add_words(sums[2 * half], R::low_pairs(x0, x1), R::load_bytes(of_half));
        sums[2 * half + 1] = R::add_words(sums[2 * half + 1], R::high_pairs(x0, x1),
                                          R::load_bytes(of_half + R::kBytes));
      }
    }
  }

  // The halves of `channel_of` are each in their own order as words.
  static Vector in_order(Vector bytes) { return R::words_in_order(bytes); }

  static void row(const DepthwiseRow& row, int64_t channels, const typename R::Sums& sums) {
    depthwise_row_in_registers<WordDepthwise>(row, channels, sums);
  }
};

}  // namespace jaxquant

#endif
