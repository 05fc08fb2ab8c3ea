// Counts of |x| in bins, and the extremes of x: what a calibration sweep needs of a tensor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "parallel.h"

namespace jaxquant {

constexpr int64_t kBins = 2048;
constexpr int kBinBits = 11;

struct Extremes {
  float low = std::numeric_limits<float>::infinity();
  float high = -std::numeric_limits<float>::infinity();
  bool finite = true;
};

inline Extremes extremes_of(const float* x, int64_t n) {
  Extremes e;
  constexpr int64_t kLanes = 16;  // independent minima, so that the loop is one of vectors
  float low[kLanes], high[kLanes], lost[kLanes];
  std::fill(low, low + kLanes, e.low), std::fill(high, high + kLanes, e.high);
  std::fill(lost, lost + kLanes, 0.0f);
  const auto see = [&](float v, int64_t lane) {
    low[lane] = v < low[lane] ? v : low[lane];
    high[lane] = v > high[lane] ? v : high[lane];
    lost[lane] += v - v;  // NaN of NaN and infinity, and stays so
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) see(x[i + lane], lane);
  for (; i < n; ++i) see(x[i], 0);
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    e.low = std::min(e.low, low[lane]), e.high = std::max(e.high, high[lane]);
    e.finite &= lost[lane] == 0.0f;
  }
  return e;
}

// The least e with x < 2^e, of a finite x >= 0; at least `least`.
inline int32_t exponent_above(float x, int32_t least) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return std::max(int32_t(bits >> 23) - 126, least);
}

// Adds to `counts` [kBins]; every |x| times `scale` lies below kBins.
inline void count_bins(const float* x, int64_t n, float scale, uint32_t* counts) {
  constexpr int64_t kCopies = 8;  // a run of equal values does not wait for its own stores,
  constexpr int64_t kStride = kBins + 16;  // nor for those at the same place of another page
  constexpr int64_t kMany = 64;  // values whose bins are found by vectors
  std::vector<uint32_t> copies(kCopies * kStride, 0);
  uint32_t* table = copies.data();
  int32_t bins[kMany];
  int64_t i = 0;
  for (; i + kMany <= n; i += kMany) {
    for (int64_t k = 0; k < kMany; ++k) bins[k] = int32_t(std::fabs(x[i + k]) * scale);
    for (int64_t k = 0; k < kMany; k += kCopies)
      for (int64_t c = 0; c < kCopies; ++c) ++table[c * kStride + bins[k + c]];
  }
  for (; i < n; ++i) ++table[int32_t(std::fabs(x[i]) * scale)];
  for (int64_t c = 0; c < kCopies; ++c)
    for (int64_t bin = 0; bin < kBins; ++bin) counts[bin] += table[c * kStride + bin];
}

// `counts` [kBins] of |x| over [0, 2^e), e of `exponent_above` the largest |x|; all 0, and NaN for
// the extremes [2] (least and largest x), where a value is not finite.
inline void histogram(Threads& threads, const float* x, int64_t n, int32_t least_exponent,
                      uint32_t* counts, float* extremes) {
  constexpr int64_t kLeast = 1 << 14;  // values a task
  const int64_t tasks = std::max<int64_t>(1, std::min(threads.count(), n / kLeast));
  const int64_t share = (n + tasks - 1) / tasks;
  const auto start = [&](int64_t task) { return x + task * share; };
  const auto length = [&](int64_t task) {
    return std::max<int64_t>(0, std::min(share, n - task * share));
  };
  std::vector<Extremes> found(tasks);
  parallel_for(threads, tasks,
               [&](int64_t task) { found[task] = extremes_of(start(task), length(task)); });
  Extremes all;
  for (const Extremes& e : found) {
    all.low = std::min(all.low, e.low), all.high = std::max(all.high, e.high);
    all.finite &= e.finite;
  }
  std::fill(counts, counts + kBins, 0u);
  if (!all.finite) {
    extremes[0] = extremes[1] = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  extremes[0] = all.low, extremes[1] = all.high;
  const float largest = n > 0 ? std::max(std::max(-all.low, all.high), 0.0f) : 0.0f;
  const float scale = std::ldexp(1.0f, kBinBits - exponent_above(largest, least_exponent));
  std::vector<uint32_t> partial(tasks * kBins, 0);
  parallel_for(threads, tasks, [&](int64_t task) {
    count_bins(start(task), length(task), scale, partial.data() + task * kBins);
  });
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t bin = 0; bin < kBins; ++bin) counts[bin] += partial[task * kBins + bin];
}

}  // namespace jaxquant
