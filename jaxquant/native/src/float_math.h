// Elementary functions of vectors of floats.
#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace jaxquant {

// Functions of the vectors of `L`.  NaN stays NaN.
template <class L>
struct FloatMath {
  using Floats = typename L::Floats;
  using Ints = typename L::Ints;

  static Floats largest(Floats a, Floats b) { return a > b ? a : b; }

  // clip(round_half_even(x * inv_scale) + zero_point, -128, 127); one scale, or one for each lane.
  template <class Scale>
  static typename L::Bytes quantized(Floats x, Scale inv_scale, float zero_point) {
    constexpr float kFar = 1024.0f;  // from where on everything is at one end or the other
    Floats scaled = x * inv_scale;
    scaled = scaled < -kFar ? Floats{} - kFar : scaled;
    scaled = rounded(scaled > kFar ? Floats{} + kFar : scaled) + zero_point;
    scaled = scaled < -128.0f ? Floats{} - 128.0f : scaled;
    return L::narrow(L::ints(scaled > 127.0f ? Floats{} + 127.0f : scaled));
  }

  static constexpr float kLeastExponent = -87.33654f;  // below it e^x is 0

  // e^x, within two units in the last place; 0 below the least normal result, infinity above the
  // largest.
  //
  // x = n ln 2 + r: 2^n is an exponent, e^r a polynomial.  Coefficients: S. Moshier, Cephes, expf.
  static Floats exp(Floats x) {
    constexpr float kLeast = kLeastExponent, kLargest = 88.37626f;
    Floats within = x < kLeast ? Floats{} + kLeast : x;
    within = within > kLargest ? Floats{} + kLargest : within;
    const Floats n = rounded(within * 1.44269504f);
    const Floats r = (within - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats p = Floats{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Floats result = p * power_of_two(n);
    return x < kLeast ? Floats{} : x > kLargest ? Floats{} + __builtin_inff() : result;
  }

 private:
  // To the nearest whole number, of numbers below 2^22: those behind the point have no room beside
  // so large a one.
  static Floats rounded(Floats x) { return (x + 12582912.0f) - 12582912.0f; }

  // 2^n, of whole numbers from -126 to 127; anything for NaN.
  static Floats power_of_two(Floats n) {
    const Ints bits = (L::ints(n) + 127) << 23;
    Floats power;
    std::memcpy(&power, &bits, sizeof(power));
    return power;
  }
};

}  // namespace jaxquant
