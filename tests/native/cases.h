// Random convolutions with their operands, and plain loops that say what kernels have to give.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "convolve.h"
#include "pack.h"

namespace jaxquant {
namespace {

int failures = 0;

void check(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("differs: %s\n", what.c_str());
}

// Memory as XLA gives it: aligned to a cache line.
template <class T>
class Array {
 public:
  explicit Array(int64_t size) : size_(size) {
    const size_t bytes = size * sizeof(T);
    void* data = nullptr;
    if (posix_memalign(&data, 64, std::max<size_t>(bytes, 1))) throw std::bad_alloc();
    data_.reset(static_cast<T*>(data));
    std::memset(data, 0, bytes);
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_.get()[i]; }
  const T& operator[](int64_t i) const { return data_.get()[i]; }
  bool operator==(const Array& other) const {
    return std::memcmp(data(), other.data(), size_ * sizeof(T)) == 0;
  }

 private:
  struct Free {
    void operator()(T* data) const { std::free(data); }
  };
  int64_t size_;
  std::unique_ptr<T, Free> data_;
};

// A pool of threads that start when they are asked for, so that helpers come late, too.
class StartedThreads : public Pool {
 public:
  ~StartedThreads() override {
    for (std::thread& thread : threads_) thread.join();
  }
  int64_t count() override { return 3; }

 private:
  void schedule(std::function<void()> task) override { threads_.emplace_back(std::move(task)); }
  std::vector<std::thread> threads_;
};

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  int64_t from(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(engine_);
  }
  int64_t of(std::initializer_list<int64_t> values) {
    return values.begin()[from(0, int64_t(values.size()) - 1)];
  }
  float real(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(engine_);
  }
  Array<int8_t> bytes(int64_t size) {
    Array<int8_t> made(size);
    for (int64_t i = 0; i < size; ++i) made[i] = int8_t(from(-128, 127));
    return made;
  }
  Array<float> reals(int64_t size, float low, float high) {
    Array<float> made(size);
    for (int64_t i = 0; i < size; ++i) made[i] = real(low, high);
    return made;
  }

 private:
  std::mt19937 engine_;
};

ConvShape random_shape(Random& random) {
  ConvShape s{};
  const int64_t kind = random.from(0, 2);
  s.groups = kind == 0 ? 1 : kind == 1 ? random.from(2, 3) : random.of({2, 8, 16, 33, 64, 70});
  s.c = s.groups * (kind == 2 ? 1 : random.of({1, 3, 4, 16, 17, 64, 70}));
  s.o = s.groups * (kind == 2 ? 1 : random.of({1, 5, 16, 17, 33, 64, 130}));
  s.n = random.from(1, 3);
  s.kh = random.of({1, 1, 3, 5}), s.kw = random.of({1, 1, 3, 4});
  s.stride_h = random.from(1, 2), s.stride_w = random.from(1, 2);
  s.dilation_h = random.from(1, 2), s.dilation_w = random.from(1, 2);
  s.pad_h = random.from(0, 2), s.pad_w = random.from(0, 2);
  s.h = random.from((s.kh - 1) * s.dilation_h + 1, 12);
  s.w = random.from((s.kw - 1) * s.dilation_w + 1, 20);
  s.oh = (s.h + 2 * s.pad_h - (s.kh - 1) * s.dilation_h - 1) / s.stride_h + 1;
  s.ow = (s.w + 2 * s.pad_w - (s.kw - 1) * s.dilation_w - 1) / s.stride_w + 1;
  return s;
}

// Those that take a way of their own: segments that run on over rows; a stride, of pixels that are
// copied; pixels that are not; several pixels in a vector; taps that fill no vector.
std::vector<ConvShape> known_shapes() {
  const auto square = [](int64_t size, int64_t c, int64_t o, int64_t window, int64_t stride,
                         int64_t pad, int64_t groups) {
    const int64_t out = (size + 2 * pad - window) / stride + 1;
    return ConvShape{1, size, size, c, out, out, o, window, window, stride, stride, 1, 1, pad, pad,
                     groups};
  };
  return {square(7, 64, 33, 3, 1, 1, 1), square(9, 17, 40, 1, 2, 0, 1),
          square(6, 64, 48, 1, 1, 0, 1), square(9, 16, 16, 3, 1, 1, 16),
          square(9, 66, 66, 5, 2, 2, 66)};
}

std::string describe(const ConvShape& s) {
  std::string text = "convolution";
  for (int64_t value : {s.n, s.h, s.w, s.c, s.oh, s.ow, s.o, s.kh, s.kw, s.stride_h, s.stride_w,
                        s.dilation_h, s.dilation_w, s.pad_h, s.pad_w, s.groups})
    text += " " + std::to_string(value);
  return text;
}

Array<int8_t> packed(const ConvShape& s, const Array<int8_t>& kernel) {
  Array<int8_t> to(packed_size(s));
  Alone alone;
  if (s.depthwise()) {
    pack_depthwise(kernel.data(), {s.c, s.kh * s.kw}, to.data());
  } else {
    const int64_t runs = s.row_runs() ? s.kh : s.kh * s.kw;
    pack_matrix(alone, kernel.data(), runs, s.kh * s.kw * s.group_in() / runs, packed_matrix(s),
                to.data());
  }
  return to;
}

// One convolution with an epilogue of some form, its operands and what plain loops make of it.
struct Case {
  ConvShape s;
  Array<int8_t> x, kernel, weights, residual_q;
  Array<float> multiplier, bias, residual_f;
  Input input;
  Epilogue epilogue;

  Case(Random& random, const ConvShape& shape)
      : s(shape), x(random.bytes(s.n * s.h * s.w * s.c)),
        kernel(random.bytes(s.kh * s.kw * s.group_in() * s.o)), weights(packed(s, kernel)),
        residual_q(random.bytes(outputs())), multiplier(random.reals(s.o, 1e-4f, 1e-3f)),
        bias(random.reals(s.o, -20.0f, 20.0f)), residual_f(random.reals(outputs(), -9.0f, 9.0f)) {
    const bool is_int8 = random.from(0, 3) > 0;
    const int32_t zero_point = int32_t(random.from(-128, 127));
    input = {x.data(), is_int8, zero_point, random.from(0, 1) ? zero_point : 0};
    Epilogue& e = epilogue;
    e.multiplier = multiplier.data();
    if (random.from(0, 1)) e.bias = bias.data();
    e.inv_scale = random.real(0.5f, 3.0f);
    e.zero_point = int32_t(random.from(-128, 127));
    const int64_t residual = random.from(0, 3);
    if (residual == 1) e.residual_f = residual_f.data();
    if (residual == 2) {
      e.residual_q = residual_q.data();
      e.residual_scale = 0.125f, e.residual_zero_point = int32_t(random.from(-128, 127));
    }
    // The forms that a kernel may have apart, and a channel that is out of their range.
    if (random.from(0, 4) == 0) multiplier[0] = 0.9f;
    const float low = random.of({0, 1}) ? 0.0f : -kInfinity;
    const float high = random.of({0, 1}) ? 60.0f : kInfinity;
    const bool is_open = residual > 0 && random.from(0, 1);
    e.set_clamps({is_open ? -kInfinity : low, is_open ? kInfinity : high, low, high}, residual > 0);
  }

  int64_t outputs() const { return s.n * s.oh * s.ow * s.o; }

  // x, or its zero point outside, less what the sums take away.
  int64_t read(int64_t image, int64_t row, int64_t column, int64_t channel) const {
    const bool inside = row >= 0 && row < s.h && column >= 0 && column < s.w;
    int64_t value = input.zero_point;
    if (inside) {
      const int8_t byte = x[((image * s.h + row) * s.w + column) * s.c + channel];
      value = input.is_int8 ? int64_t(byte) : int64_t(uint8_t(byte)) - 128;
    }
    return value - input.subtracted;
  }

  // The results of plain loops.
  void expect(Array<float>& floats, Array<int8_t>& integers) const {
    int64_t at = 0;
    for (int64_t image = 0; image < s.n; ++image)
      for (int64_t i = 0; i < s.oh; ++i)
        for (int64_t j = 0; j < s.ow; ++j)
          for (int64_t o = 0; o < s.o; ++o, ++at) {
            floats[at] = finished(sum(image, i, j, o), o, at);
            const double scaled = double(floats[at] * epilogue.inv_scale);
            const double whole = std::nearbyint(scaled) + epilogue.zero_point;
            integers[at] = int8_t(std::min(127.0, std::max(-128.0, whole)));
          }
  }

  int64_t sum(int64_t image, int64_t i, int64_t j, int64_t o) const {
    int64_t total = 0;
    const int64_t first = o / s.group_out() * s.group_in();
    for (int64_t a = 0; a < s.kh; ++a)
      for (int64_t b = 0; b < s.kw; ++b)
        for (int64_t c = 0; c < s.group_in(); ++c)
          total += read(image, i * s.stride_h + a * s.dilation_h - s.pad_h,
                        j * s.stride_w + b * s.dilation_w - s.pad_w, first + c) *
                   kernel[((a * s.kw + b) * s.group_in() + c) * s.o + o];
    return total;
  }

  float finished(int64_t total, int64_t o, int64_t at) const {
    const Epilogue& e = epilogue;
    float y = std::fma(float(total), e.multiplier[o], e.bias ? e.bias[o] : 0.0f);
    y = std::min(std::max(y, e.low), e.high);
    if (e.residual_q)
      y = std::fma(float(e.residual_q[at] - e.residual_zero_point), e.residual_scale, y);
    if (e.residual_f) y += e.residual_f[at];
    return std::min(std::max(y, e.low_after), e.high_after);
  }
};

}  // namespace
}  // namespace jaxquant
