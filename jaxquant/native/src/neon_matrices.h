// The instruction set of ARM with products of matrices of bytes (i8mm).
//
// `smmla` multiplies two rows of eight bytes with two columns of eight, and adds to 2 x 2 sums: here
// the rows are pixels, one of each segment, and the columns channels.
#pragma once

#include "neon.h"

#if defined(JAXQUANT_NEON) && defined(__ARM_FEATURE_MATMUL_INT8)
#define JAXQUANT_NEON_MATRICES 1

namespace jaxquant {

// The weights of eight channels for eight values of a pixel, made of two groups as they are packed:
// the two channels of each column of sums.  Of an odd group the second half is zero.
struct EightByEight {
  int8x16_t columns[4];

  EightByEight(const int8_t* first, const int8_t* second) {
    for (int half = 0; half < 2; ++half) {
      const int32x4_t low = vreinterpretq_s32_s8(vld1q_s8(first + 16 * half));
      const int32x4_t high =
          second ? vreinterpretq_s32_s8(vld1q_s8(second + 16 * half)) : vdupq_n_s32(0);
      columns[2 * half] = vreinterpretq_s8_s32(vzip1q_s32(low, high));
      columns[2 * half + 1] = vreinterpretq_s8_s32(vzip2q_s32(low, high));
    }
  }
};

// The bytes of two pixels; only `n` of them, 4 or 8, are theirs to read.
template <int n>
inline int8x16_t two_pixels(const uint8_t* a, const uint8_t* b) {
  uint64_t first = 0, second = 0;
  std::memcpy(&first, a, n), std::memcpy(&second, b, n);
  return vcombine_s8(vcreate_s8(first), vcreate_s8(second));
}

template <int H, int NR, Form kForm>
void matrices_tile(const Segment& s0, const Segment& s1, const Runs& runs, const Block& block,
                   const NeonSums& epilogue) {
  const ptrdiff_t stride = runs.stride;
  for (int first = 0; first < std::min<int64_t>(16 * NR, block.channels); first += 8) {
    int32x4_t sums[H][4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int32x2_t start = vld1_s32(block.init + first + 2 * j);
#pragma GCC unroll 4
      for (int i = 0; i < H; ++i) sums[i][j] = vcombine_s32(start, start);
    }
    const auto add = [&](const EightByEight& weights, int i, int8x16_t x) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sums[i][j] = vmmlaq_s32(sums[i][j], x, weights.columns[j]);
    };
    const int8_t* w = block.weights + 4 * first;
    for (int64_t t = 0; t < runs.taps; ++t) {
      const uint8_t *a = s0.in + runs.offsets[t], *b = s1.in + runs.offsets[t];
      for (int64_t k = 0; k + 2 <= runs.groups; k += 2, a += 8, b += 8, w += 128 * NR) {
        const EightByEight weights(w, w + 64 * NR);
#pragma GCC unroll 4
        for (int i = 0; i < H; ++i) add(weights, i, two_pixels<8>(a + i * stride, b + i * stride));
      }
      if (runs.groups % 2) {
        const EightByEight weights(w, nullptr);
        w += 64 * NR;
#pragma GCC unroll 4
        for (int i = 0; i < H; ++i) add(weights, i, two_pixels<4>(a + i * stride, b + i * stride));
      }
    }
    // The channels of four sums of a pixel: of the first segment, or of the second.
    const auto of_pixel = [&](int i, int r, bool second) {
      const int32x4_t left = sums[i][2 * r], right = sums[i][2 * r + 1];
      return (NeonLanes::Ints)(
          second ? vcombine_s32(vget_high_s32(left), vget_high_s32(right))
                 : vcombine_s32(vget_low_s32(left), vget_low_s32(right)));
    };
    NeonSums::Channels channels[2];
    for (int r = 0; r < 2; ++r)
      channels[r] = epilogue.channels(block.channel + first + 4 * r,
                                      block.channels - first - 4 * r);
    const bool whole = block.channels - first >= 8;
#pragma GCC unroll 4
    for (int i = 0; i < H; ++i) {
      const int64_t at[2] = {s0.out + i * block.pixel, s1.out + i * block.pixel};
      if (kForm == Form::any || !whole) {
        for (int r = 0; r < 2; ++r) {
          for (int second = 0; second < 2; ++second)
            epilogue.store(of_pixel(i, r, second), channels[r], at[second]);
        }
        continue;
      }
      NeonLanes::Ints steps[2][2];
      for (int r = 0; r < 2; ++r) {
        for (int second = 0; second < 2; ++second)
          steps[second][r] = epilogue.quantized.template steps<kForm == Form::bytes_added>(
              of_pixel(i, r, second), channels[r], at[second] + channels[r].channel);
      }
      const int64_t c = channels[0].channel;
      epilogue.quantized.store_two(steps[0], at[0] + c, steps[1], at[1] + c);
    }
  }
}

struct NeonMatrices : Neon {
  static constexpr const char* kName = "NEON-I8MM";
  static constexpr double kProductsPerNs = 200;
  static constexpr int64_t kPixels = 4;  // of a segment: GCC 12 keeps no more than 4 x 4 sums

  static void run(const Share& share, const Weights& weights, const Sums& sums) {
    run_tiles<NeonMatrices>(share, weights, sums);
  }

  template <int NR, Form kForm>
  struct Tiles {
    static constexpr int kHighest = kPixels;
    template <int H>
    static constexpr auto at() { return matrices_tile<H, NR, kForm>; }
  };
  template <Form kForm>
  static auto find_tile(int64_t height, bool wide) {
    return wide ? tile_of_height<Tiles<2, kForm>>(height)
                : tile_of_height<Tiles<1, kForm>>(height);
  }
  static auto find_tile(int64_t height, bool wide, const Sums& sums) {
    switch (sums.form) {
      case Form::bytes: return find_tile<Form::bytes>(height, wide);
      case Form::bytes_added: return find_tile<Form::bytes_added>(height, wide);
      default: return find_tile<Form::any>(height, wide);
    }
  }
};

}  // namespace jaxquant

#endif
