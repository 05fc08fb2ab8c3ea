// The tile of `gemm.h` in registers, for any instruction set that has products of small integers.
//
// `P` is a struct of static members that knows the instruction:
//
//   Vector       sums, for kChannels channels of one pixel
//   kVectors     how many of them share what is read of a pixel
//   kGroupBytes  what four values of a pixel take as they are read
//   Values, values    these, repeated for every channel
//   Packed, packed    the weights of four values of kChannels channels, as they are packed
//   start        sums of kChannels channels that start from these int32
//   add          a vector of sums, and their products
//   Sums         the epilogue, of vectors of `Sums::kCount` sums
//   result       vector number `r` of a pixel's sums as the epilogue takes them
#pragma once

#include <cstring>

#include "gemm.h"

namespace jaxquant {

// Stores the sums of a tile, [2 * height][vectors], by an epilogue of any form.
template <class P>
__attribute__((noinline)) void store_any(const typename P::Vector* sums, int height, int vectors,
                                         const Segment& s0, const Segment& s1, const Block& block,
                                         int64_t first, const typename P::Sums& epilogue) {
  constexpr int kCount = P::Sums::kCount;
  for (int r = 0; r < vectors * P::kChannels / kCount; ++r) {
    const int64_t from = first + r * kCount;
    const auto channels = epilogue.channels(block.channel + from, block.channels - from);
    for (int i = 0; i < 2 * height; ++i) {
      const int64_t at = i < height ? s0.out + i * block.pixel : s1.out + (i - height) * block.pixel;
      epilogue.store(P::result(sums + i * vectors, r), channels, at);
    }
  }
}

// Stores the sums of a tile as int8: the channels of a block from `first` on, a pixel of each
// segment at a time; `at0` and `at1` are where the first ones go.
template <class P, int H, int V, bool kAdds>
__attribute__((always_inline)) inline void store_quantized(
    const typename P::Vector (&sums)[2 * H][V], int64_t at0, int64_t at1, const Block& block,
    int64_t first, const typename P::Sums& epilogue) {
  using Lanes = typename P::Sums::Lanes;
  using Ints = typename Lanes::Ints;
  constexpr int kCount = Lanes::kCount, R = V * P::kChannels / kCount;
  const Quantized<Lanes>& quantized = epilogue.quantized;
  decltype(epilogue.channels(0, 0)) channels[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
    channels[r] = epilogue.channels(block.channel + first + r * kCount, kCount);
  const auto steps = [&](const typename P::Vector (&of_pixel)[V], int64_t at, Ints (&to)[R]) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
      to[r] = quantized.template steps<kAdds>((Ints)P::result(of_pixel, r), channels[r],
                                              at + r * kCount);
  };
#pragma GCC unroll 7
  for (int i = 0; i < H; ++i, at0 += block.pixel, at1 += block.pixel) {
    Ints a[R], b[R];
    steps(sums[i], at0, a);
    steps(sums[H + i], at1, b);
    quantized.store_two(a, at0, b, at1);
  }
}

// All channels of a block, as many at a time as `P` keeps the sums of; the weights of one group of
// four values are 16 * NR channels apart from the next.
template <class P, int H, int NR, Form kForm>
void register_tile(const Segment& s0, const Segment& s1, const Runs& runs, const Block& block,
                   const typename P::Sums& epilogue) {
  constexpr int V = std::min(P::kVectors, 16 * NR / P::kChannels);
  constexpr int kTogether = V * P::kChannels;
  const ptrdiff_t stride = runs.stride;
  for (int first = 0; first < std::min<int64_t>(16 * NR, block.channels); first += kTogether) {
    typename P::Vector sums[2 * H][V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const auto start = P::start(block.init + first + v * P::kChannels);
#pragma GCC unroll 14
      for (int i = 0; i < 2 * H; ++i) sums[i][v] = start;
    }
    const int8_t* w = block.weights + 4 * first;
    for (int64_t t = 0; t < runs.taps; ++t) {
      // A pointer for every three pixels of a segment, so that each is one addressing mode away.
      const uint8_t* a0 = s0.in + runs.offsets[t];
      const uint8_t* b0 = s1.in + runs.offsets[t];
      const uint8_t *a3 = a0 + 3 * stride, *a6 = a0 + 6 * stride;
      const uint8_t *b3 = b0 + 3 * stride, *b6 = b0 + 6 * stride;
      for (int64_t k = 0; k < runs.groups; ++k) {
        typename P::Packed weights[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) weights[v] = P::packed(w + 4 * P::kChannels * v);
        w += 64 * NR;
#pragma GCC unroll 7
        for (int i = 0; i < H; ++i) {
          const auto x = P::values((i < 3 ? a0 : i < 6 ? a3 : a6) + (i % 3) * stride);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sums[i][v] = P::add(sums[i][v], x, weights[v]);
        }
#pragma GCC unroll 7
        for (int i = 0; i < H; ++i) {
          const auto x = P::values((i < 3 ? b0 : i < 6 ? b3 : b6) + (i % 3) * stride);
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sums[H + i][v] = P::add(sums[H + i][v], x, weights[v]);
        }
        a0 += P::kGroupBytes, a3 += P::kGroupBytes, a6 += P::kGroupBytes;
        b0 += P::kGroupBytes, b3 += P::kGroupBytes, b6 += P::kGroupBytes;
      }
    }
    if constexpr (kForm != Form::any) {
      if (block.channels - first >= kTogether) {
        store_quantized<P, H, V, kForm == Form::bytes_added>(
            sums, s0.out + block.channel + first, s1.out + block.channel + first, block, first,
            epilogue);
        continue;
      }
    }
    typename P::Vector kept[2 * H][V];  // in memory, where those above are in registers
    std::memcpy(kept, sums, sizeof(sums));
    store_any<P>(kept[0], H, V, s0, s1, block, first, epilogue);
  }
}

// The tiles of `P` by their height and what they need of the epilogue.
template <class P, int NR, Form kForm>
struct RegisterTiles {
  static constexpr int kHighest = P::kPixels;
  template <int H>
  static constexpr auto at() { return register_tile<P, H, NR, kForm>; }
};

template <class P, Form kForm>
auto find_register_tile(int64_t height, bool wide) {
  return wide ? tile_of_height<RegisterTiles<P, 2, kForm>>(height)
              : tile_of_height<RegisterTiles<P, 1, kForm>>(height);
}
template <class P>
auto find_register_tile(int64_t height, bool wide, Form form) {
  switch (form) {
    case Form::bytes: return find_register_tile<P, Form::bytes>(height, wide);
    case Form::bytes_added: return find_register_tile<P, Form::bytes_added>(height, wide);
    default: return find_register_tile<P, Form::any>(height, wide);
  }
}

// What instruction sets of such tiles have in common.
template <class P, class D>
struct RegisterSet {
  static constexpr int64_t kPixels = P::kPixels;
  static constexpr int64_t kStep = 4;     // values of a run that are read at a time
  static constexpr bool kRunsOn = false;  // segments end where rows do
  using Sums = typename P::Sums;
  using Depthwise = D;

  static void run(const Share& share, const Weights& weights, const Sums& sums) {
    run_tiles<RegisterSet>(share, weights, sums);
  }
  static auto find_tile(int64_t height, bool wide, const Sums& sums) {
    return find_register_tile<P>(height, wide, sums.form);
  }
};

}  // namespace jaxquant
