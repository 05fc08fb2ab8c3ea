// Depthwise convolution: each channel by itself, 64 channels at a time.
//
// Four taps of a window are interleaved so that one instruction multiplies and adds them.  The
// interleaving leaves the channels of a 64-byte vector in the order of `channel_of`; packing the
// sums to bytes restores it.
#pragma once

#include <vector>

#include "parallel.h"
#include "window.h"

namespace jaxquant {

constexpr int kLanes = 64;

// Where in the 64 channels the sum number `i` of a step is.
inline int64_t channel_of(int64_t i) { return (i % 16) / 4 * 16 + i / 16 * 4 + i % 4; }

// One output row of one block of 64 channels.
struct DepthwiseRow {
  const uint8_t* in;
  int64_t out;                 // of its first element
  int64_t steps;               // vectors of outputs
  ptrdiff_t in_step, out_step;
  int64_t lanes, last_lanes;   // outputs of a step, of the last step
  const ptrdiff_t* offsets;    // [4 * quads]
  int64_t quads;
  const int8_t* weights;
  const int32_t* init;         // [64], as ordered by `channel_of`, and these two
  const float* multiplier;
  const float* bias;
  int64_t channel;
};

inline void store_general(const int32_t (&sums)[kLanes], const DepthwiseRow& row, int64_t lanes,
                          int64_t out, int64_t channels, const SumsEpilogue& epilogue) {
  int32_t ordered[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) ordered[channel_of(i)] = sums[i];
  for (int64_t i = 0; i < lanes; i += channels) {  // a step of few channels is several pixels
    const int64_t n = std::min(channels, lanes - i);
    epilogue.apply(ordered + i, row.channel, n, out + i - row.channel);
  }
}

#ifdef JAXQUANT_AVX512

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
    sums[0] = _mm512_dpbusd_epi32(sums[0], _mm512_unpacklo_epi16(low01, low23),
                                  _mm512_load_si512(w));
    sums[1] = _mm512_dpbusd_epi32(sums[1], _mm512_unpackhi_epi16(low01, low23),
                                  _mm512_load_si512(w + 64));
    sums[2] = _mm512_dpbusd_epi32(sums[2], _mm512_unpacklo_epi16(high01, high23),
                                  _mm512_load_si512(w + 128));
    sums[3] = _mm512_dpbusd_epi32(sums[3], _mm512_unpackhi_epi16(high01, high23),
                                  _mm512_load_si512(w + 192));
  }
}

template <int kQuads, bool kClamps>
void plain_row(const DepthwiseRow& row, const SumsEpilogue& epilogue) {
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

inline void depthwise_row(const DepthwiseRow& row, int64_t channels, const SumsEpilogue& epilogue) {
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

#else  // portable

inline void depthwise_row(const DepthwiseRow& row, int64_t channels, const SumsEpilogue& epilogue) {
  for (int64_t i = 0; i < row.steps; ++i) {
    int32_t sums[kLanes];
    std::memcpy(sums, row.init, sizeof(sums));
    const uint8_t* in = row.in + i * row.in_step;
    for (int64_t q = 0; q < row.quads; ++q) {
      for (int64_t k = 0; k < kLanes; ++k) {
        for (int64_t t = 0; t < 4; ++t) {
          const int32_t w = row.weights[(q * kLanes + k) * 4 + t];
          sums[k] += int32_t(in[row.offsets[4 * q + t] + channel_of(k)]) * w;
        }
      }
    }
    const int64_t lanes = i + 1 < row.steps ? row.lanes : row.last_lanes;
    store_general(sums, row, lanes, row.out + i * row.out_step, channels, epilogue);
  }
}

#endif

inline void depthwise(Threads& threads, const Activations& x, const ConvShape& s,
                      const int8_t* packed, const Epilogue& epilogue) {
  const PackedDepthwise layout{s.c, s.kh * s.kw};
  const int64_t blocks = layout.padded() / kLanes, quads = layout.quads();
  const bool repeats = s.c < kLanes && kLanes % s.c == 0;
  // Neighbouring pixels fill the vectors where the channels alone do not.
  const bool flat = repeats && s.stride_w == 1;

  const int32_t* window_sums = layout.sums(packed);
  std::vector<int32_t> init(layout.padded());
  std::vector<float> multiplier(layout.padded()), bias(layout.padded());
  for (int64_t i = 0; i < layout.padded(); ++i) {
    const int64_t at = i / kLanes * kLanes + channel_of(i % kLanes);
    init[i] = int32_t(0u - uint32_t(x.zero_point) * uint32_t(window_sums[at]));
    const int64_t c = repeats ? at % s.c : at;
    multiplier[i] = c < s.c ? epilogue.multiplier[c] : 0.0f;
    bias[i] = epilogue.bias && c < s.c ? epilogue.bias[c] : 0.0f;
  }

  const int64_t columns = (s.ow - 1) * s.stride_w + (s.kw - 1) * s.dilation_w + 1;
  const int64_t row_bytes = columns * s.c;
  std::vector<ptrdiff_t> offsets;
  for (int64_t t = 0; t < 4 * quads; ++t) {
    const int64_t tap = std::min(t, s.kh * s.kw - 1);  // beyond the window: a weight of zero
    offsets.push_back(tap / s.kw * s.dilation_h * row_bytes + tap % s.kw * s.dilation_w * s.c);
  }

  const int64_t halo = (s.kh - 1) * s.dilation_h;
  const int64_t fitting = (kScratchBytes / row_bytes - halo) / s.stride_h;
  const int64_t most = std::max<int64_t>(fitting, 1);
  const int64_t parts = threads.count() == 1 ? 1 : ceil_div(4 * threads.count(), s.n);
  const int64_t rows = std::max<int64_t>(1, std::min(most, ceil_div(s.oh, parts)));
  const int64_t row_parts = ceil_div(s.oh, rows);
  const SumsEpilogue sums_epilogue(epilogue);

  parallel_for(threads, s.n * row_parts, [&](int64_t task) {
    const int64_t image = task / row_parts;
    const int64_t first = task % row_parts * rows, last = std::min(first + rows, s.oh);
    const int64_t in_rows = (last - 1 - first) * s.stride_h + halo + 1;
    uint8_t* window = Scratch::of_thread().reserve(in_rows * row_bytes);
    copy_window(x, s, image, first, last, 0, s.c, window);
    for (int64_t i = first; i < last; ++i) {
      const uint8_t* in = window + (i - first) * s.stride_h * row_bytes;
      const int64_t out = (image * s.oh + i) * s.ow * s.c;
      for (int64_t b = 0; b < blocks; ++b) {
        DepthwiseRow row;
        row.in = in + b * kLanes;
        row.out = out + b * kLanes;
        row.steps = flat ? ceil_div(s.ow * s.c, kLanes) : s.ow;
        row.in_step = flat ? kLanes : s.stride_w * s.c;
        row.out_step = flat ? kLanes : s.c;
        row.lanes = flat ? kLanes : std::min<int64_t>(kLanes, s.c - b * kLanes);
        row.last_lanes = flat ? s.ow * s.c - (row.steps - 1) * kLanes : row.lanes;
        row.offsets = offsets.data();
        row.quads = quads;
        row.weights = layout.block(packed, b);
        row.init = init.data() + b * kLanes;
        row.multiplier = multiplier.data() + b * kLanes;
        row.bias = bias.data() + b * kLanes;
        row.channel = b * kLanes;
        depthwise_row(row, s.c, sums_epilogue);
      }
    }
    sums_epilogue.flush();
  });
}

}  // namespace jaxquant
