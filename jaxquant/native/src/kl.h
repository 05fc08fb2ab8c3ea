// The threshold at which int8 loses the least information; `jaxquant.calibration.kl` tells of what.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace jaxquant {

// What weighs one candidate against another.
struct Weighing {
  double clipping;  // weight of the squared clipping error beside that of rounding
  double margin;    // far above the rounding of sums, relative and absolute
  double slack;     // by which an error may exceed that of no clipping, relative
  double tie;       // divergences no further apart are equal
};

// Running sums of counts that are spread evenly within bins of length 1, at fractional positions.
class RunningSums {
 public:
  struct At {
    double count, support, depth;  // ∫ h, the length where h > 0, ∫∫ h
  };

  RunningSums(const double* h, int64_t bins) : bins_(bins), table_(bins) {
    At sum{0.0, 0.0, 0.0};
    for (int64_t j = 0; j < bins; ++j) {
      table_[j] = {h[j], sum};
      first_ += h[j] * (double(j) + 0.5);
      second_ += h[j] * (double(j) * double(j + 1) + 1.0 / 3.0);
      sum.depth += sum.count + h[j] / 2.0;
      sum.count += h[j];
      sum.support += h[j] > 0.0 ? 1.0 : 0.0;
    }
    total_ = sum;
  }

  At at(double position) const {
    const int64_t j = std::min(int64_t(position), bins_ - 1);
    const double part = position - double(j);
    const auto& [h, below] = table_[j];
    return {below.count + part * h, below.support + (h > 0.0 ? part : 0.0),
            below.depth + part * (below.count + part * h / 2.0)};
  }

  const At& total() const { return total_; }

  // Σ (x - threshold)² over all x.
  double squares_from(double threshold) const {
    return second_ - threshold * (2.0 * first_ - threshold * total_.count);
  }

 private:
  struct Bin {
    double h;
    At below;
  };
  int64_t bins_;
  std::vector<Bin> table_;
  At total_;
  double first_ = 0.0, second_ = 0.0;  // Σ x and Σ x²
};

inline double information(double mass, double support) {
  return mass > 0.0 && support > 0.0 ? mass * std::log(mass / support) : 0.0;
}

// The summed squared error of `levels` levels up to a threshold, and the information in them.
struct Cost {
  double error, information;
};

inline Cost cost_of(const RunningSums& sums, double threshold, int64_t levels, bool informs) {
  Cost cost{0.0, 0.0};
  RunningSums::At before{0.0, 0.0, 0.0};
  double depth = 0.0;
  for (int64_t k = 1; k <= levels; ++k) {
    const RunningSums::At at = sums.at(threshold * ((double(k) - 0.5) / double(levels)));
    depth += at.depth;
    if (informs)
      cost.information += information(at.count - before.count, at.support - before.support);
    before = at;
  }
  const auto& total = sums.total();
  if (informs)
    cost.information += information(total.count - before.count, total.support - before.support);
  cost.error = sums.squares_from(threshold) - 2.0 * threshold / double(levels) * depth;
  return cost;
}

// Σ (x - T)² over the x above T, for T = 1, 2, ... bins: summed from the end, so nothing cancels.
inline std::vector<double> clipped_squares(const double* h, int64_t bins) {
  std::vector<double> squares(bins);
  double above = 0.0, excess = 0.0, square = 0.0;
  for (int64_t j = bins - 1; j >= 0; --j) {
    squares[j] = 2.0 * square;
    square += excess + above / 2.0 + h[j] / 6.0;
    excess += above + h[j] / 2.0;
    above += h[j];
  }
  return squares;
}

// The threshold in bins, at most `limit`, which is no clipping.
inline double kl_threshold(const double* counts, int64_t bins, double limit, int64_t levels,
                           const Weighing& weighing) {
  std::vector<double> h(counts, counts + bins);
  h[0] = std::min(h[0], h[1]);  // the rest are exact zeros
  const RunningSums sums(h.data(), bins);
  const std::vector<double> clipped = clipped_squares(h.data(), bins);
  const Cost whole = cost_of(sums, limit, levels, true);
  double known = 0.0;
  for (double count : h) known += information(count, 1.0);
  const double total = std::max(sums.total().count, 1.0);
  const auto divergence = [&](const Cost& cost) {
    return std::max((known - cost.information) / total, 0.0);
  };
  const double allowed = whole.error + weighing.slack * std::fabs(whole.error);
  const double possible = whole.error * (1.0 + weighing.margin) + weighing.margin;

  std::vector<std::pair<double, double>> found{{limit, divergence(whole)}};
  for (int64_t j = 0; j < bins && double(j + 1) < limit; ++j) {
    if (!(weighing.clipping * clipped[j] <= possible)) continue;
    const double threshold = double(j + 1);
    const double beyond = (weighing.clipping - 1.0) * clipped[j];
    if (!(cost_of(sums, threshold, levels, false).error + beyond <= allowed)) continue;
    found.emplace_back(threshold, divergence(cost_of(sums, threshold, levels, true)));
  }
  double least = std::numeric_limits<double>::infinity(), best = 0.0;
  for (const auto& [threshold, value] : found) least = std::min(least, value);
  for (const auto& [threshold, value] : found)
    if (value <= least + weighing.tie) best = std::max(best, threshold);
  return best;
}

}  // namespace jaxquant
