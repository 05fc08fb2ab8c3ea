// Sums of how far one tensor is from another, by channel: what bias correction and SQNR are made of.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "parallel.h"

namespace jaxquant {

// Two tensors [rows, channels], y and ŷ, and f(y) - f(ŷ) of an activation f: given as `gain`, or
// where that is null of the clamp to [low, high].  All are multiplied by `scale`, a power of two, as
// they are read.
struct Compared {
  const float* y;
  const float* y_hat;
  const float* gain;
  float low, high;
  int64_t rows, channels;
  float scale = 1.0f;
};

// The sums of a channel: Σ w d, Σ w d², Σ w, Σ y² and Σ d², with d = y - ŷ and w = (f(y) - f(ŷ)) / d in
// [0, 1]; the first three without values where d or w is not finite, the others where y is not.
constexpr int64_t kSums = 5;

// The iterations of the loop that follows do not meet in memory: they become vectors.
#if defined(__clang__)
#define JAXQUANT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define JAXQUANT_INDEPENDENT _Pragma("GCC ivdep")
#endif

// Adds `rows` rows from `first` on to `sums` [kSums, channels].
template <bool kGiven>
inline void add_rows(const Compared& t, int64_t first, int64_t rows, float* sums) {
  const int64_t n = t.channels;
  const float low = t.low * t.scale, high = t.high * t.scale, scale = t.scale;
  const float infinity = std::numeric_limits<float>::infinity();
  float *wd = sums, *wdd = sums + n, *ws = sums + 2 * n, *yy = sums + 3 * n, *dd = sums + 4 * n;
  for (int64_t row = first; row < first + rows; ++row) {
    const float *y = t.y + row * n, *y_hat = t.y_hat + row * n;
    const float* gain = kGiven ? t.gain + row * n : nullptr;
    JAXQUANT_INDEPENDENT
    for (int64_t c = 0; c < n; ++c) {
      const float a = y[c] * scale, b = y_hat[c] * scale, d = a - b;
      float g;
      if constexpr (kGiven) {
        g = gain[c] * scale;
      } else {
        const float fa = a < low ? low : a, fb = b < low ? low : b;
        g = (fa > high ? high : fa) - (fb > high ? high : fb);
      }
      const float slope = g / d;  // NaN of 0 / 0
      const bool usable = (std::fabs(d) < infinity) & (std::fabs(slope) < infinity);
      const float positive = slope > 0.0f ? slope : 0.0f;
      const float w = usable ? (positive < 1.0f ? positive : 1.0f) : 0.0f;
      const float finite = usable ? d : 0.0f, weighted = w * finite;
      wd[c] += weighted;
      wdd[c] += weighted * finite;
      ws[c] += w;
      const bool compared = std::fabs(a) < infinity;
      yy[c] += compared ? a * a : 0.0f;
      dd[c] += compared ? d * d : 0.0f;
    }
  }
}

// The mean of d by weight, shrunk by what it may owe to chance: m² / (m² + s²) of m, with s its
// standard error for Σ w independent values.
inline double shrunk_mean(double wd, double wdd, double w) {
  if (!(w > 1.0)) return 0.0;  // one value tells nothing of chance
  const double mean = wd / w, power = mean * mean;
  const double chance = std::max(wdd / w - power, 0.0) / (w - 1.0);
  return power > 0.0 ? mean * (power / (power + chance)) : 0.0;
}

// The five sums [kSums, channels].  The same bits with any number of threads.
inline std::vector<double> sum_all(Threads& threads, const Compared& t) {
  constexpr int64_t kValues = 1 << 16;  // a task
  constexpr int64_t kRows = 32;         // that are added in single precision
  constexpr int64_t kTasks = 64;        // at most, for the memory that their sums take
  const int64_t n = t.channels;
  const int64_t each = std::max({kRows, kValues / std::max<int64_t>(1, n),
                                 (t.rows + kTasks - 1) / kTasks});
  const int64_t tasks = (t.rows + each - 1) / each;
  std::vector<double> partial(tasks * kSums * n, 0.0);
  parallel_for(threads, tasks, [&](int64_t task) {
    double* total = partial.data() + task * kSums * n;
    std::vector<float> few(kSums * n);
    const int64_t end = std::min(t.rows, (task + 1) * each);
    for (int64_t row = task * each; row < end; row += kRows) {
      std::fill(few.begin(), few.end(), 0.0f);
      const int64_t rows = std::min(kRows, end - row);
      t.gain ? add_rows<true>(t, row, rows, few.data()) : add_rows<false>(t, row, rows, few.data());
      for (int64_t i = 0; i < kSums * n; ++i) total[i] += few[i];
    }
  });
  std::vector<double> total(kSums * n, 0.0);
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t i = 0; i < kSums * n; ++i) total[i] += partial[task * kSums * n + i];
  return total;
}

// Σ y² and Σ d² over all channels, from the sums of each.
inline std::pair<double, double> powers_of(const std::vector<double>& sums, int64_t channels) {
  double signal = 0.0, noise = 0.0;
  for (int64_t c = 0; c < channels; ++c)
    signal += sums[3 * channels + c], noise += sums[4 * channels + c];
  return {signal, noise};
}

// The power of two not above the largest |y| or |ŷ| that is finite, such that its inverse is a
// float too; 1 where all are zero.
inline float unit_of(const Compared& t) {
  float largest = 0.0f;
  for (int64_t i = 0; i < t.rows * t.channels; ++i)
    for (const float x : {std::fabs(t.y[i]), std::fabs(t.y_hat[i])})
      if (x < std::numeric_limits<float>::infinity()) largest = std::max(largest, x);
  if (largest == 0.0f) return 1.0f;
  int exponent;
  std::frexp(largest, &exponent);
  return std::ldexp(1.0f, std::clamp(exponent - 1, -126, 126));
}

// Writes `sums` [3, channels], the first three, in units of powers[2]; `mean` [channels], the
// shrunk means that follow from them; and `powers` [3]: the last two over all channels, the second infinite where ŷ alone is not finite, and
// the unit.  That is 1 as a rule, and a power of two where squares of what is compared would not be
// floats: very large or very small tensors are read again.
inline void differences(Threads& threads, Compared t, float* sums, float* mean, float* powers) {
  constexpr double kLeast = 0x1p-80, kMost = 0x1p+90;  // of Σ y² + Σ d²
  const int64_t n = t.channels;
  float unit = 1.0f;
  std::vector<double> total = sum_all(threads, t);
  auto [signal, noise] = powers_of(total, n);
  if (!(signal + noise >= kLeast && signal + noise <= kMost)) {
    unit = unit_of(t);
    if (unit != 1.0f) {
      t.scale = 1.0f / unit;
      total = sum_all(threads, t);
      std::tie(signal, noise) = powers_of(total, n);
    }
  }
  for (int64_t i = 0; i < 3 * n; ++i) sums[i] = float(total[i]);
  for (int64_t c = 0; c < n; ++c)
    mean[c] = float(unit * shrunk_mean(total[c], total[n + c], total[2 * n + c]));
  powers[0] = float(signal);
  powers[1] = std::isnan(noise) ? std::numeric_limits<float>::infinity() : float(noise);
  powers[2] = unit;
}

}  // namespace jaxquant
