// Functions of rows of floats in one pass: GELU, layer normalization, a grid for each row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "float_math.h"
#include "parallel.h"
#include "vectors.h"

namespace jaxquant {

constexpr int64_t kPart = 1 << 13;  // floats that a thread takes at once

// The standard normal distribution's P(X <= x), within 3e-7 of its smaller side.
//
// A polynomial in 1 / (1 + p |x|) times e^(-x^2 / 2), as in Abramowitz and Stegun 7.1.26, of degree 8
// and fitted to the least relative error.
template <class L>
inline typename L::Floats normal_distribution(typename L::Floats x) {
  using Floats = typename L::Floats;
  const Floats size = x < Floats{} ? -x : x;
  const Floats t = 1.0f / (1.0f + 0.305f * size);
  Floats p = Floats{} + 0.036698297f;
  p = p * t - 0.15298446f;
  p = p * t + 0.18571066f;
  p = p * t - 0.037971143f;
  p = p * t + 0.12101870f;
  p = p * t + 0.10342176f;
  p = p * t + 0.12246667f;
  p = p * t + 0.12163974f;
  const Floats tail = p * t * FloatMath<L>::exp(size * size * -0.5f);
  return x < Floats{} ? tail : 1.0f - tail;
}

template <class L>
inline typename L::Floats gelu(typename L::Floats x, bool by_tanh) {
  if (!by_tanh) return x * normal_distribution<L>(x);
  // (1 + tanh u) / 2 = 1 / (1 + e^-2u)
  const auto u = x * 0.7978845608f * (1.0f + 0.044715f * (x * x));
  return x / (1.0f + FloatMath<L>::exp(u * -2.0f));
}

// Makes a vector of `from` at a time, and gives it to `store` with its place and how much of it counts.
template <class L, class Make, class Store>
void each_vector(Threads& threads, const float* from, int64_t size, const Make& make,
                 const Store& store) {
  parallel_for(threads, ceil_div(size, kPart), [&](int64_t part) {
    const int64_t end = std::min(size, (part + 1) * kPart);
    int64_t at = part * kPart;
    for (; at + L::kCount <= end; at += L::kCount) store(at, make(L::load(from + at)), L::kCount);
    if (at < end) store(at, make(L::load(from + at, end - at)), end - at);
  });
}

template <class L>
void gelu(Threads& threads, const float* x, int64_t size, bool by_tanh, float* out) {
  each_vector<L>(
      threads, x, size, [&](auto value) { return gelu<L>(value, by_tanh); },
      [&](int64_t at, auto y, int64_t count) { std::memcpy(out + at, &y, count * sizeof(float)); });
}

// The same in int8, on the grid of a scale and a zero point.
template <class L>
void gelu(Threads& threads, const float* x, int64_t size, bool by_tanh, float inv_scale,
          int32_t zero_point, int8_t* out) {
  each_vector<L>(
      threads, x, size,
      [&](auto value) {
        return FloatMath<L>::quantized(gelu<L>(value, by_tanh), inv_scale, float(zero_point));
      },
      [&](int64_t at, auto q, int64_t count) { std::memcpy(out + at, &q, count); });
}

// (x - mean) / sqrt(variance + epsilon) * scale + bias of each row; null for no scale or bias.
struct LayerNorm {
  int64_t columns;
  float epsilon;
  const float *scale, *bias;
};

// One row.  The variance is that of the centered numbers: mean(x^2) - mean^2 loses the digits of a
// row that is far from zero.
template <class L>
inline void layer_norm_row(const LayerNorm& norm, const float* x, float* out) {
  using Floats = typename L::Floats;
  constexpr int kLanes = L::kCount;
  const int64_t whole = norm.columns / kLanes * kLanes, rest = norm.columns - whole;
  const float inverse = 1.0f / float(norm.columns);
  Floats sums[2] = {};
  for (int64_t c = 0; c < whole; c += kLanes) sums[c / kLanes % 2] += L::load(x + c);
  if (rest) sums[0] += L::load(x + whole, rest);
  const float mean = L::sum(sums[0] + sums[1]) * inverse;
  Floats squares[2] = {};
  const auto centered = [&](int64_t c) { return L::load(x + c) - mean; };
  for (int64_t c = 0; c < whole; c += kLanes) {
    const Floats each = centered(c);
    squares[c / kLanes % 2] += each * each;
  }
  float variance = L::sum(squares[0] + squares[1]);
  for (int64_t c = whole; c < norm.columns; ++c) variance += (x[c] - mean) * (x[c] - mean);
  const float deviation = 1.0f / std::sqrt(variance * inverse + norm.epsilon);
  const auto finish = [&](Floats each, Floats scale, Floats bias) {
    each *= deviation;
    if (norm.scale) each *= scale;
    if (norm.bias) each += bias;
    return each;
  };
  for (int64_t c = 0; c < whole; c += kLanes) {
    const Floats y = finish(centered(c), norm.scale ? L::load(norm.scale + c) : Floats{},
                            norm.bias ? L::load(norm.bias + c) : Floats{});
    std::memcpy(out + c, &y, sizeof(y));
  }
  if (rest) {
    const Floats y = finish(L::load(x + whole, rest) - mean,
                            norm.scale ? L::load(norm.scale + whole, rest) : Floats{},
                            norm.bias ? L::load(norm.bias + whole, rest) : Floats{});
    std::memcpy(out + whole, &y, rest * sizeof(float));
  }
}

template <class L>
void layer_norm(Threads& threads, const LayerNorm& norm, const float* x, int64_t rows, float* out) {
  const int64_t each = std::max<int64_t>(1, kPart / norm.columns);
  parallel_for(threads, ceil_div(rows, each), [&](int64_t part) {
    for (int64_t r = part * each; r < std::min(rows, (part + 1) * each); ++r)
      layer_norm_row<L>(norm, x + r * norm.columns, out + r * norm.columns);
  });
}

// The grid of a tensor: one inverse scale, or one for each of the `channels` that follow each other.
struct TensorGrid {
  const float* inv_scale;
  int64_t channels;
  int32_t zero_point;
};

// Numbers in int8, and a mark for each row: NaN where one of its numbers is NaN or infinite, else 0.
// A row has all channels some times.
template <class L>
void quantize(Threads& threads, const TensorGrid& grid, const float* x, int64_t rows,
              int64_t columns, int8_t* q, float* marks) {
  using Floats = typename L::Floats;
  const bool by_channel = grid.channels > 1;
  const int64_t line = by_channel ? grid.channels : columns;
  std::fill_n(marks, rows, 0.0f);
  // Numbers [at, end) of one line: whether all are finite.
  const auto finite = [&](int64_t at, int64_t end) {
    typename L::Ints odd = {};
    const float* scales = grid.inv_scale + (by_channel ? at % line : 0);
    const auto one = [&](Floats value, int64_t count) {
      const Floats nothing = value - value;  // NaN of infinity too
      odd |= nothing != nothing;
      const Floats scale = by_channel ? L::load(scales, count) : Floats{} + *scales;
      const auto rounded = FloatMath<L>::quantized(value, scale, float(grid.zero_point));
      std::memcpy(q + at, &rounded, count);
      scales += by_channel ? count : 0;
    };
    for (; at + L::kCount <= end; at += L::kCount) one(L::load(x + at), L::kCount);
    if (at < end) one(L::load(x + at, end - at), end - at);
    for (int lane = 0; lane < L::kCount; ++lane)
      if (odd[lane]) return false;
    return true;
  };
  const int64_t size = rows * columns;
  parallel_for(threads, ceil_div(size, kPart), [&](int64_t part) {
    const int64_t last = std::min(size, (part + 1) * kPart);
    for (int64_t at = part * kPart; at < last;) {
      const int64_t end = std::min(last, (at / line + 1) * line);
      if (!finite(at, end)) {  // of a row that several threads may be at, all of which write the same
        float mark = __builtin_nanf("");  // not const: Clang asks for a plain pointer
        __atomic_store(marks + at / columns, &mark, __ATOMIC_RELAXED);
      }
      at = end;
    }
  });
}

// What the integers of a row are worth, and which of them stands for zero.
struct RowGrid {
  float scale, inverse;
  int32_t zero_point;
};

// The grid of numbers in [low, high], 0 in it, as `jaxquant.run.dynamic` has it: of all 256 steps, or
// symmetric.  NaN where one of them is NaN.
inline RowGrid row_grid(float low, float high, bool asymmetric, float smallest) {
  const auto at_least = [](float value, float least) { return value < least ? least : value; };
  if (!asymmetric) {
    const float threshold = at_least(high < -low ? -low : high, 127.0f * smallest);
    return {threshold * (1.0f / 127.0f), 127.0f / threshold, 0};
  }
  const float half = high * 0.5f - low * 0.5f;
  const float scale = at_least(half * (2.0f / 255.0f), smallest), inverse = 1.0f / scale;
  const float zero = -128.0f - std::nearbyint(low * inverse);
  return {scale, inverse, zero >= -128.0f ? int32_t(std::min(zero, 127.0f)) : -128};
}

// Rows in int8, each on a grid of its own.
template <class L>
void quantize_rows(Threads& threads, const float* x, int64_t rows, int64_t columns, bool asymmetric,
                   float smallest, int8_t* q, float* scales, int32_t* zero_points) {
  using Floats = typename L::Floats;
  const int64_t each = std::max<int64_t>(1, kPart / columns);
  const auto one = [&](int64_t r) {
    const float* row = x + r * columns;
    Floats low = {}, high = {};
    typename L::Ints odd = {};
    const auto look = [&](Floats value) {
      low = value < low ? value : low;
      high = value > high ? value : high;
      const Floats nothing = value - value;  // NaN of infinity too, as its row is in XLA
      odd |= nothing != nothing;
    };
    int64_t at = 0;
    for (; at + L::kCount <= columns; at += L::kCount) look(L::load(row + at));
    if (at < columns) look(L::load(row + at, columns - at));
    float least = 0.0f, most = 0.0f;
    for (int lane = 0; lane < L::kCount; ++lane) {
      least = std::min(least, low[lane]), most = std::max(most, high[lane]);
    }
    for (int lane = 0; lane < L::kCount; ++lane)
      if (odd[lane]) least = most = __builtin_nanf("");
    const RowGrid grid = row_grid(least, most, asymmetric, smallest);
    scales[r] = grid.scale, zero_points[r] = grid.zero_point;
    const auto round = [&](Floats value) {
      return FloatMath<L>::quantized(value, grid.inverse, float(grid.zero_point));
    };
    int8_t* to = q + r * columns;
    for (at = 0; at + L::kCount <= columns; at += L::kCount) {
      const auto rounded = round(L::load(row + at));
      std::memcpy(to + at, &rounded, L::kCount);
    }
    if (at < columns) {
      const auto rounded = round(L::load(row + at, columns - at));
      std::memcpy(to + at, &rounded, columns - at);
    }
  };
  parallel_for(threads, ceil_div(rows, each), [&](int64_t part) {
    for (int64_t r = part * each; r < std::min(rows, (part + 1) * each); ++r) one(r);
  });
}

}  // namespace jaxquant
