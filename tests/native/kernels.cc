// Tests of the kernels without XLA: every instruction set against plain loops, bit for bit.
//
//   kernels CASES    some known convolutions and so many random ones, by each instruction set, alone
//                    and on threads; products with stored weights, by long vectors and by short ones
//
// Prints what differs, and ends with 1 if anything does.  All memory is of the size that it must
// have, so that the address sanitizer sees what is read or written beside it.
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#include "amx_emulation.h"
#endif
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "cases.h"
#include "histogram.h"
#include "panels.h"
#include "sequence.h"

namespace jaxquant {
namespace {

// A case with the results that are expected of it.
struct Expected {
  const Case& given;
  Array<float> floats;
  Array<int8_t> integers;

  explicit Expected(const Case& given)
      : given(given), floats(given.outputs()), integers(given.outputs()) {
    given.expect(floats, integers);
  }

  template <class Set>
  void check_by(Threads& threads, const std::string& where) const {
    const ConvShape& s = given.s;
    Array<float> found_floats(given.outputs());
    Array<int8_t> beside_floats(given.outputs()), alone(given.outputs());
    Epilogue both = given.epilogue, one = given.epilogue;
    both.write_floats(found_floats.data(), kStreamedBytes, s.o);  // past the caches if it can be
    both.out_q = beside_floats.data(), one.out_q = alone.data();
    convolve_by<Set>(threads, given.input, s, given.weights.data(), both);
    convolve_by<Set>(threads, given.input, s, given.weights.data(), one);
    const std::string what = std::string(Set::kName) + where + ", " + describe(s);
    check(found_floats == floats, what + ", floats");
    check(beside_floats == integers, what + ", integers beside floats");
    check(alone == integers, what + ", integers");
  }

  template <class Set>
  void check_everywhere() const {
    Alone alone;
    check_by<Set>(alone, "");
    StartedThreads threads;
    check_by<Set>(threads, " on threads");
  }
};

// Three steps, the last of which adds what the first gives; together as one by one.
void check_sequence(Random& random, int64_t n) {
  ConvShape s{};
  s.n = n, s.h = s.w = s.oh = s.ow = 9, s.c = s.o = 32;
  s.kh = s.kw = 3, s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
  s.pad_h = s.pad_w = 1, s.groups = 1;
  ConvShape depthwise = s;
  depthwise.groups = 32;
  std::vector<Case> cases;
  for (const ConvShape& shape : {s, depthwise, s}) {
    cases.emplace_back(random, shape);
    cases.back().input.is_int8 = true;
    cases.back().epilogue.residual_f = nullptr, cases.back().epilogue.residual_q = nullptr;
  }
  const int64_t size = cases[0].outputs();
  Array<int8_t> first(size), second(size), wanted(size), given(size);
  Alone alone;
  const int8_t* reads = cases[0].x.data();
  Array<int8_t>* writes[] = {&first, &second, &wanted};
  std::vector<Step> steps;
  for (int64_t i = 0; i < 3; ++i) {
    const Case& each = cases[i];
    Step step{};
    step.shape = each.s, step.shape.n = 1;
    step.packed = each.weights.data(), step.epilogue = each.epilogue;
    step.is_int8 = true, step.subtracted = each.input.subtracted;
    step.zero_point = each.input.zero_point;
    step.x = i, step.residual_f = kNone, step.residual_q = i == 2 ? 1 : kNone;
    step.out_f = kNone, step.out_q = i + 1;
    steps.push_back(step);
    Epilogue epilogue = each.epilogue;
    epilogue.residual_q = i == 2 ? first.data() : nullptr, epilogue.out_q = writes[i]->data();
    Input input = each.input;
    input.data = reads;
    convolve(alone, input, each.s, each.weights.data(), epilogue);
    reads = writes[i]->data();
  }
  std::vector<Tensor> tensors(4);
  for (Tensor& tensor : tensors) tensor.bytes = size / n;
  tensors[0].given = reinterpret_cast<uint8_t*>(cases[0].x.data());
  tensors[3].given = reinterpret_cast<uint8_t*>(given.data());
  StartedThreads threads;
  {
    Team team(threads);
    Sequence(steps, tensors, n).run(team);
  }
  check(given == wanted, "a sequence of " + std::to_string(n) + " samples");
}

void check_dot(Random& random, int64_t rows, int64_t inputs, int64_t columns) {
  ConvShape s{};  // a dot is a convolution of one tap
  s.n = s.h = s.oh = s.kh = s.kw = s.groups = 1;
  s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
  s.w = s.ow = rows, s.c = inputs, s.o = columns;
  Case given(random, s);
  const Expected expected(given);
  Array<int8_t> found(given.outputs());
  given.epilogue.out_q = found.data();
  StartedThreads threads;
  multiply(threads, given.input, rows, inputs, columns, given.weights.data(), given.epilogue);
  check(found == expected.integers, "a dot of " + std::to_string(rows) + " rows");
}

template <class T>
Array<T> repeated(const Array<T>& array, int64_t times) {
  Array<T> copies(times * array.size());
  for (int64_t i = 0; i < copies.size(); ++i) copies[i] = array[i % array.size()];
  return copies;
}

// Groups that have the same weights give what one dot does.
void check_groups(Random& random, int64_t products, int64_t rows, bool own) {
  ConvShape s{};
  s.n = s.h = s.oh = s.kh = s.kw = s.groups = 1;
  s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
  s.w = s.ow = products * rows, s.c = 37, s.o = 50;
  Case given(random, s);
  const Expected expected(given);
  const int64_t groups = 3, sets = own ? products : 1;
  std::vector<int32_t> ends;
  for (int64_t p = 0; p < products; ++p) {
    const int32_t first = int32_t(random.from(0, rows));
    ends.insert(ends.end(), {first, int32_t(random.from(first, rows)), int32_t(rows)});
  }
  const auto weights = repeated(given.weights, sets * groups);
  const auto multiplier = repeated(given.multiplier, sets * groups);
  const auto bias = repeated(given.bias, sets * groups);
  Array<int8_t> found(given.outputs());
  given.epilogue.out_q = found.data(), given.epilogue.multiplier = multiplier.data();
  if (given.epilogue.bias) given.epilogue.bias = bias.data();
  StartedThreads threads;
  multiply_groups(threads, given.input,
                  {products, rows, s.c, s.o, groups, ends.data(), own, weights.data()},
                  given.epilogue);
  check(found == expected.integers, "groups of " + std::to_string(rows) + " rows");
}

// Numbers as the scales of a stored matrix: floats, or the upper halves of some.
template <class S>
Array<S> scales_of(const Array<float>& values) {
  Array<S> found(values.size());
  for (int64_t i = 0; i < int64_t(values.size()); ++i) {
    uint32_t word;
    std::memcpy(&word, &values[i], sizeof(word));
    if constexpr (std::is_same_v<S, float>) found[i] = values[i];
    else found[i] = uint16_t(word >> 16);
  }
  return found;
}

// Rows times stored integers: floats within the rounding of so many sums, and int32.  S: of scales.
template <class V, class S>
void check_stored(Random& random, int64_t rows, int64_t length, int64_t columns, int64_t size,
                  bool sums_first, bool packed) {
  Stored<S> s{rows, length, columns, size, sums_first, packed, nullptr, nullptr, nullptr, nullptr};
  const Array<int8_t> weights = random.bytes(s.bytes() * columns);
  const Array<int8_t> x = random.bytes(rows * length);
  const auto scale = scales_of<S>(random.reals(s.groups() * columns, 0.1f, 1.0f));
  s.weights = weights.data(), s.scale = scale.data();
  const Array<float> values = random.reals(16, -2.0f, 2.0f);
  if (packed && columns % 2) s.codes = values.data();
  Array<float> found(rows * columns), beside(found.size());
  Array<int32_t> whole(rows * columns);
  StartedThreads threads;
  const auto to_float = [](int8_t q) { return float(q); };
  Stored<S> other = s;
  s.out = found.data(), other.out = beside.data();
  multiply_any<V>(threads, std::vector{other, s}, x.data(), to_float);
  const Stored<float> integers{rows,   length,         columns, size,         sums_first,
                               packed, weights.data(), nullptr, whole.data(), nullptr};
  if (!packed) multiply_any<V>(threads, std::vector{integers}, x.data(), to_float);
  check(found == beside, "two of the same stored weights side by side");

  bool are_near = true, are_same = true;
  for (int64_t i = 0; i < rows * columns; ++i) {
    const int64_t row = i / columns, column = i % columns;
    double sum = 0, size_of_sum = 0;
    int64_t integer = 0;
    for (int64_t k = 0; k < length; ++k) {
      const int64_t at = packed ? k / 2 : k;
      const int8_t byte = weights[sums_first ? at * columns + column : column * s.bytes() + at];
      const int half = k % 2 ? (byte >> 4) & 15 : byte & 15;
      const float q = !packed ? byte : s.codes ? values[half] : half < 8 ? half : half - 16;
      const int64_t group = k / size;
      const double unit =
          V::number(scale[sums_first ? group * columns + column : column * s.groups() + group]);
      sum += x[row * length + k] * q * unit;
      size_of_sum += std::fabs(x[row * length + k] * q * unit);
      integer += x[row * length + k] * int(q);
    }
    are_near &= std::fabs(found[i] - sum) <= 6e-8 * double(length + 2) * size_of_sum;
    are_same &= packed || whole[i] == integer;
  }
  const std::string what = std::to_string(rows) + " rows, " + std::to_string(length) + " products, " +
                           std::to_string(columns) + " columns, groups of " + std::to_string(size) +
                           (sums_first ? ", sums first" : "") + (packed ? ", packed" : "");
  check(are_near, "the floats of " + what);
  check(are_same, "the integers of " + what);
}

template <class V, class S>
void check_stored_of(Random& random) {
  for (bool sums_first : {true, false}) {
    for (bool packed : {true, false}) {
      for (int64_t rows : {1, 3, 9})
        check_stored<V, S>(random, rows, 67, 29, 67, sums_first, packed);
      check_stored<V, S>(random, 1, 97, 330, 32, sums_first, packed);
      check_stored<V, S>(random, 15, 130, 70, 64, sums_first, packed);
      check_stored<V, S>(random, 23, 131, 150, 64, sums_first, packed);
    }
  }
  check_stored<V, S>(random, 2, 2100, 5, 2100, true, false);
  check_stored<V, S>(random, 2, 2100, 5, 2100, false, false);
}

void check_histogram(Random& random, int64_t n) {
  const Array<float> x = random.reals(n, -3.0f, 3.5f);
  uint32_t counts[kBins];
  float extremes[2];
  StartedThreads threads;
  histogram(threads, x.data(), n, -20, counts, extremes);
  std::vector<uint32_t> wanted(kBins, 0);
  for (int64_t i = 0; i < n; ++i) ++wanted[int64_t(std::fabs(x[i]) * (float(kBins) / 4.0f))];
  check(std::equal(wanted.begin(), wanted.end(), counts), "the counts of a histogram");
  check(extremes[0] == *std::min_element(x.data(), x.data() + n) &&
            extremes[1] == *std::max_element(x.data(), x.data() + n),
        "the extremes of a histogram");
}

}  // namespace
}  // namespace jaxquant

int main(int, char** arguments) {
  using namespace jaxquant;
  const int64_t cases = std::atoll(arguments[1]);
  Random random(1);
  std::vector<ConvShape> shapes = known_shapes();
  for (int64_t i = 0; i < cases; ++i) shapes.push_back(random_shape(random));
  for (const ConvShape& shape : shapes) {
    const Case given(random, shape);
    const Expected expected(given);
    expected.check_everywhere<Portable>();
#ifdef JAXQUANT_AVX2
    expected.check_everywhere<Avx2>();
#endif
#ifdef JAXQUANT_AVX_VNNI
    expected.check_everywhere<AvxVnni>();
#endif
#ifdef JAXQUANT_NEON
    expected.check_everywhere<Neon>();
#endif
#ifdef JAXQUANT_NEON_MATRICES
    expected.check_everywhere<NeonMatrices>();
#endif
#ifdef JAXQUANT_AVX512
    expected.check_everywhere<Avx512Words>();
#endif
#ifdef JAXQUANT_AVX512_VNNI
    expected.check_everywhere<Avx512>();
#endif
#ifdef JAXQUANT_AMX
    expected.check_everywhere<Amx>();
#endif
  }
  for (int64_t rows : {1, 2, 15, 40}) check_dot(random, rows, 3 + 30 * rows, 16 + 7 * rows);
  for (int64_t rows : {1, 2, 40}) {
    check_groups(random, 1, rows, false);
    check_groups(random, 3, rows, true);
  }
  for (int64_t n : {1, 2, 7}) check_sequence(random, n);
  check_stored_of<VectorsHere, float>(random);
  check_stored_of<VectorsHere, uint16_t>(random);
  check_stored_of<Vectors<4, 16>, float>(random);
  check_histogram(random, 70000);
  return failures != 0;
}
