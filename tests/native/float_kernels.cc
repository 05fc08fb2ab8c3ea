// Tests of the kernels of floats without XLA, by vectors of every length, against plain loops.
//
// Prints what differs, and ends with 1 if anything does.  Vectors of C++ are of the size that they
// must have, so that the address sanitizer sees what is read or written beside them.
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "attention.h"
#include "rows.h"

namespace jaxquant {
namespace {

int failures = 0;
std::mt19937 generator(0);

void check(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("differs: %s\n", what.c_str());
}

std::vector<float> numbers(int64_t size, float scale = 1.0f) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> made(size);
  for (auto& each : made) each = normal(generator);
  return made;
}

// Where a matrix [lines, places] lies: its places side by side, or its lines.
struct Order {
  int64_t line, place;
  Order(int64_t lines, int64_t places, bool turned)
      : line(turned ? 1 : places), place(turned ? lines : 1) {}
  template <class T>
  Strided<T> of(T* data) const { return {data, line, place}; }
  int64_t at(int64_t l, int64_t p) const { return l * line + p * place; }
};

template <class L>
void test_attention(int64_t rows, int64_t keys, int64_t depth, int64_t values, bool turned,
                    bool has_bias, bool has_mask) {
  const Attention a{rows, keys, depth, values, 0.3f, -1e9f};
  const Order q_at(rows, depth, turned), k_at(keys, depth, turned), v_at(keys, values, turned);
  const Order out_at(rows, values, turned), beside_at(keys, rows, false);
  const auto q = numbers(rows * depth), k = numbers(keys * depth), v = numbers(keys * values);
  const auto bias = numbers(keys * rows);
  std::vector<uint8_t> mask(keys * rows);
  for (auto& each : mask) each = generator() % 3 != 0;
  std::vector<float> out(rows * values, NAN);

  AttentionOperands<float> given{q_at.of(q.data()), k_at.of(k.data()), v_at.of(v.data()), {}, {},
                                 out_at.of(out.data())};
  if (has_bias) given.bias = beside_at.of(bias.data());
  if (has_mask) given.mask = beside_at.of(static_cast<const uint8_t*>(mask.data()));
  Alone alone;
  attention<L, float>(alone, a, 1, [&](int64_t) { return given; });

  double worst = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<double> weights(keys);
    double most = -INFINITY, total = 0.0;
    for (int64_t key = 0; key < keys; ++key) {
      double score = 0.0;
      for (int64_t d = 0; d < depth; ++d) score += double(q[q_at.at(r, d)]) * k[k_at.at(key, d)];
      score *= a.scale;
      if (has_bias) score += bias[key * rows + r];
      if (has_mask && !mask[key * rows + r]) score = a.fill;
      weights[key] = score, most = std::max(most, score);
    }
    for (auto& each : weights) total += each = std::exp(each - most);
    for (int64_t place = 0; place < values; ++place) {
      double sum = 0.0;
      for (int64_t key = 0; key < keys; ++key) sum += weights[key] * v[v_at.at(key, place)];
      const double error = std::abs(out[out_at.at(r, place)] - sum / total);
      worst = std::isnan(error) ? INFINITY : std::max(worst, error);
    }
  }
  check(worst < 1e-5, "attention of " + std::to_string(L::kCount) + " lanes, " +
                          std::to_string(rows) + " rows, " + std::to_string(keys) + " keys");
}

template <class L>
void test_rows(int64_t size) {
  const auto x = numbers(size, 3.0f);
  std::vector<float> y(size);
  std::vector<int8_t> q(size);
  Alone alone;
  for (const bool by_tanh : {false, true}) {
    gelu<L>(alone, x.data(), size, by_tanh, y.data());
    gelu<L>(alone, x.data(), size, by_tanh, 9.0f, -100, q.data());
    for (int64_t i = 0; i < size; ++i) {
      const double each = x[i], root = std::sqrt(2 / std::acos(-1.0));
      const double part = by_tanh ? 1 + std::tanh(root * (each + 0.044715 * each * each * each))
                                  : std::erfc(-each / std::sqrt(2.0));
      check(std::abs(y[i] - 0.5 * each * part) < 2e-6, "gelu of " + std::to_string(each));
      const float rounded = std::nearbyint(y[i] * 9.0f) - 100;
      check(q[i] == int8_t(std::min(127.0f, std::max(-128.0f, rounded))), "gelu in int8");
    }
  }
  const auto scale = numbers(size), bias = numbers(size);
  for (const bool has_vectors : {false, true}) {
    const LayerNorm norm{size, 1e-5f, has_vectors ? scale.data() : nullptr,
                         has_vectors ? bias.data() : nullptr};
    layer_norm<L>(alone, norm, x.data(), 1, y.data());
    double mean = 0.0, variance = 0.0;
    for (const float each : x) mean += each / double(size);
    for (const float each : x) variance += (each - mean) * (each - mean) / double(size);
    for (int64_t i = 0; i < size; ++i) {
      double each = (x[i] - mean) / std::sqrt(variance + 1e-5);
      if (has_vectors) each = each * scale[i] + bias[i];
      check(std::abs(y[i] - each) < 1e-4, "layer norm of " + std::to_string(size));
    }
  }
}

template <class L>
void test_all() {
  for (const int64_t rows : {1, 3, 8, 17, 64, 65, 130})
    test_attention<L>(rows, 1 + rows % 20, 5, 1 + rows, rows % 2, rows % 3 == 0, rows % 4 != 0);
  test_attention<L>(48, 37, 32, 64, false, false, true);
  for (const bool turned : {false, true}) {
    test_attention<L>(1, 70, 64, 64, turned, false, true);
    test_attention<L>(2, 19, 21, 75, turned, true, false);
    test_attention<L>(7, 128, 33, 16, turned, true, true);
  }
  for (const int64_t size : {1, 7, 16, 100, 9000}) test_rows<L>(size);
}

}  // namespace
}  // namespace jaxquant

int main() {
  using namespace jaxquant;
  test_all<Vectors<4, 16>>();
  test_all<Vectors<4, 32>>();
  test_all<Vectors<8, 16>>();
  test_all<VectorsHere>();
  return failures != 0;
}
