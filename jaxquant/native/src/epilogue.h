// The epilogue of an accumulating operation: int32 sums to float32, and on to int8.
//
//   y = sum * multiplier[c] + bias[c]            (one fused multiply-add, as XLA contracts it)
//   y = clamp(y, low, high)
//   y = y + (residual - residual_zero_point) * residual_scale     (one fused multiply-add)
//   y = clamp(y, low_after, high_after)
//   q = round_half_even(clamp(y * inv_scale, kLeast - zero_point, kLargest - zero_point)) + zero_point
//
// Or none of it: the sums themselves.
//
// The bounds of the last clamp are integers, so clamping before rounding gives what clamping after
// it does, and nothing overflows in the conversion.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "fields.h"

namespace jaxquant {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int32_t kLeast = -128, kLargest = 127;  // of int8
constexpr int64_t kStreamedBytes = 1 << 21;  // a float output of so many is written past the caches

// Which forms of it the kernels have apart.
enum class Form {
  any,
  bytes,        // int8 alone, in a range that `quantized.h` is for
  bytes_added,  // the same with an int8 residual
};

struct Epilogue {
  const float* multiplier = nullptr;  // [C]
  const float* bias = nullptr;        // [C], or null
  float low = -kInfinity, high = kInfinity;
  const int8_t* residual_q = nullptr;  // of the output's shape, or null
  const float* residual_f = nullptr;   // of the output's shape, or null
  float residual_scale = 1.0f;
  int32_t residual_zero_point = 0;
  uint8_t residual_flip = 0;  // 0x80 for uint8, which holds q + 128
  float low_after = -kInfinity, high_after = kInfinity;
  float* out_f = nullptr;   // of the output's shape, or null
  bool streams = false;     // out_f goes past the caches: no line is read to be written
  int8_t* out_q = nullptr;  // of the output's shape, or null
  int32_t* sums = nullptr;  // the only output, of its shape, or null
  float inv_scale = 1.0f;
  int32_t zero_point = 0;
  uint8_t out_flip = 0;

  // That of the rows from `row` on, of `channels` outputs each.
  Epilogue from(int64_t row, int64_t channels) const {
    Epilogue e = *this;
    const int64_t at = row * channels;
    if (residual_q) e.residual_q += at;
    if (residual_f) e.residual_f += at;
    if (out_f) e.out_f += at;
    if (out_q) e.out_q += at;
    if (sums) e.sums += at;
    return e;
  }
  // Without a residual between them the two clamps become one.
  void set_clamps(const Clamps& bounds, bool has_residual) {
    low = bounds.low, high = bounds.high;
    low_after = bounds.low_after, high_after = bounds.high_after;
    if (has_residual) return;
    low = std::min(std::max(low, low_after), high_after);
    high = std::min(std::max(high, low_after), high_after);
    low_after = -kInfinity, high_after = kInfinity;
  }
  // A float output of `size` bytes; large ones go past the caches where whole vectors do.
  void write_floats(void* data, int64_t size, int64_t channels) {
    out_f = static_cast<float*>(data);
    streams = size >= kStreamedBytes && channels % 16 == 0 &&
              reinterpret_cast<uintptr_t>(data) % 64 == 0;
  }

  // Read and written for one sum.
  int64_t bytes() const {
    return (out_f || sums ? 4 : 0) + (out_q ? 1 : 0) + (residual_f ? 4 : 0) + (residual_q ? 1 : 0);
  }
  Form form(int64_t channels) const {
    const bool only_bytes = out_q && !out_f && !sums && !residual_f;
    const bool adds = residual_q != nullptr;
    if (!only_bytes || !stays_in_range(channels)) return Form::any;
    if (!adds) return Form::bytes;
    const bool is_open = low == -kInfinity && high == kInfinity;  // before the addition
    return is_open && !residual_flip ? Form::bytes_added : Form::any;
  }
  // What a float becomes, as an int8.
  int8_t quantized(float y) const {
    const float least = float(kLeast - zero_point), largest = float(kLargest - zero_point);
    const float scaled = std::min(std::max(y * inv_scale, least), largest);
    return int8_t(std::nearbyintf(scaled) + zero_point);
  }

 private:
  // Whether the result is far from overflowing an int32, whatever the sums and the residual are.
  bool stays_in_range(int64_t channels) const {
    const float y = std::ldexp(largest_of(multiplier, channels), 31) +
                    (bias ? largest_of(bias, channels) : 0.0f) +
                    (residual_q ? 1024.0f * std::fabs(residual_scale) : 0.0f);
    return inv_scale > 0.0f && y * inv_scale < std::ldexp(1.0f, 30);
  }
  // The largest absolute value; NaN, or infinity, where one is that.
  static float largest_of(const float* values, int64_t count) {
    int32_t most = 0;  // of their bits, which are in the same order
    for (int64_t i = 0; i < count; ++i) {
      int32_t bits;
      std::memcpy(&bits, values + i, sizeof(bits));
      most = std::max(most, bits & 0x7fffffff);
    }
    float found;
    std::memcpy(&found, &most, sizeof(found));
    return found;
  }
};

}  // namespace jaxquant
