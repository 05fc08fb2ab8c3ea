// The geometry of a convolution, and where its packed weights are.
#pragma once

#include <cstdint>

namespace jaxquant {

constexpr int kBlock = 32;  // output channels of a block; the last one of a group may have 16
constexpr int kLanes = 64;  // channels that the depthwise kernels do at a time

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// NHWC input [n, h, w, c], HWIO kernel [kh, kw, c / groups, o], NHWC output [n, oh, ow, o].
struct ConvShape {
  int64_t n, h, w, c, oh, ow, o, kh, kw;
  int64_t stride_h, stride_w, dilation_h, dilation_w;
  int64_t pad_h, pad_w;  // before the first row and column; those behind follow from oh and ow
  int64_t groups;

  int64_t group_in() const { return c / groups; }
  int64_t group_out() const { return o / groups; }
  bool depthwise() const { return groups > 1 && groups == c && groups == o; }
  bool one_tap() const { return kh == 1 && kw == 1; }
  // Whether every output pixel is a product with the input pixel in its place.
  bool pixelwise() const {
    const bool same_pixels = pad_h == 0 && pad_w == 0 && oh == h && ow == w;
    return one_tap() && stride_h == 1 && stride_w == 1 && same_pixels;
  }

  // The columns of a window are one run of bytes unless they are dilated.
  bool row_runs() const { return dilation_w == 1; }
  int64_t taps() const { return row_runs() ? kh : kh * kw; }
  int64_t run_groups() const { return ceil_div(row_runs() ? kw * group_in() : group_in(), 4); }
};

// Packed weights of a grouped matrix product, as `jaxquant.native.pack` makes them:
// int32 sums over K [groups * padded_out], then the bytes, [groups][blocks][K / 4][block][4].
struct PackedMatrix {
  int64_t groups, out, four_bytes;  // outputs in a group; K / 4

  int64_t padded_out() const { return round_up(out, 16); }
  int64_t header() const { return round_up(4 * groups * padded_out(), 64); }
  int64_t size() const { return header() + groups * padded_out() * four_bytes * 4; }
  int64_t blocks() const { return ceil_div(padded_out(), kBlock); }
  const int32_t* sums(const int8_t* packed) const {
    return reinterpret_cast<const int32_t*>(packed);
  }
  const int8_t* block(const int8_t* packed, int64_t group, int64_t index) const {
    return packed + header() + (group * padded_out() + index * kBlock) * four_bytes * 4;
  }
};

// Packed weights of a depthwise convolution: int32 sums over the window [padded channels], then
// [blocks of 64 channels][quads of taps][4 vectors][4 lanes][4 channels][4 taps].  Channels that
// divide 64 are repeated to fill it.
struct PackedDepthwise {
  int64_t channels, taps;

  int64_t quads() const { return ceil_div(taps, 4); }
  int64_t padded() const { return round_up(channels, 64); }
  int64_t header() const { return 4 * padded(); }
  int64_t size() const { return header() + padded() * quads() * 4; }
  const int32_t* sums(const int8_t* packed) const {
    return reinterpret_cast<const int32_t*>(packed);
  }
  const int8_t* block(const int8_t* packed, int64_t index) const {
    return packed + header() + index * 64 * quads() * 4;
  }
};

}  // namespace jaxquant
