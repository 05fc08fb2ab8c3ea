// A depthwise row in registers, for any instruction set that has products of small integers.
//
// `D` is a struct of static members that knows the instruction; four registers of sums are one of
// bytes:
//
//   Vector, kChannels  sums, and how many channels four registers of them have
//   Sums               the epilogue, on registers of kChannels / 4 sums
//   channel_of         which of 64 channels the sum number `i` is
//   Taps               the weights, made of packed ones, with `block`
//   accumulate         the sums of the channels from `c`, of windows of `kTaps`; 0: of as many as
//                      the row says
//   in_order           bytes of four registers of sums, the channels in their own order
//   store              the first `n` of these
#pragma once

#include <cstring>

#include "depthwise_row.h"
#include "epilogue.h"

namespace jaxquant {

template <class D, int kTaps>
void quantized_row(const DepthwiseRow& row, const typename D::Sums& epilogue) {
  using Lanes = typename D::Sums::Lanes;
  using Ints = typename Lanes::Ints;
  const Quantized<Lanes>& quantized = epilogue.quantized;
  for (int64_t c = 0; c < row.lanes; c += D::kChannels) {
    typename Lanes::Floats multiplier[4], bias[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      multiplier[j] = Lanes::load(row.multiplier + c + j * Lanes::kCount, Lanes::kCount);
      bias[j] = Lanes::load(row.bias + c + j * Lanes::kCount, Lanes::kCount);
    }
    for (int64_t i = 0; i < row.steps; ++i) {
      const int64_t lanes = i + 1 < row.steps ? row.lanes : row.last_lanes;
      if (c >= lanes) break;
      typename D::Vector sums[4];
      D::template accumulate<kTaps>(row.in + i * row.in_step, row, c, sums);
      Ints steps[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        steps[j] = quantized.steps((Ints)sums[j], multiplier[j], bias[j]);
      const Ints bytes = quantized.bytes(quantized.words(steps[0], steps[1]),
                                         quantized.words(steps[2], steps[3]));
      D::store(quantized.out() + row.out + i * row.out_step + c,
               D::in_order((typename D::Vector)bytes), lanes - c);
    }
  }
}

template <class D>
void depthwise_row_in_registers(const DepthwiseRow& row, int64_t channels,
                                const typename D::Sums& epilogue) {
  if (epilogue.form == Form::bytes) {
    if (row.taps == 9) return quantized_row<D, 9>(row, epilogue);
    if (row.taps == 25) return quantized_row<D, 25>(row, epilogue);
    return quantized_row<D, 0>(row, epilogue);
  }
  for (int64_t i = 0; i < row.steps; ++i) {
    int32_t values[kLanes];
    for (int64_t c = 0; c < kLanes; c += D::kChannels) {
      typename D::Vector sums[4];
      D::template accumulate<0>(row.in + i * row.in_step, row, c, sums);
      std::memcpy(values + c, sums, sizeof(sums));
    }
    const int64_t lanes = i + 1 < row.steps ? row.lanes : row.last_lanes;
    store_general<D>(values, row, lanes, row.out + i * row.out_step, channels, epilogue);
  }
}

// Four taps of a window are interleaved so that one instruction multiplies and adds them, in every
// 16 bytes of a register by themselves: `R` interleaves its registers of kBytes.  That leaves the
// channels in the order of `channel_of`; making bytes of the sums restores it.
template <class R, class Products>
struct InterleavedDepthwise : R {
  static constexpr int kChannels = R::kBytes;
  using Vector = typename R::Vector;
  using Taps = PackedTaps;
  static Vector in_order(Vector bytes) { return bytes; }

  static constexpr int64_t channel_of(int64_t i) {
    constexpr int64_t kParts = R::kBytes / 16;  // of 16 bytes
    const int64_t within = i % R::kBytes, part = within / 4 % kParts;
    const int64_t vector = within / 4 / kParts;
    return i / R::kBytes * R::kBytes + 16 * part + 4 * vector + i % 4;
  }

  template <int kTaps>
  __attribute__((always_inline)) static void accumulate(const uint8_t* in, const DepthwiseRow& row,
                                                        int64_t c, Vector (&sums)[4]) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] = R::load_ints(row.init + c + j * (R::kBytes / 4));
    const ptrdiff_t* at = row.offsets;
    const int8_t* w = row.weights + c;
    const int64_t quads = kTaps ? (kTaps + 3) / 4 : ceil_div(row.taps, 4);
    in += c;
#pragma GCC unroll 7
    for (int64_t q = 0; q < quads; ++q, at += 4, w += 256) {
      const Vector x0 = R::load_bytes(in + at[0]), x1 = R::load_bytes(in + at[1]);
      const Vector x2 = R::load_bytes(in + at[2]), x3 = R::load_bytes(in + at[3]);
      const Vector low01 = R::low_bytes(x0, x1), high01 = R::high_bytes(x0, x1);
      const Vector low23 = R::low_bytes(x2, x3), high23 = R::high_bytes(x2, x3);
      sums[0] = Products::add(sums[0], R::low_pairs(low01, low23), R::load_bytes(w));
      sums[1] = Products::add(sums[1], R::high_pairs(low01, low23), R::load_bytes(w + 64));
      sums[2] = Products::add(sums[2], R::low_pairs(high01, high23), R::load_bytes(w + 128));
      sums[3] = Products::add(sums[3], R::high_pairs(high01, high23), R::load_bytes(w + 192));
    }
  }
};

}  // namespace jaxquant
