// Depthwise convolution in float32, for the float model that calibration runs.
#pragma once

#include <algorithm>
#include <cstring>

#include "parallel.h"
#include "shape.h"

namespace jaxquant {

// The taps of a window that lie inside the input, [first, last), for the output at `at`.
struct TapRange {
  int64_t first, last;

  TapRange(int64_t at, int64_t stride, int64_t pad, int64_t dilation, int64_t taps, int64_t size) {
    const int64_t start = at * stride - pad;
    first = start < 0 ? std::min(taps, ceil_div(-start, dilation)) : 0;
    last = start < size ? std::min(taps, ceil_div(size - start, dilation)) : 0;
    last = std::max(first, last);
  }
};

#if defined(__GNUC__)
typedef float FloatLanes __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int64_t kFloatLanes = 16;
#else
typedef float FloatLanes;
constexpr int64_t kFloatLanes = 1;
#endif

// `kVectors` vectors of channels of one output; the window is summed in order, rows first.  It
// begins at x[start], which may lie outside the input; then `rows` and `columns` do not begin at 0.
template <int kVectors>
inline void float_window(const float* x, int64_t start, const float* kernel, const ConvShape& s,
                         TapRange rows, TapRange columns, float* out) {
  FloatLanes sums[kVectors] = {};
  for (int64_t i = rows.first; i < rows.last; ++i) {
    for (int64_t j = columns.first; j < columns.last; ++j) {
      const float* pixel = x + start + (i * s.dilation_h * s.w + j * s.dilation_w) * s.c;
      const float* weights = kernel + (i * s.kw + j) * s.c;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sums[v] += *reinterpret_cast<const FloatLanes*>(pixel + v * kFloatLanes) *
                   *reinterpret_cast<const FloatLanes*>(weights + v * kFloatLanes);
      }
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v)
    *reinterpret_cast<FloatLanes*>(out + v * kFloatLanes) = sums[v];
}

// The channels that fill no vector.
inline void float_window_rest(const float* x, int64_t start, const float* kernel,
                              const ConvShape& s, TapRange rows, TapRange columns,
                              int64_t channels, float* out) {
  for (int64_t c = 0; c < channels; ++c) {
    float sum = 0.0f;
    for (int64_t i = rows.first; i < rows.last; ++i)
      for (int64_t j = columns.first; j < columns.last; ++j)
        sum += x[start + (i * s.dilation_h * s.w + j * s.dilation_w) * s.c + c] *
               kernel[(i * s.kw + j) * s.c + c];
    out[c] = sum;
  }
}

// x [n, h, w, c], kernel [kh, kw, 1, c], out [n, oh, ow, c].
inline void float_depthwise(Threads& threads, const float* x, const float* kernel,
                            const ConvShape& s, float* out) {
  parallel_for(threads, s.n * s.oh, [&](int64_t task) {
    const int64_t image = task / s.oh, row = task % s.oh;
    const TapRange rows(row, s.stride_h, s.pad_h, s.dilation_h, s.kh, s.h);
    for (int64_t column = 0; column < s.ow; ++column) {
      const TapRange columns(column, s.stride_w, s.pad_w, s.dilation_w, s.kw, s.w);
      const int64_t start = ((image * s.h + row * s.stride_h - s.pad_h) * s.w +
                             column * s.stride_w - s.pad_w) * s.c;
      float* to = out + (task * s.ow + column) * s.c;
      int64_t c = 0;
      for (; c + 4 * kFloatLanes <= s.c; c += 4 * kFloatLanes)
        float_window<4>(x, start + c, kernel + c, s, rows, columns, to + c);
      for (; c + 2 * kFloatLanes <= s.c; c += 2 * kFloatLanes)
        float_window<2>(x, start + c, kernel + c, s, rows, columns, to + c);
      for (; c + kFloatLanes <= s.c; c += kFloatLanes)
        float_window<1>(x, start + c, kernel + c, s, rows, columns, to + c);
      float_window_rest(x, start + c, kernel + c, s, rows, columns, s.c - c, to + c);
    }
  });
}

}  // namespace jaxquant
