// The instruction set of a processor of which nothing is known: plain C++.
//
// It is what the others are compared with, and what runs where they cannot.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "depthwise_row.h"
#include "epilogue.h"
#include "gemm.h"
#include "window.h"

namespace jaxquant {

// The epilogue on sums in memory, sixteen at a time so that the compiler makes vectors of them.
class PortableSums {
 public:
  PortableSums(const Epilogue& e, int64_t) : e_(e) {}
  int64_t bytes() const { return e_.bytes(); }
  void flush() const {}

  // `n` sums of one output pixel, for the channels from `c`; `at` is where its channel 0 is in the
  // output.
  void apply(const int32_t* sums, int64_t c, int64_t n, int64_t at) const {
    if (e_.sums) {
      std::copy_n(sums, n, e_.sums + at + c);
      return;
    }
    for (int64_t start = 0; start < n; start += 16) {
      const int64_t m = std::min<int64_t>(16, n - start), channel = c + start;
      float y[16];
      for (int64_t k = 0; k < m; ++k) {
        const float offset = e_.bias ? e_.bias[channel + k] : 0.0f;
        const float value = std::fma(float(sums[start + k]), e_.multiplier[channel + k], offset);
        y[k] = std::min(std::max(value, e_.low), e_.high);
      }
      const int64_t first = at + channel;
      if (e_.residual_q) {
        for (int64_t k = 0; k < m; ++k) {
          const int32_t q = int8_t(e_.residual_q[first + k] ^ e_.residual_flip);
          y[k] = std::fma(float(q - e_.residual_zero_point), e_.residual_scale, y[k]);
        }
      }
      if (e_.residual_f) {
        for (int64_t k = 0; k < m; ++k) y[k] += e_.residual_f[first + k];
      }
      for (int64_t k = 0; k < m; ++k)
        y[k] = std::min(std::max(y[k], e_.low_after), e_.high_after);
      if (e_.out_f) {
        for (int64_t k = 0; k < m; ++k) e_.out_f[first + k] = y[k];
      }
      if (e_.out_q) {
        const float q_low = kLeast - e_.zero_point, q_high = kLargest - e_.zero_point;
        for (int64_t k = 0; k < m; ++k) {
          const float scaled = std::min(std::max(y[k] * e_.inv_scale, q_low), q_high);
          const int32_t q = int32_t(std::nearbyintf(scaled)) + e_.zero_point;
          e_.out_q[first + k] = int8_t(q ^ e_.out_flip);
        }
      }
    }
  }

 private:
  Epilogue e_;
};

template <int H, int NR>
void portable_tile(const Segment& s0, const Segment& s1, const Runs& runs,
                   const Block& block, const PortableSums& epilogue) {
  constexpr int kChannels = 16 * NR;
  for (int i = 0; i < 2 * H; ++i) {
    const Segment& segment = i < H ? s0 : s1;
    const int64_t pixel = i < H ? i : i - H;
    int32_t sums[kChannels];
    std::memcpy(sums, block.init, sizeof(sums));
    const int8_t* w = block.weights;
    for (int64_t t = 0; t < runs.taps; ++t) {
      const uint8_t* in = segment.in + runs.offsets[t] + pixel * runs.stride;
      for (int64_t k = 0; k < runs.groups; ++k, in += 4, w += 4 * kChannels) {
        for (int o = 0; o < kChannels; ++o) {
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

struct PortableDepthwise {
  static constexpr auto activations = Activations::as_u8;
  using Taps = PackedTaps;
  static constexpr int64_t channel_of(int64_t i) { return i % 16 / 4 * 16 + i / 16 * 4 + i % 4; }

  static void row(const DepthwiseRow& row, int64_t channels, const PortableSums& epilogue) {
    for (int64_t i = 0; i < row.steps; ++i) {
      int32_t sums[kLanes];
      std::memcpy(sums, row.init, sizeof(sums));
      const uint8_t* in = row.in + i * row.in_step;
      for (int64_t q = 0; q < ceil_div(row.taps, 4); ++q) {
        for (int64_t k = 0; k < kLanes; ++k) {
          for (int64_t t = 0; t < 4; ++t) {
            const int32_t w = row.weights[(q * kLanes + k) * 4 + t];
            sums[k] += int32_t(in[row.offsets[4 * q + t] + channel_of(k)]) * w;
          }
        }
      }
      const int64_t lanes = i + 1 < row.steps ? row.lanes : row.last_lanes;
      store_general<PortableDepthwise>(sums, row, lanes, row.out + i * row.out_step, channels, epilogue);
    }
  }
};

struct Portable {
  static constexpr const char* kName = "portable";
  static constexpr double kProductsPerNs = 5;
  static constexpr int64_t kPixels = 7;  // of a segment, at most
  static constexpr int64_t kSegment = kAsFewAsPossible;
  static constexpr int64_t kStep = 4;       // bytes of a run that are read at a time
  static constexpr bool kRunsOn = false;  // segments end where rows do
  using Sums = PortableSums;

  static constexpr auto activations = Activations::as_u8;

  static void run(const Share& share, const Weights& weights, const Sums& sums) {
    run_tiles<Portable>(share, weights, sums);
  }

  template <int NR>
  struct Tiles {
    static constexpr int kHighest = kPixels;
    template <int H>
    static constexpr auto at() { return portable_tile<H, NR>; }
  };
  static auto find_tile(int64_t height, bool wide, const Sums&) {
    return wide ? tile_of_height<Tiles<2>>(height) : tile_of_height<Tiles<1>>(height);
  }

  using Depthwise = PortableDepthwise;
};

}  // namespace jaxquant
