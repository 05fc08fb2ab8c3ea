// Copies of the input that a kernel reads: u8, with the zero point where the window leaves it.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "shape.h"

namespace jaxquant {

// Memory of one thread, kept between calls: it grows to the most that a task takes.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  uint8_t* reserve(size_t bytes) {
    bytes = round_up(bytes + kSlack, 64);
    if (bytes > size_) {
      std::free(data_);
      data_ = static_cast<uint8_t*>(std::aligned_alloc(64, bytes));
      size_ = data_ ? bytes : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_;
  }
  // Gives back what is larger than `most`.
  void trim(size_t most) {
    if (size_ <= most) return;
    std::free(data_);
    data_ = nullptr, size_ = 0;
  }
  static Scratch& of_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }

 private:
  static constexpr size_t kSlack = 512;  // kernels read past the last pixel, times weights of zero
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Activations as a kernel reads them.
struct Activations {
  const uint8_t* data;
  uint8_t flip;        // what a copy changes: 0x80 makes u8 of int8, and int8 of u8
  uint8_t fill;        // the zero point, as stored in the copy
  int32_t zero_point;  // what the sums of the weights are multiplied by and taken away
  bool is_signed;
  int64_t width = 1;   // bytes of a value in the copy

  // Kernels that multiply u8 by s8 read an int8 tensor as q + 128, and uint8 as it is.
  static Activations as_u8(const void* data, bool is_int8, int32_t zero_point,
                           int32_t subtracted) {
    return {static_cast<const uint8_t*>(data), uint8_t(is_int8 ? 0x80 : 0),
            uint8_t(zero_point + 128), subtracted + 128, false};
  }
  // Kernels that multiply s8 by s8 read an int8 tensor as it is, and uint8 as q.
  static Activations as_s8(const void* data, bool is_int8, int32_t zero_point,
                           int32_t subtracted) {
    return {static_cast<const uint8_t*>(data), uint8_t(is_int8 ? 0 : 0x80), uint8_t(zero_point),
            subtracted, true};
  }
  // Kernels that multiply both read either as it is stored.
  static Activations as_stored(const void* data, bool is_int8, int32_t zero_point,
                               int32_t subtracted) {
    return is_int8 ? as_s8(data, true, zero_point, subtracted)
                   : as_u8(data, false, zero_point, subtracted);
  }
  // Kernels that multiply int16 read a copy in which every q is one.
  static Activations as_s16(const void* data, bool is_int8, int32_t zero_point,
                            int32_t subtracted) {
    Activations x = as_s8(data, is_int8, zero_point, subtracted);
    x.width = 2;
    return x;
  }

  // Whether a kernel cannot read the tensor where it is.
  bool only_copied() const { return flip || width > 1; }

  void copy(uint8_t* to, const uint8_t* from, int64_t n) const {
    if (width > 1) {
      int16_t* wide = reinterpret_cast<int16_t*>(to);
      for (int64_t i = 0; i < n; ++i) wide[i] = int8_t(from[i] ^ flip);
    } else if (flip) {
      for (int64_t i = 0; i < n; ++i) to[i] = from[i] ^ 0x80;
    } else {
      std::memcpy(to, from, n);
    }
  }
  // The zero point, `n` times.
  void pad(uint8_t* to, int64_t n) const {
    if (width > 1) std::fill_n(reinterpret_cast<int16_t*>(to), n, int16_t(int8_t(fill)));
    else std::memset(to, fill, n);
  }
};

// The input rows of the output rows [first, last), channels [c0, c0 + nc), padded on all sides:
// [rows][columns][nc].  Returns the number of columns.
inline int64_t copy_window(const Activations& x, const ConvShape& s, int64_t image, int64_t first,
                           int64_t last, int64_t c0, int64_t nc, uint8_t* to) {
  const int64_t columns = (s.ow - 1) * s.stride_w + (s.kw - 1) * s.dilation_w + 1;
  const int64_t rows = (last - 1 - first) * s.stride_h + (s.kh - 1) * s.dilation_h + 1;
  const int64_t left = std::min(std::max<int64_t>(s.pad_w, 0), columns);
  const int64_t right = std::max<int64_t>(left, std::min(columns, s.pad_w + s.w));
  const int64_t pixel = nc * x.width;
  for (int64_t r = 0; r < rows; ++r, to += columns * pixel) {
    const int64_t row = first * s.stride_h - s.pad_h + r;
    if (row < 0 || row >= s.h) {
      x.pad(to, columns * nc);
      continue;
    }
    const uint8_t* from = x.data + ((image * s.h + row) * s.w + left - s.pad_w) * s.c + c0;
    x.pad(to, left * nc);
    if (nc == s.c) {
      x.copy(to + left * pixel, from, (right - left) * nc);
    } else {
      for (int64_t k = left; k < right; ++k) x.copy(to + k * pixel, from + (k - left) * s.c, nc);
    }
    x.pad(to + right * pixel, (columns - right) * nc);
  }
  return columns;
}

// The same for a window of one element: only the pixels that it reads, [rows][ow][padded] values.
inline void copy_pixels(const Activations& x, const ConvShape& s, int64_t image, int64_t first,
                        int64_t last, int64_t c0, int64_t nc, int64_t padded, uint8_t* to) {
  for (int64_t i = first; i < last; ++i) {
    const int64_t row = i * s.stride_h - s.pad_h;
    for (int64_t j = 0; j < s.ow; ++j, to += padded * x.width) {
      const int64_t column = j * s.stride_w - s.pad_w;
      if (row < 0 || row >= s.h || column < 0 || column >= s.w) {
        x.pad(to, padded);
      } else {
        x.copy(to, x.data + ((image * s.h + row) * s.w + column) * s.c + c0, nc);
      }
    }
  }
}

}  // namespace jaxquant
