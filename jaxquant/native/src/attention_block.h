// Attention of many rows of queries, without ever writing all scores to memory.
//
// Vectors go along the rows of q: a score is the sum over the depth of one number of k, which is
// read as it lies, times a vector of q, and the softmax takes its maxima and sums lane by lane.
#pragma once

#include <algorithm>
#include <cstring>

#include "attention_operands.h"
#include "float_math.h"
#include "shape.h"
#include "vectors.h"

namespace jaxquant {

constexpr int64_t kAttentionRows = 64;  // that share a pass over keys and values

// Part of the scores [keys, kAttentionRows], and what they are made of.
template <class L>
class AttentionBlock {
  using Floats = typename L::Floats;
  using Math = FloatMath<L>;
  static constexpr int kLanes = L::kCount;
  // Vectors of rows that fit into registers beside the sums of several keys.
  static constexpr int kMost = L::sums_of(6) >= 4 ? 4 : 2;

 public:
  // Rows [first, first + count) of `a`.
  AttentionBlock(const Attention& a, const AttentionOperands<float>& given, int64_t first,
                 int64_t count, float* scratch)
      : a_(a), given_(given), first_(first), count_(count),
        width_(round_up(count, std::max(kLanes, kTogether))),
        queries_(scratch), scores_(queries_ + a.depth * width_),
        values_(scores_ + a.keys * width_) {}

  static int64_t floats(const Attention& a) {
    return (a.depth + a.keys) * kAttentionRows + a.keys * a.values;
  }

  void run() {
    copy_queries();
    if (given_.v.place != 1) copy_values();
    int64_t at = 0;
    for (; at + kMost * kLanes <= width_; at += kMost * kLanes) columns<kMost>(at);
    if constexpr (kMost > 2) {
      for (; at + 2 * kLanes <= width_; at += 2 * kLanes) columns<2>(at);
    }
    for (; at < width_; at += kLanes) columns<1>(at);
    for (int64_t row = 0; row < count_; row += kTogether) values(row);
  }

 private:
  // q times the scale, [depth, width], zeros behind the rows.
  void copy_queries() {
    std::memset(queries_, 0, a_.depth * width_ * sizeof(float));
    for (int64_t r = 0; r < count_; ++r) {
      const float* row = given_.q.data + (first_ + r) * given_.q.line;
      for (int64_t d = 0; d < a_.depth; ++d)
        queries_[d * width_ + r] = row[d * given_.q.place] * a_.scale;
    }
  }

  // v with its places side by side.
  void copy_values() {
    for (int64_t key = 0; key < a_.keys; ++key) {
      const float* line = given_.v.data + key * given_.v.line;
      for (int64_t i = 0; i < a_.values; ++i)
        values_[key * a_.values + i] = line[i * given_.v.place];
    }
    given_.v = {values_, a_.values, 1};
  }

  // The weights of all keys for vectors of rows from `at`, and the sums of these.
  template <int kVectors>
  void columns(int64_t at) {
    constexpr int kKeys = kVectors == 4 ? 6 : 8 / kVectors * (L::sums_of(8) >= 2 ? 2 : 1);
    Floats most[kVectors];
    for (auto& each : most) each = Floats{} - __builtin_inff();
    int64_t key = 0;
    for (; key + kKeys <= a_.keys; key += kKeys) scores<kVectors, kKeys>(key, at, most);
    for (; key < a_.keys; ++key) scores<kVectors, 1>(key, at, most);
    Floats total[kVectors] = {};
    for (key = 0; key < a_.keys; ++key) {
      float* line = scores_ + key * width_ + at;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Floats weight = Math::exp(L::load(line + v * kLanes) - most[v]);
        total[v] += weight;
        std::memcpy(line + v * kLanes, &weight, sizeof(weight));
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const Floats inverse = 1.0f / total[v];
      std::memcpy(inverses_ + at + v * kLanes, &inverse, sizeof(inverse));
    }
  }

  template <int kVectors, int kKeys>
  void scores(int64_t key, int64_t at, Floats* most) {
    Floats sums[kKeys][kVectors] = {};
    const float* k = given_.k.data + key * given_.k.line;
    const float* q = queries_ + at;
    for (int64_t d = 0; d < a_.depth; ++d, k += given_.k.place, q += width_) {
      Floats rows[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) rows[v] = L::load(q + v * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        const float one = k[i * given_.k.line];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[i][v] += rows[v] * one;
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Floats score = masked(sums[i][v], key + i, at + v * kLanes);
        most[v] = Math::largest(score, most[v]);
        std::memcpy(scores_ + (key + i) * width_ + at + v * kLanes, &score, sizeof(score));
      }
    }
  }

  // A vector of scores with its bias and its mask.
  Floats masked(Floats score, int64_t key, int64_t row) const {
    const int64_t left = std::max<int64_t>(0, std::min<int64_t>(kLanes, count_ - row));
    if (given_.bias.data) {
      const float* from = given_.bias.data + key * given_.bias.line;
      if (given_.bias.place) score += L::load(from + first_ + row, left);
      else score += *from;
    }
    if (given_.mask.data) {
      const uint8_t* from = given_.mask.data + key * given_.mask.line;
      if (given_.mask.place) {
        const auto bytes = L::bytes(reinterpret_cast<const int8_t*>(from + first_ + row), left);
        score = L::ints(bytes) != 0 ? score : Floats{} + a_.fill;
      } else if (!*from) {
        score = Floats{} + a_.fill;
      }
    }
    return score;
  }

  static constexpr int kTogether = 8;  // rows whose results are summed at once

  // The results of rows from `row`: their weights times the values.
  void values(int64_t row) {
    constexpr int kVectors = L::sums_of(kTogether);
    int64_t place = 0;
    for (; place + kVectors * kLanes <= a_.values; place += kVectors * kLanes)
      tile<kVectors, false>(row, place);
    for (; place + kLanes <= a_.values; place += kLanes) tile<1, false>(row, place);
    if (place < a_.values) tile<1, true>(row, place);
  }

  template <int kVectors, bool kPart>
  void tile(int64_t row, int64_t place) {
    const int64_t rest = a_.values - place;
    Floats sums[kTogether][kVectors] = {};
    const float* v = given_.v.data + place;
    const float* weights = scores_ + row;
    for (int64_t key = 0; key < a_.keys; ++key, v += given_.v.line, weights += width_) {
      Floats numbers[kVectors];
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n)
        numbers[n] = kPart ? L::load(v, rest) : L::load(v + n * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kTogether; ++r) {
#pragma GCC unroll 4
        for (int n = 0; n < kVectors; ++n) sums[r][n] += numbers[n] * weights[r];
      }
    }
    // Rows behind the last one are those of the padding.
    const int64_t count = std::min<int64_t>(kTogether, count_ - row);
    for (int64_t r = 0; r < count; ++r) {
      float* to = given_.out.data + (first_ + row + r) * given_.out.line;
      for (int n = 0; n < kVectors; ++n) {
        const Floats result = sums[r][n] * inverses_[row + r];
        const int64_t lanes = kPart ? rest : kLanes;
        if (given_.out.place == 1) {
          std::memcpy(to + place + n * kLanes, &result, lanes * sizeof(float));
        } else {
          for (int64_t i = 0; i < lanes; ++i)
            to[(place + n * kLanes + i) * given_.out.place] = result[i];
        }
      }
    }
  }

  const Attention& a_;
  AttentionOperands<float> given_;
  const int64_t first_, count_, width_;
  float* const queries_;
  float* const scores_;
  float* const values_;
  float inverses_[kAttentionRows];
};

}  // namespace jaxquant
