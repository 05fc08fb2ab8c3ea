// The handlers of convolutions and dots with their epilogue, alone and in sequences.
#pragma once

#include "convolve.h"
#include "sequence.h"
#include "xla.h"

namespace jaxquant {

// What every call is given beside its operands and its weights.
struct EpilogueArguments {
  ffi::AnyBuffer multiplier, bias;            // [C]; the bias may be empty
  ffi::AnyBuffer inv_scale, residual_scale;   // []
  ffi::RemainingArgs residual;                // none or one
  ffi::RemainingRets outs;                    // float32, int8 or uint8
  Ints quantized;  // zero point of input, residual, output; subtract the first?
  Floats clamps;   // low and high before the residual, low and high behind it
};

// Zero points count from the middle of the stored type: of uint8 they come as value - 128.
inline ffi::Error read_epilogue(EpilogueArguments& a, int64_t outputs, Epilogue& e) {
  const auto& [multiplier, bias, inv_scale, residual_scale, residual, outs, quantized, clamps] = a;
  if (quantized.size() != 4 || clamps.size() != 4) return invalid("wrong attributes");
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
    e.residual_zero_point = int32_t(quantized[1]);
  }
  e.set_clamps(clamps.begin(), residual.size() > 0);
  e.inv_scale = *inv_scale.typed_data<float>();
  e.zero_point = int32_t(quantized[2]);
  for (size_t i = 0; i < a.outs.size(); ++i) {
    auto out = a.outs.get<ffi::AnyBuffer>(i);
    if (!out.has_value()) return invalid("an output cannot be written");
    if ((*out)->element_type() == ffi::F32) {
      e.write_floats((*out)->untyped_data(), int64_t((*out)->size_bytes()), outputs);
    } else {
      e.out_q = static_cast<int8_t*>((*out)->untyped_data());
      e.out_flip = flip_of((*out)->element_type());
    }
  }
  return ffi::Error::Success();
}

// Of the attribute: all but the input.
inline ConvShape conv_shape(const int64_t* shape) {
  ConvShape s{};
  s.oh = shape[0], s.ow = shape[1], s.o = shape[2], s.kh = shape[3], s.kw = shape[4];
  s.stride_h = shape[5], s.stride_w = shape[6], s.dilation_h = shape[7], s.dilation_w = shape[8];
  s.pad_h = shape[9], s.pad_w = shape[10], s.groups = shape[11];
  return s;
}

inline ffi::Error conv_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer packed,
                               ffi::AnyBuffer multiplier, ffi::AnyBuffer bias,
                               ffi::AnyBuffer inv_scale, ffi::AnyBuffer residual_scale,
                               ffi::RemainingArgs residual, ffi::RemainingRets outs, Ints shape,
                               Ints quantized, Floats clamps) {
  const auto in = x.dimensions();
  if (in.size() != 4 || shape.size() != 12) return invalid("wrong shapes");
  ConvShape s = conv_shape(shape.begin());
  s.n = in[0], s.h = in[1], s.w = in[2], s.c = in[3];
  Epilogue epilogue;
  EpilogueArguments given{multiplier, bias, inv_scale, residual_scale,
                          residual, outs, quantized, clamps};
  ffi::Error error = read_epilogue(given, s.o, epilogue);
  if (error.failure()) return error;
  if (s.n * s.oh * s.ow * s.o == 0) return error;
  XlaThreads threads(pool, s.n * s.oh * s.ow * s.o * s.kh * s.kw * (s.c / s.groups));
  if (int64_t(packed.element_count()) != packed_size(s))
    return invalid("the weights are packed for another kernel shape");
  const Input input{x.untyped_data(), x.element_type() == ffi::S8, int32_t(quantized[0]),
                    quantized[3] != 0};
  return with_memory([&] {
    convolve(threads, input, s, packed.typed_data<int8_t>(), epilogue);
  });
}

inline ffi::Error dot_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer packed,
                              ffi::AnyBuffer multiplier, ffi::AnyBuffer bias,
                              ffi::AnyBuffer inv_scale, ffi::AnyBuffer residual_scale,
                              ffi::RemainingArgs residual, ffi::RemainingRets outs,
                              int64_t columns, Ints quantized, Floats clamps) {
  const auto in = x.dimensions();
  if (in.size() != 2) return invalid("a dot takes a matrix");
  Epilogue epilogue;
  EpilogueArguments given{multiplier, bias, inv_scale, residual_scale,
                          residual, outs, quantized, clamps};
  ffi::Error error = read_epilogue(given, columns, epilogue);
  if (error.failure()) return error;
  if (in[0] * columns == 0) return error;
  const PackedMatrix layout{1, columns, ceil_div(in[1], 4)};
  if (int64_t(packed.element_count()) != layout.size())
    return invalid("the weights are packed for another shape");
  XlaThreads threads(pool, in[0] * in[1] * columns);
  const bool is_int8 = x.element_type() == ffi::S8;
  const Activations a =
      Product::activations(x.untyped_data(), is_int8, int32_t(quantized[0]), quantized[3]);
  return with_memory([&] {
    dot(threads, a, in[0], in[1],
        Product(layout, packed.typed_data<int8_t>(), epilogue, columns, a.zero_point));
  });
}

// Reads the steps of a sequence and its tensors.  Of those, the operands come first, then the
// results, then what lies between the steps.
class SequenceReader {
 public:
  static constexpr int64_t kInts = 29;  // of a step

  SequenceReader(ffi::RemainingArgs args, ffi::RemainingRets rets, Ints program, Floats clamps)
      : args_(args), rets_(rets), program_(program), clamps_(clamps),
        tensors_(args.size() + rets.size()) {}

  ffi::Error read() {
    const int64_t count = int64_t(program_.size()) / kInts;
    if (count * kInts != int64_t(program_.size()) || 4 * count != int64_t(clamps_.size()))
      return invalid("wrong attributes");
    for (int64_t i = 0; i < count && ok_; ++i)
      read_step(program_.begin() + i * kInts, clamps_.begin() + 4 * i);
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
    if (k < 0 || k >= given + int64_t(program_.size())) return check(false);
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

  void read_step(const int64_t* p, const float* clamps) {
    Step step{};
    step.x = p[0], step.residual_f = p[6], step.residual_q = p[7];
    step.out_f = p[8], step.out_q = p[9];
    ConvShape& s = step.shape;
    s = conv_shape(p + 13);
    s.n = 1, s.h = p[10], s.w = p[11], s.c = p[12];
    const int64_t* quantized = p + 25;
    step.packed = operand<int8_t>(p[1], packed_size(s));
    step.is_int8 = true;
    step.zero_point = int32_t(quantized[0]);
    step.subtracts = quantized[3];
    Epilogue& e = step.epilogue;
    e.multiplier = operand<float>(p[2], s.o);
    if (p[3] != kNone) e.bias = operand<float>(p[3], s.o);
    const float* inv_scale = operand<float>(p[4], 1);
    const float* residual_scale = operand<float>(p[5], 1);
    if (!ok_) return;
    e.inv_scale = *inv_scale, e.residual_scale = *residual_scale;
    e.residual_zero_point = int32_t(quantized[1]);
    e.zero_point = int32_t(quantized[2]);
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
  Ints program_;
  Floats clamps_;
  std::vector<Tensor> tensors_;
  std::vector<Step> steps_;
  int64_t batch_ = -1;
  bool ok_ = true;
};

inline ffi::Error sequence_handler(ffi::ThreadPool pool, ffi::RemainingArgs args,
                                   ffi::RemainingRets rets, Ints program, Floats clamps) {
  ffi::Error error = ffi::Error::Success();
  const ffi::Error memory = with_memory([&] {
    SequenceReader reader(args, rets, program, clamps);
    error = reader.read();
    if (error.failure() || reader.batch() == 0) return;
    XlaThreads threads(pool, reader.products());
    Team team(threads);
    reader.sequence().run(team);
  });
  return memory.failure() ? memory : error;
}

// x, packed weights, multiplier, bias, two scales, perhaps a residual; one output or two.
inline auto fused_operands() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .RemainingRets();
}

}  // namespace jaxquant
