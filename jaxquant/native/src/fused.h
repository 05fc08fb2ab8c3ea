// The handlers of convolutions and dots with their epilogue, alone and in sequences.
#pragma once

#include "convolve.h"
#include "fields.h"
#include "sequence.h"
#include "xla.h"

namespace jaxquant {

// What every call is given beside its operands and its weights.
struct EpilogueArguments {
  ffi::AnyBuffer multiplier, bias;            // [C]; the bias may be empty
  ffi::AnyBuffer inv_scale, residual_scale;   // []
  ZeroPoints zero_points;
  ffi::RemainingArgs residual;                // none or one
  ffi::RemainingRets outs;                    // float32, int8 or uint8; or int32 alone
  Floats clamps;                              // `Clamps`
};

inline ffi::Error read_epilogue(EpilogueArguments& a, int64_t outputs, Epilogue& e) {
  const auto& [multiplier, bias, inv_scale, residual_scale, zero_points, residual, outs, clamps] = a;
  if (!holds<Clamps>(clamps)) return invalid("wrong attributes");
  if (int64_t(multiplier.element_count()) < outputs) return invalid("the multiplier is too short");
  e.multiplier = multiplier.typed_data<float>();
  if (bias.element_count() > 0) {
    if (int64_t(bias.element_count()) < outputs) return invalid("the bias is too short");
    e.bias = bias.typed_data<float>();
  }
  if (residual.size() > 0) {
    auto buffer = residual.get<ffi::AnyBuffer>(0);
    if (!buffer.has_value()) return invalid("the residual cannot be read");
    if (buffer->element_type() == ffi::F32) {
      e.residual_f = buffer->typed_data<float>();
    } else {
      e.residual_q = static_cast<const int8_t*>(buffer->untyped_data());
      e.residual_flip = flip_of(buffer->element_type());
    }
    e.residual_scale = *residual_scale.typed_data<float>();
    e.residual_zero_point = zero_points.residual;
  }
  e.set_clamps(record<Clamps>(clamps), residual.size() > 0);
  e.inv_scale = *inv_scale.typed_data<float>();
  e.zero_point = zero_points.output;
  for (size_t i = 0; i < a.outs.size(); ++i) {
    auto out = a.outs.get<ffi::AnyBuffer>(i);
    if (!out.has_value()) return invalid("an output cannot be written");
    if ((*out)->element_type() == ffi::S32) {
      e.sums = (*out)->typed_data<int32_t>();
    } else if ((*out)->element_type() == ffi::F32) {
      e.write_floats((*out)->untyped_data(), int64_t((*out)->size_bytes()), outputs);
    } else {
      e.out_q = static_cast<int8_t*>((*out)->untyped_data());
      e.out_flip = flip_of((*out)->element_type());
    }
  }
  return ffi::Error::Success();
}

// The convolution of `n` images; what it reads has as many rows, columns and channels as `image`.
inline ConvShape conv_shape(int64_t n, const Image& image, const Geometry& g) {
  return {n, image.h, image.w, image.c, g.oh, g.ow, g.o, g.kh, g.kw, g.stride_h, g.stride_w,
          g.dilation_h, g.dilation_w, g.pad_h, g.pad_w, g.groups};
}

// The operand that holds the zero points.
using ZeroPointsBuffer = ffi::Buffer<ffi::S32, 1>;

inline ffi::Span<const int32_t> numbers_of(const ZeroPointsBuffer& zero_points) {
  return {zero_points.typed_data(), zero_points.element_count()};
}

inline Input input_of(ffi::AnyBuffer x, const ZeroPoints& zero_points) {
  return {x.untyped_data(), x.element_type() == ffi::S8, zero_points.input,
          zero_points.subtracted};
}

inline ffi::Error conv_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer packed,
                               ffi::AnyBuffer multiplier, ffi::AnyBuffer bias,
                               ffi::AnyBuffer inv_scale, ffi::AnyBuffer residual_scale,
                               ZeroPointsBuffer zero_points, ffi::RemainingArgs residual,
                               ffi::RemainingRets outs, Ints geometry, Floats clamps) {
  const auto in = x.dimensions();
  const auto numbers = numbers_of(zero_points);
  if (in.size() != 4 || !holds<Geometry>(geometry) || !holds<ZeroPoints>(numbers))
    return invalid("wrong shapes");
  const ZeroPoints points = record<ZeroPoints>(numbers);
  const ConvShape s = conv_shape(in[0], {in[1], in[2], in[3]}, record<Geometry>(geometry));
  Epilogue epilogue;
  EpilogueArguments given{multiplier, bias, inv_scale, residual_scale,
                          points, residual, outs, clamps};
  ffi::Error error = read_epilogue(given, s.o, epilogue);
  if (error.failure()) return error;
  if (s.n * s.oh * s.ow * s.o == 0) return error;
  XlaThreads threads(pool, time_of_products(s.n * s.oh * s.ow * s.o * s.kh * s.kw * s.group_in()));
  if (int64_t(packed.element_count()) != packed_size(s))
    return invalid("the weights are packed for another kernel shape");
  const Input input = input_of(x, points);
  return with_memory([&] {
    convolve(threads, input, s, packed.typed_data<int8_t>(), epilogue);
  });
}

inline ffi::Error dot_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer packed,
                              ffi::AnyBuffer multiplier, ffi::AnyBuffer bias,
                              ffi::AnyBuffer inv_scale, ffi::AnyBuffer residual_scale,
                              ZeroPointsBuffer zero_points, ffi::RemainingArgs residual,
                              ffi::RemainingRets outs, int64_t columns, Floats clamps) {
  const auto in = x.dimensions();
  const auto numbers = numbers_of(zero_points);
  if (in.size() != 2 || !holds<ZeroPoints>(numbers)) return invalid("wrong shapes");
  const ZeroPoints points = record<ZeroPoints>(numbers);
  Epilogue epilogue;
  EpilogueArguments given{multiplier, bias, inv_scale, residual_scale,
                          points, residual, outs, clamps};
  ffi::Error error = read_epilogue(given, columns, epilogue);
  if (error.failure()) return error;
  if (in[0] * columns == 0) return error;
  if (int64_t(packed.element_count()) != packed_dot(in[1], columns).size())
    return invalid("the weights are packed for another shape");
  XlaThreads threads(pool, time_of_products(in[0] * in[1] * columns));
  const Input input = input_of(x, points);
  return with_memory([&] {
    multiply(threads, input, in[0], in[1], columns, packed.typed_data<int8_t>(), epilogue);
  });
}

// The operand that holds where groups end.
using EndsBuffer = ffi::Buffer<ffi::S32, 2>;

// x [products, rows, inputs]; the weights, multipliers and biases of each product or of all.
inline ffi::Error groups_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer packed,
                                 ffi::AnyBuffer multiplier, ffi::AnyBuffer bias,
                                 ffi::AnyBuffer inv_scale, ffi::AnyBuffer residual_scale,
                                 ZeroPointsBuffer zero_points, EndsBuffer ends,
                                 ffi::RemainingArgs residual, ffi::RemainingRets outs,
                                 Floats clamps) {
  const auto in = x.dimensions(), of_weights = packed.dimensions(), of_groups = ends.dimensions();
  const auto numbers = numbers_of(zero_points);
  if (in.size() != 3 || of_weights.size() != 3 || of_groups[0] != in[0] ||
      of_groups[1] != of_weights[1] || !holds<ZeroPoints>(numbers))
    return invalid("wrong shapes");
  const ZeroPoints points = record<ZeroPoints>(numbers);
  const int64_t sets = of_weights[0], all = std::max<int64_t>(1, sets * of_weights[1]);
  Groups s{in[0], in[1], in[2], int64_t(multiplier.element_count()) / all, of_weights[1],
           ends.typed_data(), sets != 1, packed.typed_data<int8_t>()};
  Epilogue epilogue;
  EpilogueArguments given{multiplier, bias, inv_scale, residual_scale,
                          points, residual, outs, clamps};
  ffi::Error error = read_epilogue(given, s.columns, epilogue);
  if (error.failure()) return error;
  if (s.products * s.rows * s.columns == 0) return error;
  if (s.groups == 0 || (s.own && sets != s.products) ||
      int64_t(multiplier.element_count()) != all * s.columns ||
      (epilogue.bias && bias.element_count() != multiplier.element_count()))
    return invalid("the weights are of another number of groups");
  if (of_weights[2] != s.bytes()) return invalid("the weights are packed for another shape");
  const Input input = input_of(x, points);
  return with_memory([&] {
    XlaThreads threads(pool, time_of_products(s.products * s.rows * s.inputs * s.columns));
    multiply_groups(threads, input, s, epilogue);
  });
}

// Reads the steps of a sequence and its tensors.  Of those, the operands come first, then the
// results, then what lies between the steps.
class SequenceReader {
 public:
  SequenceReader(ffi::RemainingArgs args, ffi::RemainingRets rets)
      : args_(args), rets_(rets), tensors_(args.size() + rets.size()) {}

  // Reads the records of every step, one of each kind.
  ffi::Error read(Ints places, Ints images, Ints geometry, Floats clamps) {
    const int64_t count = int64_t(clamps.size() * sizeof(float) / sizeof(Clamps));
    if (!holds<Places>(places, count) || !holds<Image>(images, count) ||
        !holds<Geometry>(geometry, count) || !holds<Clamps>(clamps, count))
      return invalid("wrong attributes");
    // No step has more tensors between it and others than it has places.
    most_tensors_ = int64_t(tensors_.size()) + int64_t(places.size());
    for (int64_t i = 0; i < count && ok_; ++i) {
      read_step(record<Places>(places, i),
                conv_shape(1, record<Image>(images, i), record<Geometry>(geometry, i)),
                record<Clamps>(clamps, i));
    }
    return ok_ ? ffi::Error::Success() : invalid("the steps of a sequence do not fit its tensors");
  }

  int64_t batch() const { return std::max<int64_t>(batch_, 0); }
  int64_t products() const {
    int64_t total = 0;
    for (const Step& step : steps_) total += step.products();
    return total * batch();
  }
  Sequence sequence() { return Sequence(std::move(steps_), std::move(tensors_), batch()); }

 private:
  // An operand; nothing is read of one that lacks.
  template <class T>
  const T* operand(int64_t k, int64_t least) {
    if (k < 0 || k >= int64_t(args_.size())) return fail<T>();
    auto buffer = args_.get<ffi::AnyBuffer>(k);
    if (!buffer.has_value() || int64_t(buffer->element_count()) < least) return fail<T>();
    return static_cast<const T*>(buffer->untyped_data());
  }
  template <class T>
  const T* fail() {
    ok_ = false;
    return nullptr;
  }
  void check(bool holds) { ok_ &= holds; }

  // A tensor [n, ...] of `size` bytes a sample: an operand, or one that a step writes and those
  // behind it may read.
  void tensor(int64_t k, int64_t size, bool writes) {
    if (k == kNone) return;
    const int64_t args = args_.size(), given = args + rets_.size();
    if (k < 0 || k >= most_tensors_) return check(false);
    if (k >= int64_t(tensors_.size())) tensors_.resize(k + 1);
    Tensor& t = tensors_[k];
    const bool is_new = t.bytes == kNone;
    check(k < args ? !writes : writes == is_new);
    check(is_new || t.bytes == size);
    t.bytes = size;
    if (k < args) {
      auto buffer = args_.get<ffi::AnyBuffer>(k);
      check(buffer.has_value());
      if (ok_) give(t, *buffer);
    } else if (k < given) {
      auto buffer = rets_.get<ffi::AnyBuffer>(k - args);
      check(buffer.has_value());
      if (ok_) give(t, **buffer);
    }
  }
  void give(Tensor& t, const ffi::AnyBuffer& buffer) {
    const auto shape = buffer.dimensions();
    const int64_t batch = shape.size() ? shape[0] : 0;
    if (batch_ < 0) batch_ = batch;
    t.given = static_cast<uint8_t*>(buffer.untyped_data());
    check(batch == batch_ && int64_t(buffer.size_bytes()) == batch * t.bytes);
  }

  void read_step(const Places& places, const ConvShape& s, const Clamps& clamps) {
    Step step{};
    step.x = places.x, step.residual_f = places.residual_f, step.residual_q = places.residual_q;
    step.out_f = places.out_f, step.out_q = places.out_q;
    step.shape = s;
    step.packed = operand<int8_t>(places.packed, packed_size(s));
    step.is_int8 = true;
    Epilogue& e = step.epilogue;
    e.multiplier = operand<float>(places.multiplier, s.o);
    if (places.bias != kNone) e.bias = operand<float>(places.bias, s.o);
    const float* inv_scale = operand<float>(places.inv_scale, 1);
    const float* residual_scale = operand<float>(places.residual_scale, 1);
    const ZeroPoints* zero_points =
        operand<ZeroPoints>(places.zero_points, sizeof(ZeroPoints) / sizeof(int32_t));
    if (!ok_) return;
    step.zero_point = zero_points->input, step.subtracted = zero_points->subtracted;
    e.inv_scale = *inv_scale, e.residual_scale = *residual_scale;
    e.residual_zero_point = zero_points->residual, e.zero_point = zero_points->output;
    e.set_clamps(clamps, step.residual_f != kNone || step.residual_q != kNone);
    const int64_t out = s.oh * s.ow * s.o;
    tensor(step.x, s.h * s.w * s.c, false);
    tensor(step.residual_f, 4 * out, false);
    tensor(step.residual_q, out, false);
    tensor(step.out_f, 4 * out, true);
    tensor(step.out_q, out, true);
    steps_.push_back(step);
  }

  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  std::vector<Tensor> tensors_;
  std::vector<Step> steps_;
  int64_t most_tensors_ = 0;
  int64_t batch_ = -1;
  bool ok_ = true;
};

inline ffi::Error sequence_handler(ffi::ThreadPool pool, ffi::RemainingArgs args,
                                   ffi::RemainingRets rets, Ints places, Ints images,
                                   Ints geometry, Floats clamps) {
  ffi::Error error = ffi::Error::Success();
  const ffi::Error memory = with_memory([&] {
    SequenceReader reader(args, rets);
    error = reader.read(places, images, geometry, clamps);
    if (error.failure() || reader.batch() == 0) return;
    XlaThreads threads(pool, time_of_products(reader.products()));
    Team team(threads);
    reader.sequence().run(team);
  });
  return memory.failure() ? memory : error;
}

// x, packed weights, multiplier, bias, two scales, zero points.
inline auto weighted_operands() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ZeroPointsBuffer>();
}

// Those, and perhaps a residual; one output or two.
inline auto fused_operands() { return weighted_operands().RemainingArgs().RemainingRets(); }

}  // namespace jaxquant
