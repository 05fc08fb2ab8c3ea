// Depthwise convolution: each channel by itself, 64 channels at a time.
#pragma once

#include <vector>

#include "depthwise_row.h"
#include "epilogue.h"
#include "parallel.h"
#include "window.h"

namespace jaxquant {

template <class Set>
void depthwise(Threads& threads, const Activations& x, const ConvShape& s, const int8_t* packed,
               const Epilogue& epilogue) {
  const PackedDepthwise layout{s.c, s.kh * s.kw};
  const int64_t blocks = layout.padded() / kLanes, quads = layout.quads();
  const bool repeats = s.c < kLanes && kLanes % s.c == 0;
  // Neighbouring pixels fill the vectors where the channels alone do not.
  const bool flat = repeats && s.stride_w == 1;

  const int32_t* window_sums = layout.sums(packed);
  std::vector<int32_t> init(layout.padded());
  std::vector<float> multiplier(layout.padded()), bias(layout.padded());
  for (int64_t i = 0; i < layout.padded(); ++i) {
    const int64_t at = i / kLanes * kLanes + Set::Depthwise::channel_of(i % kLanes);
    init[i] = int32_t(0u - uint32_t(x.zero_point) * uint32_t(window_sums[at]));
    const int64_t c = repeats ? at % s.c : at;
    multiplier[i] = c < s.c ? epilogue.multiplier[c] : 0.0f;
    bias[i] = epilogue.bias && c < s.c ? epilogue.bias[c] : 0.0f;
  }

  const int64_t columns = (s.ow - 1) * s.stride_w + (s.kw - 1) * s.dilation_w + 1;
  const int64_t pixel = s.c * x.width, row_bytes = columns * pixel;
  std::vector<ptrdiff_t> offsets;
  for (int64_t t = 0; t < 4 * quads; ++t) {
    const int64_t tap = std::min(t, s.kh * s.kw - 1);  // beyond the window: a weight of zero
    offsets.push_back(tap / s.kw * s.dilation_h * row_bytes + tap % s.kw * s.dilation_w * pixel);
  }

  const int64_t halo = (s.kh - 1) * s.dilation_h;
  const int64_t fitting = (kScratchBytes / row_bytes - halo) / s.stride_h;
  const int64_t most = std::max<int64_t>(fitting, 1);
  const int64_t parts = threads.count() == 1 ? 1 : ceil_div(4 * threads.count(), s.n);
  const int64_t rows = std::max<int64_t>(1, std::min(most, ceil_div(s.oh, parts)));
  const int64_t row_parts = ceil_div(s.oh, rows);
  const typename Set::Sums sums(epilogue, s.c);
  const typename Set::Depthwise::Taps taps(layout, packed);

  parallel_for(threads, s.n * row_parts, [&](int64_t task) {
    const int64_t image = task / row_parts;
    const int64_t first = task % row_parts * rows, last = std::min(first + rows, s.oh);
    const int64_t in_rows = (last - 1 - first) * s.stride_h + halo + 1;
    uint8_t* window = Scratch::of_thread().reserve(in_rows * row_bytes);
    copy_window(x, s, image, first, last, 0, s.c, window);
    for (int64_t i = first; i < last; ++i) {
      const uint8_t* in = window + (i - first) * s.stride_h * row_bytes;
      const int64_t out = (image * s.oh + i) * s.ow * s.c;
      for (int64_t b = 0; b < blocks; ++b) {
        DepthwiseRow row;
        row.in = in + b * kLanes * x.width;
        row.out = out + b * kLanes;
        row.steps = flat ? ceil_div(s.ow * s.c, kLanes) : s.ow;
        row.in_step = flat ? kLanes * x.width : s.stride_w * pixel;
        row.out_step = flat ? kLanes : s.c;
        row.lanes = flat ? kLanes : std::min<int64_t>(kLanes, s.c - b * kLanes);
        row.last_lanes = flat ? s.ow * s.c - (row.steps - 1) * kLanes : row.lanes;
        row.offsets = offsets.data();
        row.taps = layout.taps;
        row.weights = taps.block(b);
        row.init = init.data() + b * kLanes;
        row.multiplier = multiplier.data() + b * kLanes;
        row.bias = bias.data() + b * kLanes;
        row.channel = b * kLanes;
        Set::Depthwise::row(row, s.c, sums);
      }
    }
    sums.flush();
  });
}

}  // namespace jaxquant
