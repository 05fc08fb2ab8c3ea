// Packing of weights into the layouts of `shape.h`.
#pragma once

#include <cstring>

#include "parallel.h"
#include "shape.h"

namespace jaxquant {

// `runs` are [count][length][groups * out]; each is filled up with zeros to a multiple of four.
inline void pack_matrix(Threads& threads, const int8_t* weights, int64_t count, int64_t length,
                        const PackedMatrix& layout, int8_t* packed) {
  const int64_t outputs = layout.groups * layout.out, fours = ceil_div(length, 4);
  int32_t* sums = reinterpret_cast<int32_t*>(packed);
  std::memset(packed, 0, layout.header());
  parallel_for(threads, layout.groups * layout.blocks(), [&](int64_t task) {
    const int64_t g = task / layout.blocks(), b = task % layout.blocks();
    const int64_t start = b * kBlock;
    const int64_t width = std::min<int64_t>(kBlock, layout.padded_out() - start);
    const int64_t real = std::min(width, layout.out - start);
    int8_t* to = packed + (layout.block(packed, g, b) - packed);
    int32_t total[kBlock] = {};
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t k = 0; k < fours; ++k, to += 4 * width) {
        int8_t rows[4][kBlock] = {};
        for (int64_t t = 0; t < std::min<int64_t>(4, length - 4 * k); ++t) {
          const int64_t row = r * length + 4 * k + t;
          std::memcpy(rows[t], weights + row * outputs + g * layout.out + start, real);
        }
        for (int64_t o = 0; o < width; ++o) {
          for (int t = 0; t < 4; ++t) to[4 * o + t] = rows[t][o];
        }
        for (int64_t o = 0; o < kBlock; ++o)
          total[o] += rows[0][o] + rows[1][o] + rows[2][o] + rows[3][o];
      }
    }
    std::memcpy(sums + g * layout.padded_out() + start, total, width * sizeof(int32_t));
  });
}

// `taps` are [taps][channels].
inline void pack_depthwise(const int8_t* taps, const PackedDepthwise& layout, int8_t* packed) {
  const int64_t channels = layout.channels;
  const bool repeats = channels < 64 && 64 % channels == 0;
  std::memset(packed, 0, layout.size());
  int32_t* sums = reinterpret_cast<int32_t*>(packed);
  for (int64_t i = 0; i < layout.padded(); ++i) {
    const int64_t c = repeats ? i % channels : i;
    if (c >= channels) continue;
    const int64_t lane = i % 64 / 16, vector = i % 16 / 4, place = i % 4;
    int8_t* to = packed + layout.header() + i / 64 * 64 * layout.quads() * 4;
    for (int64_t t = 0; t < layout.taps; ++t) {
      const int8_t w = taps[t * channels + c];
      to[(((t / 4 * 4 + vector) * 4 + lane) * 4 + place) * 4 + t % 4] = w;
      sums[i] += w;
    }
  }
}

}  // namespace jaxquant
