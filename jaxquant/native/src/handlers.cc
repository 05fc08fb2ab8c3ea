// The XLA FFI handlers: they check what they are given, and call the kernels.
#include "differences.h"
#include "float_depthwise.h"
#include "float_handlers.h"
#include "fused.h"
#include "histogram.h"
#include "kl.h"
#include "pack.h"
#include "stored_handler.h"
#include "xla.h"

namespace jaxquant {
namespace {

// A kernel [kh, kw, c / groups, o] as `conv_handler` reads it; `row_runs` as `ConvShape` has it.
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
  return with_memory([&] {
    pack_matrix(threads, from, count, length, layout, to);
  });
}

ffi::Error histogram_handler(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                             ffi::Result<ffi::Buffer<ffi::U32>> counts,
                             ffi::Result<ffi::Buffer<ffi::F32>> extremes, int64_t least_exponent) {
  if (counts->element_count() != kBins || extremes->element_count() != 2)
    return invalid("wrong shapes");
  XlaThreads threads(pool);
  return with_memory([&] {
    histogram(threads, x.typed_data(), int64_t(x.element_count()), int32_t(least_exponent),
              counts->typed_data(), extremes->typed_data());
  });
}

// y and ŷ [..., C] and perhaps the gain of the activation between them, which `clamp` gives else.
ffi::Error differences_handler(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> y,
                               ffi::Buffer<ffi::F32> y_hat, ffi::RemainingArgs gain,
                               ffi::Result<ffi::Buffer<ffi::F32>> sums,
                               ffi::Result<ffi::Buffer<ffi::F32>> mean,
                               ffi::Result<ffi::Buffer<ffi::F32>> powers, Floats clamp) {
  const int64_t size = int64_t(y.element_count());
  const int64_t channels = int64_t(mean->element_count());
  if (clamp.size() != 2 || powers->element_count() != 3 ||
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
  return with_memory([&] {
    differences(threads, t, sums->typed_data(), mean->typed_data(), powers->typed_data());
  });
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
  XlaThreads threads(pool, time_of_floats(int64_t(out->element_count()) * s.kh * s.kw));
  return with_memory([&] {
    float_depthwise(threads, x.typed_data(), kernel.typed_data(), s, out->typed_data());
  });
}

}  // namespace
}  // namespace jaxquant

// What Python finds by its name; the flags hide all else, so that no other library's is taken for it.
#pragma GCC visibility push(default)

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

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_gelu, jaxquant::gelu_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxquant::FloatBuffer>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("by_tanh"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_layer_norm, jaxquant::layer_norm_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxquant::FloatBuffer>()
                                  .Arg<jaxquant::FloatBuffer>()
                                  .Arg<jaxquant::FloatBuffer>()
                                  .Ret<jaxquant::FloatBuffer>()
                                  .Attr<float>("epsilon"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_quantize, jaxquant::quantize_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxquant::FloatBuffer>()
                                  .Arg<jaxquant::FloatBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S8>>()
                                  .Ret<jaxquant::FloatBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_quantize_rows, jaxquant::quantize_rows_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxquant::FloatBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S8>>()
                                  .Ret<jaxquant::FloatBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Attr<int64_t>("asymmetric")
                                  .Attr<float>("smallest"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_attention, jaxquant::attention_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<jaxquant::FloatBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<jaxquant::FloatBuffer>()
                                  .Attr<xla::ffi::Span<const int64_t>>("query")
                                  .Attr<xla::ffi::Span<const int64_t>>("key")
                                  .Attr<xla::ffi::Span<const int64_t>>("value")
                                  .Attr<xla::ffi::Span<const int64_t>>("result")
                                  .Attr<xla::ffi::Span<const int64_t>>("bias")
                                  .Attr<xla::ffi::Span<const int64_t>>("mask")
                                  .Attr<float>("scale")
                                  .Attr<float>("fill"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_pack, jaxquant::pack_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("groups")
                                  .Attr<bool>("row_runs"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_stored, jaxquant::stored_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("sums_last")
                                  .Attr<int64_t>("size")
                                  .Attr<xla::ffi::Span<const float>>("codes"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_conv, jaxquant::conv_handler,
                              jaxquant::fused_operands()
                                  .Attr<xla::ffi::Span<const int64_t>>("geometry")
                                  .Attr<xla::ffi::Span<const float>>("clamps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_dot, jaxquant::dot_handler,
                              jaxquant::fused_operands()
                                  .Attr<int64_t>("columns")
                                  .Attr<xla::ffi::Span<const float>>("clamps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_groups, jaxquant::groups_handler,
                              jaxquant::weighted_operands()
                                  .Arg<jaxquant::EndsBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<xla::ffi::Span<const float>>("clamps"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_sequence, jaxquant::sequence_handler,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<xla::ffi::Span<const int64_t>>("places")
                                  .Attr<xla::ffi::Span<const int64_t>>("images")
                                  .Attr<xla::ffi::Span<const int64_t>>("geometry")
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
  return jaxquant::with_instructions([](auto set) { return decltype(set)::kName; });
}

#pragma GCC visibility pop
