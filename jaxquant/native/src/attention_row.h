// Attention of few rows of queries, of which a step of a decoder has one.
//
// There are no vectors of rows then: they go along the depth or along the keys, whichever lie side by
// side in memory, so that a cache of keys and values is read as it lies, once for each row.  Of a
// cache that is not full, or of a window that slides over it, the mask or the bias shows a part: what
// lies before and behind weighs exactly nothing, and is not read.
#pragma once

#include <algorithm>
#include <cstring>

#include "attention_operands.h"
#include "float_math.h"
#include "vectors.h"

namespace jaxquant {

// y = M x, of a matrix [lines, places].  How a sum is made up depends on the shape and the strides.
template <class L, class T>
class TimesVector {
  using Floats = typename L::Floats;
  static constexpr int kLanes = L::kCount;
  static constexpr int kTogether = 4;     // sums that do not wait for each other
  static constexpr int64_t kAhead = 16;   // lines that are fetched before they are read

 public:
  TimesVector(const Strided<const T>& m, int64_t lines, int64_t places)
      : m_(m), lines_(lines), places_(places) {}

  void run(const float* x, float* y) const {
    if (m_.place == 1) {
      int64_t line = 0;
      for (; line + kTogether <= lines_; line += kTogether) along_places<kTogether>(line, x, y);
      for (; line < lines_; ++line) along_places<1>(line, x, y);
    } else if (m_.line == 1) {
      int64_t line = 0;
      for (; line + kTogether * kLanes <= lines_; line += kTogether * kLanes)
        along_lines<kTogether>(line, kLanes, x, y);
      for (; line < lines_; line += kLanes)
        along_lines<1>(line, std::min<int64_t>(kLanes, lines_ - line), x, y);
    } else {
      for (int64_t line = 0; line < lines_; ++line) y[line] = gathered(line, x);
    }
  }

 private:
  template <int kLines>
  void along_places(int64_t line, const float* x, float* y) const {
    Floats sums[kLines] = {};
    const T* const from = m_.data + line * m_.line;
    const bool fetches = line + kLines + kAhead <= lines_;
    int64_t place = 0;
    for (; place + kLanes <= places_; place += kLanes) {
      const Floats numbers = L::load(x + place);
#pragma GCC unroll 4
      for (int i = 0; i < kLines; ++i) {
        const T* const at = from + i * m_.line + place;
        if (fetches) __builtin_prefetch(at + kAhead * m_.line);
        sums[i] += L::load(at) * numbers;
      }
    }
    if (const int64_t rest = places_ - place; rest) {
      const Floats numbers = L::load(x + place, rest);
      for (int i = 0; i < kLines; ++i)
        sums[i] += L::load(from + i * m_.line + place, rest) * numbers;
    }
    for (int i = 0; i < kLines; ++i) y[line + i] = L::sum(sums[i]);
  }

  // A sum of numbers that lie apart.  They go by way of a vector: of single numbers the compiler
  // would round some products before it adds them and others not, by how many there are.
  float gathered(int64_t line, const float* x) const {
    Floats sums{};
    for (int64_t place = 0; place < places_; place += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, places_ - place);
      const T* const from = m_.data + line * m_.line + place * m_.place;
      Floats numbers{};
      for (int64_t lane = 0; lane < count; ++lane) numbers[lane] = L::number(from[lane * m_.place]);
      sums += numbers * L::load(x + place, count);
    }
    return L::sum(sums);
  }

  // `count` lines of a vector are there.
  template <int kVectors>
  void along_lines(int64_t line, int64_t count, const float* x, float* y) const {
    Floats sums[kVectors] = {};
    const T* from = m_.data + line;
    for (int64_t place = 0; place < places_; ++place, from += m_.place) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const T* const at = from + v * kLanes;
        sums[v] += (kVectors == 1 ? L::load(at, count) : L::load(at)) * x[place];
      }
    }
    for (int v = 0; v < kVectors; ++v)
      std::memcpy(y + line + v * kLanes, &sums[v], count * sizeof(float));
  }

  const Strided<const T> m_;
  const int64_t lines_, places_;
};

// One row of queries.
template <class L, class T>
class AttentionRow {
  using Floats = typename L::Floats;
  using Math = FloatMath<L>;
  static constexpr int kLanes = L::kCount;

 public:
  AttentionRow(const Attention& a, const AttentionOperands<T>& given, int64_t row, float* scratch)
      : a_(a), given_(given), row_(row), query_(scratch), scores_(query_ + a.depth),
        result_(scores_ + a.keys) {
    find_shown();
  }

  static int64_t floats(const Attention& a) { return a.depth + a.keys + a.values; }

  void run() {
    const float* const q = given_.q.data + row_ * given_.q.line;
    for (int64_t d = 0; d < a_.depth; ++d) query_[d] = q[d * given_.q.place] * a_.scale;
    float largest = score();
    // Keys that are not shown have a score too, which may weigh something.
    if (end_ - first_ < a_.keys && !(hidden_ - largest < Math::kLeastExponent)) {
      first_ = 0, end_ = a_.keys;
      largest = score();
    }
    const float inverse = 1.0f / weigh(largest);
    const Strided<const T>& v = given_.v;
    const Strided<const T> turned{v.data + first_ * v.line, v.place, v.line};
    TimesVector<L, T>(turned, a_.values, end_ - first_).run(scores_ + first_, result_);
    float* const out = given_.out.data + row_ * given_.out.line;
    for (int64_t i = 0; i < a_.values; ++i) out[i * given_.out.place] = result_[i] * inverse;
  }

 private:
  // Keys [first, end) are all that the mask and the bias show, and no other scores higher than
  // `hidden`.  Vectors of keys begin where they would without it, so that no sum is made up in
  // another way.
  void find_shown() {
    constexpr float kNever = -1e30f;  // a bias beside which no product counts
    const auto& mask = given_.mask;
    const auto& bias = given_.bias;
    first_ = 0, end_ = a_.keys;
    hidden_ = std::max(mask.data ? a_.fill : kNever / 2, bias.data ? kNever / 2 : a_.fill);
    const auto shows = [&](int64_t key) {
      return !(mask.data && !mask.data[key * mask.line + row_ * mask.place]) &&
             !(bias.data && bias.data[key * bias.line + row_ * bias.place] < kNever);
    };
    if (!mask.data && !bias.data) return;
    while (end_ && !shows(end_ - 1)) --end_;
    while (first_ < end_ && !shows(first_)) ++first_;
    first_ -= first_ % kLanes;
  }

  // The scores of the keys, and the largest of them.
  float score() {
    constexpr float kNone = -__builtin_inff();  // a score behind the last key
    const Strided<const T>& k = given_.k;
    TimesVector<L, T>({k.data + first_ * k.line, k.line, k.place}, end_ - first_, a_.depth)
        .run(query_, scores_ + first_);
    Floats most = Floats{} + kNone;
    each_vector([&](int64_t key, int64_t count) {
      Floats score = masked(L::load(scores_ + key, count), key, count);
      std::memcpy(scores_ + key, &score, count * sizeof(float));
      for (int64_t lane = count; lane < kLanes; ++lane) score[lane] = kNone;
      most = Math::largest(score, most);
    });
    float largest = most[0];
    for (int lane = 1; lane < kLanes; ++lane) largest = std::max(largest, most[lane]);
    return largest;
  }

  // Makes weights of the scores, e^(score - the largest), and gives their sum.
  float weigh(float largest) {
    Floats total{};
    each_vector([&](int64_t key, int64_t count) {
      Floats weight = Math::exp(L::load(scores_ + key, count) - largest);
      std::memcpy(scores_ + key, &weight, count * sizeof(float));
      for (int64_t lane = count; lane < kLanes; ++lane) weight[lane] = 0;
      total += weight;
    });
    return L::sum(total);
  }

  template <class F>
  void each_vector(const F& function) const {
    int64_t key = first_;
    for (; key + kLanes <= end_; key += kLanes) function(key, int64_t{kLanes});
    if (key < end_) function(key, end_ - key);
  }

  // A vector of scores with its bias and its mask.
  Floats masked(Floats score, int64_t key, int64_t count) const {
    if (const auto& bias = given_.bias; bias.data) {
      const float* from = bias.data + key * bias.line + row_ * bias.place;
      for (int64_t lane = 0; lane < count; ++lane) score[lane] += from[lane * bias.line];
    }
    if (const auto& mask = given_.mask; mask.data) {
      const uint8_t* from = mask.data + key * mask.line + row_ * mask.place;
      for (int64_t lane = 0; lane < count; ++lane)
        if (!from[lane * mask.line]) score[lane] = a_.fill;
    }
    return score;
  }

  const Attention& a_;
  const AttentionOperands<T>& given_;
  const int64_t row_;
  int64_t first_, end_;  // the keys that are read
  float hidden_;
  float* const query_;
  float* const scores_;
  float* const result_;
};

}  // namespace jaxquant
