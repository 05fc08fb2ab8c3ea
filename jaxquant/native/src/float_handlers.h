// The XLA FFI handlers of operations of floats that whole models run.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "rows.h"
#include "xla.h"

namespace jaxquant {

using FloatBuffer = ffi::Buffer<ffi::F32>;

// Floats, or int8 where an inverse scale and a zero point are given.
inline ffi::Error gelu_handler(ffi::ThreadPool pool, FloatBuffer x, ffi::RemainingArgs grid,
                               ffi::Result<ffi::AnyBuffer> out, int64_t by_tanh) {
  const int64_t size = int64_t(x.element_count());
  if (int64_t(out->element_count()) != size) return invalid("wrong shapes");
  XlaThreads threads(pool, time_of_floats(size * 20));
  if (out->element_type() == ffi::F32) {
    return with_memory([&] {
      gelu<VectorsHere>(threads, x.typed_data(), size, by_tanh != 0, out->typed_data<float>());
    });
  }
  const auto inv_scale = grid.get<ffi::BufferR0<ffi::F32>>(0);
  const auto zero_point = grid.get<ffi::BufferR0<ffi::S32>>(1);
  if (!inv_scale.has_value() || !zero_point.has_value() || out->element_type() != ffi::S8)
    return invalid("int8 needs a scale and a zero point");
  return with_memory([&] {
    gelu<VectorsHere>(threads, x.typed_data(), size, by_tanh != 0, *inv_scale->typed_data(),
                      *zero_point->typed_data(), out->typed_data<int8_t>());
  });
}

// x [..., C]; scale and bias [C], or empty where there is none.
inline ffi::Error layer_norm_handler(ffi::ThreadPool pool, FloatBuffer x, FloatBuffer scale,
                                     FloatBuffer bias, ffi::Result<FloatBuffer> out,
                                     float epsilon) {
  const auto in = x.dimensions();
  const int64_t size = int64_t(x.element_count()), columns = in.size() ? in.back() : 0;
  const auto fits = [&](const FloatBuffer& vector) {
    return vector.element_count() == 0 || int64_t(vector.element_count()) == columns;
  };
  if (int64_t(out->element_count()) != size || !fits(scale) || !fits(bias))
    return invalid("wrong shapes");
  if (size == 0) return ffi::Error::Success();
  const auto numbers = [](const FloatBuffer& vector) {
    return vector.element_count() ? vector.typed_data() : nullptr;
  };
  XlaThreads threads(pool, time_of_floats(size * 24));
  return with_memory([&] {
    layer_norm<VectorsHere>(threads, {columns, epsilon, numbers(scale), numbers(bias)},
                            x.typed_data(), size / columns, out->typed_data());
  });
}

// x [..., K] in int8 on one grid, and a mark for each row.  Of inverse scales there is one, or one
// for each channel, all of which a row has some times.
inline ffi::Error quantize_handler(ffi::ThreadPool pool, FloatBuffer x, FloatBuffer inv_scale,
                                   ffi::Buffer<ffi::S32> zero_point,
                                   ffi::Result<ffi::Buffer<ffi::S8>> q,
                                   ffi::Result<FloatBuffer> marks) {
  const auto in = x.dimensions();
  const int64_t size = int64_t(x.element_count()), columns = in.size() ? in.back() : 0;
  if (size == 0) {  // rows of nothing hold nothing odd
    std::fill_n(marks->typed_data(), marks->element_count(), 0.0f);
    return ffi::Error::Success();
  }
  const int64_t rows = size / columns, channels = int64_t(inv_scale.element_count());
  if (int64_t(q->element_count()) != size || int64_t(marks->element_count()) != rows ||
      channels == 0 || columns % channels || zero_point.element_count() != 1)
    return invalid("wrong shapes");
  XlaThreads threads(pool, time_of_floats(size * 8));
  return with_memory([&] {
    quantize<VectorsHere>(threads, {inv_scale.typed_data(), channels, *zero_point.typed_data()},
                          x.typed_data(), rows, columns, q->typed_data(), marks->typed_data());
  });
}

// x [..., K]: in int8, and the scale and the zero point of each row.
inline ffi::Error quantize_rows_handler(ffi::ThreadPool pool, FloatBuffer x,
                                        ffi::Result<ffi::Buffer<ffi::S8>> q,
                                        ffi::Result<FloatBuffer> scales,
                                        ffi::Result<ffi::Buffer<ffi::S32>> zero_points,
                                        int64_t asymmetric, float smallest) {
  const auto in = x.dimensions();
  const int64_t size = int64_t(x.element_count()), columns = in.size() ? in.back() : 0;
  if (size == 0) return ffi::Error::Success();
  const int64_t rows = size / columns;
  if (int64_t(q->element_count()) != size || int64_t(scales->element_count()) != rows ||
      int64_t(zero_points->element_count()) != rows)
    return invalid("wrong shapes");
  XlaThreads threads(pool, time_of_floats(size * 8));
  return with_memory([&] {
    quantize_rows<VectorsHere>(threads, x.typed_data(), rows, columns, asymmetric != 0, smallest,
                               q->typed_data(), scales->typed_data(), zero_points->typed_data());
  });
}

// The axes of a tensor in the order batch, line, place: their sizes and strides.  An axis that it
// lacks, or of which it has one entry for all, has the stride 0.
struct OrderedAxes {
  std::vector<int64_t> sizes, strides;

  OrderedAxes(ffi::Span<const int64_t> shape, Ints order) {
    std::vector<int64_t> own(shape.size());
    int64_t stride = 1;
    for (size_t axis = shape.size(); axis-- > 0; stride *= shape[axis]) own[axis] = stride;
    for (const int64_t axis : order) {
      sizes.push_back(axis < 0 ? 1 : shape[axis]);
      strides.push_back(sizes.back() == 1 ? 0 : own[axis]);
    }
  }
  int64_t line() const { return strides[strides.size() - 2]; }
  int64_t place() const { return strides.back(); }
  int64_t lines() const { return sizes[sizes.size() - 2]; }
  int64_t places() const { return sizes.back(); }

  // Where the matrix of a batch begins, of batches that are counted as `all` has them.
  int64_t start(int64_t batch, const OrderedAxes& all) const {
    int64_t at = 0;
    for (size_t axis = all.sizes.size() - 2; axis-- > 0; batch /= all.sizes[axis])
      at += batch % all.sizes[axis] * strides[axis];
    return at;
  }
  bool fits(const OrderedAxes& all) const {
    for (size_t axis = 0; axis + 2 < all.sizes.size(); ++axis)
      if (sizes[axis] != 1 && sizes[axis] != all.sizes[axis]) return false;
    return true;
  }
};

// softmax(scale * q kᵀ + bias, or fill where not mask) v.  The orders say where the axes of a tensor
// are, as `OrderedAxes` takes them: of a bias and a mask [batch, keys, rows].  `beside` are the
// bias and the mask, where they have orders.  Keys and values may be bfloat16 where rows are few.
inline ffi::Error attention_handler(ffi::ThreadPool pool, FloatBuffer q, ffi::AnyBuffer k,
                                    ffi::AnyBuffer v, ffi::RemainingArgs beside,
                                    ffi::Result<FloatBuffer> out, Ints query, Ints key, Ints value,
                                    Ints result, Ints bias, Ints mask, float scale, float fill) {
  const size_t rank = query.size();
  if (rank < 2 || key.size() != rank || value.size() != rank || result.size() != rank)
    return invalid("wrong numbers of axes");
  const OrderedAxes of_q(q.dimensions(), query), of_k(k.dimensions(), key);
  const OrderedAxes of_v(v.dimensions(), value), to(out->dimensions(), result);
  const Attention a{to.lines(), of_k.lines(), of_q.places(), to.places(), scale, fill};
  if (of_q.lines() != a.rows || of_k.places() != a.depth || of_v.lines() != a.keys ||
      of_v.places() != a.values || !of_q.fits(to) || !of_k.fits(to) || !of_v.fits(to))
    return invalid("wrong shapes");

  // What is beside the scores has entries for all keys and rows, or one for all of them.
  size_t given = 0;
  OrderedAxes of_bias({}, {}), of_mask({}, {});
  const float* bias_data = nullptr;
  const uint8_t* mask_data = nullptr;
  const auto fits_scores = [&](const OrderedAxes& axes) {
    return axes.fits(to) && (axes.lines() == 1 || axes.lines() == a.keys) &&
           (axes.places() == 1 || (axes.places() == a.rows && axes.place() == 1));
  };
  if (bias.size() == rank) {
    auto buffer = beside.get<FloatBuffer>(given++);
    if (!buffer.has_value()) return invalid("the bias is missing");
    of_bias = OrderedAxes(buffer->dimensions(), bias);
    bias_data = buffer->typed_data();
    if (!fits_scores(of_bias)) return invalid("the bias is of another shape");
  }
  if (mask.size() == rank) {
    auto buffer = beside.get<ffi::Buffer<ffi::PRED>>(given++);
    if (!buffer.has_value()) return invalid("the mask is missing");
    of_mask = OrderedAxes(buffer->dimensions(), mask);
    mask_data = reinterpret_cast<const uint8_t*>(buffer->typed_data());
    if (!fits_scores(of_mask)) return invalid("the mask is of another shape");
  }

  int64_t batches = 1;
  for (size_t axis = 0; axis + 2 < rank; ++axis) batches *= to.sizes[axis];
  if (batches * a.rows * a.values * a.keys == 0) {  // a sum over no keys is zero, as XLA has it
    std::fill_n(out->typed_data(), out->element_count(), 0.0f);
    return ffi::Error::Success();
  }
  const int64_t numbers = batches * a.keys * (a.depth + a.values);  // of keys and values
  const bool is_half = k.element_type() == ffi::BF16;
  if (k.element_type() != v.element_type() || (!is_half && k.element_type() != ffi::F32))
    return invalid("keys and values of other types");
  if (is_half && a.rows >= kFewestRows) return invalid("bfloat16 beside many rows");
  const int64_t bytes = (is_half ? 2 : 4) * numbers;
  XlaThreads threads(pool, time_of_reading(bytes, 2 * a.rows * numbers));
  const auto run = [&](const auto* keys, const auto* values) {
    using T = std::decay_t<decltype(*keys)>;
    attention<VectorsHere, T>(threads, a, batches, [&](int64_t batch) {
      const auto at = [&](auto* data, const OrderedAxes& axes) {
        return data + axes.start(batch, to);
      };
      AttentionOperands<T> operands{
          {at(q.typed_data(), of_q), of_q.line(), of_q.place()},
          {at(keys, of_k), of_k.line(), of_k.place()},
          {at(values, of_v), of_v.line(), of_v.place()},
          {}, {},
          {at(out->typed_data(), to), to.line(), to.place()}};
      if (bias_data) operands.bias = {at(bias_data, of_bias), of_bias.line(), of_bias.place()};
      if (mask_data) operands.mask = {at(mask_data, of_mask), of_mask.line(), of_mask.place()};
      return operands;
    });
  };
  return with_memory([&] {
    if (is_half) {
      run(static_cast<const uint16_t*>(k.untyped_data()),
          static_cast<const uint16_t*>(v.untyped_data()));
    } else {
      run(k.typed_data<float>(), v.typed_data<float>());
    }
  });
}

}  // namespace jaxquant
