// The matrix kernel on AMX: the tiles of `gemm.h`, with up to 16 pixels in a segment.
//
// The packed weights are what a tile of B holds, sixteen groups of four bytes at a time; the last,
// partial sixteen of a run is copied beside and filled up with zeros, and the activations that it
// multiplies may be anything.
#pragma once

#include "avx512.h"

#if defined(JAXQUANT_AVX512_VNNI) && defined(__AMX_INT8__) && defined(__AMX_TILE__) && defined(__linux__)
#define JAXQUANT_AMX 1
#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

namespace jaxquant {

constexpr int kAmxSegment = 16;
constexpr int kAmxBlocks = 4;             // whose outputs are written together: 128 channels
constexpr int64_t kAmxWeights = 1 << 15;  // bytes of weights that stay in the L1 cache
constexpr int kAmxGroups = 16;  // of four bytes: 64 of a run at a time

// The tile instructions do not tell GCC which memory they read: what is stored before has to be
// there.
inline void memory_is_read(const void* at) { __asm__ volatile("" : : "r"(at) : "memory"); }

// The tile registers of this thread, set up for segments of `height` pixels: 0-3 sums, 4-5
// activations, 6-7 weights.
class AmxTiles {
 public:
  explicit AmxTiles(int64_t height) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.bytes[i] = 64;
      config.rows[i] = i < 6 ? uint8_t(height) : 16;
    }
    memory_is_read(&config);
    _tile_loadconfig(&config);
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;
};

// The partial last sixteen of every run of a block, [taps][16][64 * NR] bytes; empty without one.
inline void copy_tails(const Runs& runs, const int8_t* weights, int64_t row,
                       std::vector<int8_t>& tails) {
  const int64_t whole = runs.groups / kAmxGroups * kAmxGroups, rest = runs.groups - whole;
  tails.assign(rest ? runs.taps * kAmxGroups * row : 0, 0);
  for (int64_t t = 0; rest && t < runs.taps; ++t) {
    std::memcpy(tails.data() + t * kAmxGroups * row,
                weights + (t * runs.groups + whole) * row, rest * row);
  }
}

template <bool kSigned, int NR>
inline void multiply(const uint8_t* a, const uint8_t* b, ptrdiff_t stride, const int8_t* w) {
  _tile_loadd(6, w, 64 * NR);
  _tile_loadd(4, a, stride);
  if constexpr (kSigned) _tile_dpbssd(0, 4, 6);
  else _tile_dpbusd(0, 4, 6);
  _tile_loadd(5, b, stride);
  if constexpr (kSigned) _tile_dpbssd(2, 5, 6);
  else _tile_dpbusd(2, 5, 6);
  if constexpr (NR == 2) {
    _tile_loadd(7, w + 64, 64 * NR);
    if constexpr (kSigned) {
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(3, 5, 7);
    } else {
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(3, 5, 7);
    }
  }
}

// The sums of two segments of `height` pixels for one block, at every `row` sums from `to`.
template <bool kSigned, int NR>
void amx_tile(const Segment& s0, const Segment& s1, int64_t height, const Runs& runs,
              const Block& block, const int8_t* tails, int32_t* to, int64_t row) {
  memory_is_read(tails);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t whole = runs.groups / kAmxGroups, bytes = 64 * NR;
  const bool tail = runs.groups % kAmxGroups;
  const int8_t* w = block.weights;
  for (int64_t t = 0; t < runs.taps; ++t, w += runs.groups % kAmxGroups * bytes) {
    const uint8_t *a = s0.in + runs.offsets[t], *b = s1.in + runs.offsets[t];
    for (int64_t k = 0; k < whole; ++k, a += 64, b += 64, w += kAmxGroups * bytes)
      multiply<kSigned, NR>(a, b, runs.stride, w);
    if (tail) multiply<kSigned, NR>(a, b, runs.stride, tails + t * kAmxGroups * bytes);
  }
  _tile_stored(0, to, 4 * row);
  if constexpr (NR == 2) _tile_stored(1, to + 16, 4 * row);
  _tile_stored(2, to + height * row, 4 * row);
  if constexpr (NR == 2) _tile_stored(3, to + height * row + 16, 4 * row);
}

// The epilogue of one segment: [height][row] sums, of which `vectors` times 16 are there.
template <Form kForm>
void finish(const int32_t* sums, int64_t row, int64_t height, const Segment& segment,
            int64_t pixel, const Runs& runs, const int32_t* init, const Channels16* of,
            int64_t vectors, const Avx512Sums& given) {
  const Avx512Sums epilogue = given;  // its own, so that it stays in registers
  int64_t at = segment.out, column = segment.column;
  for (int64_t i = 0; i < height; ++i, sums += row) {
    const bool kept = column < runs.kept;
    if (++column == runs.row) column = 0;
    if (!kept) continue;
    const auto sum = [&](int64_t v) {
      return _mm512_add_epi32(_mm512_load_si512(sums + 16 * v),
                              _mm512_loadu_si512(init + 16 * v));
    };
    if constexpr (kForm == Form::any) {
      for (int64_t v = 0; v < vectors; ++v) epilogue.store(sum(v), of[v], at);
    } else {
      const auto steps = [&](int64_t v) {
        return epilogue.quantized.steps<kForm == Form::bytes_added>(
            (Avx512Lanes::Ints)sum(v), of[v], at + of[v].channel);
      };
      int64_t v = 0;
      for (; v + 1 < vectors && of[v + 1].count == 16; v += 2) {
        const Avx512Lanes::Ints a[1] = {steps(v)}, b[1] = {steps(v + 1)};
        epilogue.quantized.store_two(a, at + of[v].channel, b, at + of[v + 1].channel);
      }
      for (; v < vectors; ++v) epilogue.store(sum(v), of[v], at);
    }
    at += pixel;
  }
}

// Two segments at a time; an odd one at the end is both.
template <class F>
void for_pairs(const std::vector<Segment>& segments, F f) {
  for (size_t i = 0; i < segments.size(); i += 2)
    f(segments[i], segments[std::min(i + 1, segments.size() - 1)]);
}

inline void prefetch_inputs(const Segment* segments, int64_t count, int64_t height,
                            const Runs& runs) {
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t byte = 0; byte < 4 * runs.groups; byte += 64)
        _mm_prefetch(segments[k].in + i * runs.stride + byte, _MM_HINT_T0);
    }
  }
}

struct Amx : Avx512 {
  static constexpr const char* kName = "AMX";
  static constexpr double kProductsPerNs = 1500;
  static constexpr int64_t kPixels = kAmxSegment, kSegment = kAsFewAsPossible;
  static constexpr int64_t kStep = 4 * kAmxGroups;
  static constexpr bool kRunsOn = true;

  static constexpr auto activations = Activations::as_stored;

  // Linux grants a process the tile registers when asked.
  static bool available() {
    static const bool granted = [] {
      constexpr long kRequestPermission = 0x1023, kTileData = 18;
      return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return granted;
  }

  static auto find_tile(bool wide, bool is_signed) {
    if (wide) return is_signed ? amx_tile<true, 2> : amx_tile<false, 2>;
    return is_signed ? amx_tile<true, 1> : amx_tile<false, 1>;
  }

  static void run(const Share& share, const Weights& weights, const Sums& sums) {
    const Runs& runs = share.runs;
    const int64_t height = share.height, outputs = weights.outputs();
    const AmxTiles tiles(height);
    const auto finish_segment = sums.form == Form::bytes         ? finish<Form::bytes>
                                : sums.form == Form::bytes_added ? finish<Form::bytes_added>
                                                                 : finish<Form::any>;
    // Neighbouring blocks are written together, so that what a pixel writes is contiguous.
    const int64_t per_block = weights.layout().four_bytes * 4 * kBlock;
    const int64_t most = std::min<int64_t>(std::max<int64_t>(kAmxWeights / per_block, 1), kAmxBlocks);
    alignas(64) int32_t products[2 * kAmxSegment * kAmxBlocks * kBlock];
    std::vector<int8_t> tails[kAmxBlocks];
    for (int64_t start = share.first; start < share.last; start += most) {
      const int64_t count = std::min(most, share.last - start), row = count * kBlock;
      Channels16 of[2 * kAmxBlocks];
      Block blocks[kAmxBlocks];
      int64_t vectors = 0;
      for (int64_t i = 0; i < count; ++i) {
        blocks[i] = weights.block(share.group, start + i);
        copy_tails(runs, blocks[i].weights, weights.wide(start + i) ? 128 : 64, tails[i]);
        for (int64_t c = 0; c < blocks[i].channels; c += 16)
          of[vectors++] = sums.channels(blocks[i].channel + c, blocks[i].channels - c);
      }
      const Segment* const end = share.segments.data() + share.segments.size();
      for_pairs(share.segments, [&](const Segment& s0, const Segment& s1) {
        // Rows of a few lines each, which the processor does not see coming.
        if (start == share.first && runs.taps == 1 && end - &s0 > 2)
          prefetch_inputs(&s0 + 2, std::min<int64_t>(2, end - &s0 - 2), height, runs);
        for (const Segment* s : {&s0, &s1})
          sums.prefetch(s->out + blocks[0].channel, height, outputs, 16 * vectors);
        for (int64_t i = 0; i < count; ++i) {
          const auto tile = find_tile(weights.wide(start + i), share.is_signed);
          tile(s0, s1, height, runs, blocks[i], tails[i].data(), products + i * kBlock, row);
        }
        const auto store = [&](const Segment& s, const int32_t* from) {
          finish_segment(from, row, height, s, outputs, runs, blocks[0].init, of, vectors,
                         sums);
        };
        store(s0, products);
        if (&s1 != &s0) store(s1, products + height * row);  // else an odd one, twice
      });
    }
  }
};

}  // namespace jaxquant

#endif
