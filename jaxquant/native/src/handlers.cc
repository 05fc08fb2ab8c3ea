// The XLA FFI handlers: they check what they are given, and call the kernels.
#include <string>

#include "conv.h"
#include "depthwise.h"
#include "differences.h"
#include "float_depthwise.h"
#include "histogram.h"
#include "kl.h"
#include "pack.h"
#include "xla/ffi/api/ffi.h"

namespace jaxquant {
namespace {

namespace ffi = xla::ffi;
using Ints = ffi::Span<const int64_t>;
using Floats = ffi::Span<const float>;

// The pool that XLA runs the call on, or so much of it as the work is worth: waking another thread
// takes as long as some hundred thousand products (of a dot on AMX, with two threads).
class XlaThreads : public Threads {
 public:
  explicit XlaThreads(ffi::ThreadPool& pool, int64_t products = INT64_MAX)
      : pool_(pool), most_(1 + products / kProducts) {}
  int64_t count() override {
    return std::max<int64_t>(1, std::min<int64_t>(most_, pool_.num_threads()));
  }
  void schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  static constexpr int64_t kProducts = 1 << 19;
  ffi::ThreadPool& pool_;
  int64_t most_;
};

ffi::Error invalid(const std::string& what) {
  return ffi::Error::InvalidArgument("jaxquant: " + what);
}

// int8 is stored as it is; uint8 is the same value plus 128, which flips one bit.
uint8_t flip_of(ffi::DataType type) { return type == ffi::U8 ? 0x80 : 0; }

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
ffi::Error read_epilogue(EpilogueArguments& a, int64_t outputs, Epilogue& e) {
  const auto& [multiplier, bias, inv_scale, residual_scale, residual, outs, quantized, clamps] = a;
  if (quantized.size() != 4 || clamps.size() != 4) return invalid("wrong attributes");
  if (int64_t(multiplier.element_count()) < outputs) return invalid("the multiplier is too short");
  e.multiplier = multiplier.typed_data<float>();
  if (bias.element_count() > 0) {
    if (int64_t(bias.element_count()) < outputs) return invalid("the bias is too short");
    e.bias = bias.typed_data<float>();
  }
  e.low = clamps[0], e.high = clamps[1], e.low_after = clamps[2], e.high_after = clamps[3];
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
  } else {  // one clamp
    e.low = std::min(std::max(e.low, e.low_after), e.high_after);
    e.high = std::min(std::max(e.high, e.low_after), e.high_after);
    e.low_after = -kInfinity, e.high_after = kInfinity;
  }
  e.inv_scale = *inv_scale.typed_data<float>();
  e.zero_point = int32_t(quantized[2]);
  for (size_t i = 0; i < a.outs.size(); ++i) {
    auto out = a.outs.get<ffi::AnyBuffer>(i);
    if (!out.has_value()) return invalid("an output cannot be written");
    if ((*out)->element_type() == ffi::F32) {
      e.out_f = (*out)->typed_data<float>();
      e.streams = int64_t((*out)->size_bytes()) >= kStreamedBytes && outputs % 16 == 0 &&
                  reinterpret_cast<uintptr_t>(e.out_f) % 64 == 0;
    } else {
      e.out_q = static_cast<int8_t*>((*out)->untyped_data());
      e.out_flip = flip_of((*out)->element_type());
    }
  }
  return ffi::Error::Success();
}

ffi::Error conv_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer packed,
                        ffi::AnyBuffer multiplier, ffi::AnyBuffer bias, ffi::AnyBuffer inv_scale,
                        ffi::AnyBuffer residual_scale, ffi::RemainingArgs residual,
                        ffi::RemainingRets outs, Ints shape, Ints quantized, Floats clamps) {
  const auto in = x.dimensions();
  if (in.size() != 4 || shape.size() != 12) return invalid("wrong shapes");
  ConvShape s;
  s.n = in[0], s.h = in[1], s.w = in[2], s.c = in[3];
  s.oh = shape[0], s.ow = shape[1], s.o = shape[2], s.kh = shape[3], s.kw = shape[4];
  s.stride_h = shape[5], s.stride_w = shape[6], s.dilation_h = shape[7], s.dilation_w = shape[8];
  s.pad_h = shape[9], s.pad_w = shape[10], s.groups = shape[11];
  Epilogue epilogue;
  EpilogueArguments given{multiplier, bias, inv_scale, residual_scale,
                          residual, outs, quantized, clamps};
  ffi::Error error = read_epilogue(given, s.o, epilogue);
  if (error.failure()) return error;
  if (s.n * s.oh * s.ow * s.o == 0) return error;
  XlaThreads threads(pool, s.n * s.oh * s.ow * s.o * s.kh * s.kw * (s.c / s.groups));
  const bool is_int8 = x.element_type() == ffi::S8;
  const int32_t zero_point = int32_t(quantized[0]);
  const int8_t* weights = packed.typed_data<int8_t>();
  if (s.depthwise()) {
    if (int64_t(packed.element_count()) != PackedDepthwise{s.c, s.kh * s.kw}.size())
      return invalid("the weights are packed for another kernel shape");
    const Activations a = Activations::as_u8(x.untyped_data(), is_int8, zero_point, quantized[3]);
    depthwise(threads, a, s, weights, epilogue);
    return error;
  }
  const PackedMatrix layout{s.groups, s.group_out(), s.taps() * s.run_groups()};
  if (int64_t(packed.element_count()) != layout.size())
    return invalid("the weights are packed for another kernel shape");
  const Activations a = Product::activations(x.untyped_data(), is_int8, zero_point, quantized[3]);
  conv(threads, a, s, Product(layout, weights, epilogue, s.o, a.zero_point));
  return error;
}

ffi::Error dot_handler(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer packed,
                       ffi::AnyBuffer multiplier, ffi::AnyBuffer bias, ffi::AnyBuffer inv_scale,
                       ffi::AnyBuffer residual_scale, ffi::RemainingArgs residual,
                       ffi::RemainingRets outs, int64_t columns, Ints quantized, Floats clamps) {
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
  dot(threads, a, in[0], in[1],
      Product(layout, packed.typed_data<int8_t>(), epilogue, columns, a.zero_point));
  return error;
}

// A kernel [kh, kw, c / groups, o] as `conv_handler` reads it; `row_runs` as of ConvShape.
ffi::Error pack_handler(ffi::ThreadPool pool, ffi::AnyBuffer kernel,
                        ffi::Result<ffi::AnyBuffer> packed, int64_t groups, bool row_runs) {
  const auto shape = kernel.dimensions();
  if (shape.size() != 4) return invalid("a kernel has four axes");
  const int64_t taps = shape[0] * shape[1], in = shape[2], out = shape[3];
  const int8_t* from = kernel.typed_data<int8_t>();
  int8_t* to = packed->typed_data<int8_t>();
  const int64_t size = int64_t(packed->element_count());
  if (groups > 1 && in == 1 && out == groups) {
    const PackedDepthwise layout{groups, taps};
    if (size != layout.size()) return invalid("wrong size of the packed weights");
    pack_depthwise(from, layout, to);
    return ffi::Error::Success();
  }
  const int64_t count = row_runs ? shape[0] : taps, length = row_runs ? shape[1] * in : in;
  const PackedMatrix layout{groups, out / groups, count * ceil_div(length, 4)};
  if (size != layout.size()) return invalid("wrong size of the packed weights");
  XlaThreads threads(pool);
  pack_matrix(threads, from, count, length, layout, to);
  return ffi::Error::Success();
}

ffi::Error histogram_handler(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                             ffi::Result<ffi::Buffer<ffi::U32>> counts,
                             ffi::Result<ffi::Buffer<ffi::F32>> extremes, int64_t least_exponent) {
  if (counts->element_count() != kBins || extremes->element_count() != 2)
    return invalid("wrong shapes");
  XlaThreads threads(pool);
  histogram(threads, x.typed_data(), int64_t(x.element_count()), int32_t(least_exponent),
            counts->typed_data(), extremes->typed_data());
  return ffi::Error::Success();
}

// y and ŷ [..., C] and perhaps the gain of the activation between them, which `clamp` gives else.
ffi::Error differences_handler(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> y,
                               ffi::Buffer<ffi::F32> y_hat, ffi::RemainingArgs gain,
                               ffi::Result<ffi::Buffer<ffi::F32>> sums,
                               ffi::Result<ffi::Buffer<ffi::F32>> mean,
                               ffi::Result<ffi::Buffer<ffi::F32>> powers, Floats clamp) {
  const int64_t size = int64_t(y.element_count());
  const int64_t channels = int64_t(mean->element_count());
  if (clamp.size() != 2 || powers->element_count() != 2 ||
      int64_t(sums->element_count()) != 3 * channels)
    return invalid("wrong shapes");
  if (int64_t(y_hat.element_count()) != size || size % std::max<int64_t>(1, channels))
    return invalid("two tensors of different shapes");
  Compared t{y.typed_data(), y_hat.typed_data(), nullptr, clamp[0], clamp[1],
             channels ? size / channels : 0, channels};
  if (gain.size() > 0) {
    auto given = gain.get<ffi::Buffer<ffi::F32>>(0);
    if (!given.has_value() || int64_t(given->element_count()) != size)
      return invalid("the gain is of another shape or type");
    t.gain = given->typed_data();
  }
  XlaThreads threads(pool);
  differences(threads, t, sums->typed_data(), mean->typed_data(), powers->typed_data());
  return ffi::Error::Success();
}

ffi::Error float_depthwise_handler(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                                   ffi::Buffer<ffi::F32> kernel,
                                   ffi::Result<ffi::Buffer<ffi::F32>> out, Ints window) {
  const auto in = x.dimensions(), taps = kernel.dimensions(), to = out->dimensions();
  if (in.size() != 4 || taps.size() != 4 || to.size() != 4 || window.size() != 6)
    return invalid("wrong shapes");
  if (taps[2] != 1 || taps[3] != in[3] || to[3] != in[3] || to[0] != in[0])
    return invalid("not a depthwise convolution");
  ConvShape s;
  s.n = in[0], s.h = in[1], s.w = in[2], s.c = s.o = s.groups = in[3];
  s.oh = to[1], s.ow = to[2], s.kh = taps[0], s.kw = taps[1];
  s.stride_h = window[0], s.stride_w = window[1], s.dilation_h = window[2];
  s.dilation_w = window[3], s.pad_h = window[4], s.pad_w = window[5];
  XlaThreads threads(pool, int64_t(out->element_count()) * s.kh * s.kw);
  float_depthwise(threads, x.typed_data(), kernel.typed_data(), s, out->typed_data());
  return ffi::Error::Success();
}

// x, packed weights, multiplier, bias, two scales, perhaps a residual; one output or two.
auto fused_operands() {
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

}  // namespace
}  // namespace jaxquant

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_histogram, jaxquant::histogram_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::U32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("least_exponent"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_differences, jaxquant::differences_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<xla::ffi::Span<const float>>("clamp"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_float_depthwise, jaxquant::float_depthwise_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<xla::ffi::Span<const int64_t>>("window"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_pack, jaxquant::pack_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("groups")
                                  .Attr<bool>("row_runs"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_conv, jaxquant::conv_handler,
                              jaxquant::fused_operands()
                                  .Attr<xla::ffi::Span<const int64_t>>("shape")
                                  .Attr<xla::ffi::Span<const int64_t>>("quantized")
                                  .Attr<xla::ffi::Span<const float>>("clamps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_dot, jaxquant::dot_handler,
                              jaxquant::fused_operands()
                                  .Attr<int64_t>("columns")
                                  .Attr<xla::ffi::Span<const int64_t>>("quantized")
                                  .Attr<xla::ffi::Span<const float>>("clamps"));

// Called without XLA: [tensors, bins], and [tensors] of the others.
extern "C" void jaxquant_kl_thresholds(const double* counts, const double* limit,
                                       const double* levels, int64_t tensors, int64_t bins,
                                       double clipping, double margin, double slack, double tie,
                                       double* thresholds) {
  const jaxquant::Weighing weighing{clipping, margin, slack, tie};
  for (int64_t i = 0; i < tensors; ++i)
    thresholds[i] = jaxquant::kl_threshold(counts + i * bins, bins, limit[i], int64_t(levels[i]),
                                           weighing);
}

extern "C" const char* jaxquant_kernels() {
#ifdef JAXQUANT_AVX512
  return jaxquant::has_amx() ? "AMX" : "AVX512-VNNI";
#else
  return "portable";
#endif
}
