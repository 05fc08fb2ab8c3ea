// Convolution and dot as tiles of the matrix kernel, split into tasks for XLA's threads.
#pragma once

#include <vector>

#include "epilogue.h"
#include "gemm.h"
#include "parallel.h"
#include "window.h"

namespace jaxquant {

constexpr int64_t kTasksPerThread = 4;      // so that threads finish together
constexpr int64_t kOutputBytes = 1 << 18;   // what a task writes, and the residual that it adds
constexpr int64_t kScratchBytes = 1 << 18;  // a task's copy of the input stays in the L2 cache

// The weights and the epilogue of a call, for the kernels of an instruction set.
template <class Set>
class Product {
 public:
  Product(const PackedMatrix& layout, const int8_t* packed, const Epilogue& epilogue,
          int64_t outputs, int32_t zero_point)
      : weights_(layout, packed, outputs, zero_point), sums_(epilogue, outputs),
        output_bytes_(outputs * epilogue.bytes()) {}

  void run(const Share& share) const {
    Set::run(share, weights_, sums_);
    sums_.flush();
  }

  const PackedMatrix& layout() const { return weights_.layout(); }
  int64_t outputs() const { return weights_.outputs(); }
  int64_t output_bytes() const { return output_bytes_; }  // of a pixel, with what is added to it

 private:
  Weights weights_;
  typename Set::Sums sums_;
  int64_t output_bytes_;
};

// Segments of one height that cover `n` pixels, `together` at a time: as many are computed, whether
// there are or not.  The last may overlap the one before it.
template <class Set>
int64_t segment_height(int64_t n, int64_t together = 1) {
  int64_t best = 0, least = INT64_MAX;
  for (int64_t height = std::min(n, Set::kPixels); height > 0; --height) {
    const int64_t count = round_up(ceil_div(n, height), together);
    const int64_t cost = count * (4 * height + Set::kSegment);
    if (cost < least) best = height, least = cost;
  }
  return best;
}
template <class Set>
int64_t segment_count(int64_t n) { return ceil_div(n, segment_height<Set>(n)); }

inline void add_segments(std::vector<Segment>& segments, int64_t n, int64_t height,
                         const uint8_t* in, ptrdiff_t stride, int64_t out, int64_t pixel) {
  for (int64_t i = 0; i < n; i += height) {
    const int64_t at = std::min(i, n - height);
    segments.push_back({in + at * stride, out + at * pixel});
  }
}

// The same for a whole image of `rows` rows of `row` pixels, of which `kept` are outputs: without
// regard to where a row ends.
inline void add_flat_segments(std::vector<Segment>& segments, int64_t n, int64_t height,
                              const uint8_t* in, const Runs& runs, int64_t out, int64_t pixel) {
  for (int64_t i = 0; i < n; i += height) {
    const int64_t at = std::min(i, n - height), column = at % runs.row;
    const int64_t before = at / runs.row * runs.kept + std::min(column, runs.kept);
    segments.push_back({in + at * runs.stride, out + before * pixel, column});
  }
}

// A task's share: `rows` output rows (or pixels) of an image, a part of the channel blocks.
struct Split {
  int64_t rows, row_parts, block_parts;
};

inline Split split(int64_t images, int64_t rows, int64_t blocks, int64_t threads,
                   int64_t most_rows, bool by_channels) {
  const int64_t parts = threads == 1 ? 1 : ceil_div(kTasksPerThread * threads, images);
  int64_t row_parts = by_channels ? 1 : std::min(parts, rows);
  row_parts = std::max(row_parts, ceil_div(rows, most_rows));
  const int64_t per_task = ceil_div(rows, row_parts);
  row_parts = ceil_div(rows, per_task);
  const int64_t block_parts = std::min(blocks, ceil_div(parts, row_parts));
  return {per_task, row_parts, by_channels ? block_parts : 1};
}

// [rows, c] x [c, o], or a grouped one: x [rows, groups * c / groups].
template <class Set>
void dot(Threads& threads, const Activations& x, int64_t rows, int64_t c,
         const Product<Set>& product) {
  const PackedMatrix& layout = product.layout();
  const int64_t in = c / layout.groups;
  const int64_t padded = round_up(in, Set::kStep);
  const bool copies = x.only_copied() || in != padded;
  const int64_t tile = 2 * Set::kPixels;
  const int64_t fitting = std::min(kScratchBytes / 2 / (padded * x.width),
                                   kOutputBytes / product.output_bytes());
  const int64_t most = std::max<int64_t>(2 * tile, fitting / tile * tile);
  const int64_t weights = layout.padded_out() * padded;
  const Split parts = split(1, rows, layout.blocks(), threads.count(), most, weights > rows * c);
  const int64_t per_part = ceil_div(layout.blocks(), parts.block_parts);
  // Whole tiles in a task, all but the last.
  const int64_t step = parts.row_parts > 1 ? round_up(parts.rows, tile) : parts.rows;
  const int64_t row_parts = ceil_div(rows, step);
  parallel_for(threads, row_parts * parts.block_parts, [&](int64_t task) {
    const int64_t first = task / parts.block_parts * step;
    const int64_t n = std::min(step, rows - first);
    const int64_t b = task % parts.block_parts * per_part;
    const int64_t height = segment_height<Set>(n, 2);
    std::vector<Segment> segments;
    segments.reserve(ceil_div(n, height));
    const ptrdiff_t offset = 0;
    for (int64_t g = 0; g < layout.groups; ++g) {
      const uint8_t* from = x.data + first * c + g * in;
      ptrdiff_t stride = c;
      if (copies) {
        uint8_t* to = Scratch::of_thread().reserve(n * padded * x.width);
        if (in == padded && in == c) {
          x.copy(to, from, n * c);
        } else {
          for (int64_t i = 0; i < n; ++i) x.copy(to + i * padded * x.width, from + i * c, in);
        }
        from = to, stride = padded * x.width;
      }
      segments.clear();
      add_segments(segments, n, height, from, stride, first * product.outputs(),
                   product.outputs());
      const Runs runs{&offset, 1, layout.four_bytes, stride};
      product.run({segments, height, runs, g, b, std::min(b + per_part, layout.blocks()),
                   x.is_signed});
    }
  });
}

template <class Set>
void conv(Threads& threads, const Activations& x, const ConvShape& s,
          const Product<Set>& product) {
  if (s.pixelwise()) return dot(threads, x, s.n * s.h * s.w, s.c, product);

  const PackedMatrix& layout = product.layout();
  const int64_t nc = s.group_in();
  const int64_t reach_h = (s.oh - 1) * s.stride_h + (s.kh - 1) * s.dilation_h;
  const int64_t reach_w = (s.ow - 1) * s.stride_w + (s.kw - 1) * s.dilation_w;
  const bool inside = s.pad_h == 0 && s.pad_w == 0 && reach_h < s.h && reach_w < s.w;
  const bool copies = x.only_copied() || !inside || nc % Set::kStep;
  const bool copies_pixels = copies && s.one_tap();
  const int64_t padded = round_up(nc, Set::kStep);  // values of a copied pixel
  const int64_t row_bytes =
      x.width * (copies_pixels ? s.ow * padded : (reach_w + 1) * nc * s.stride_h);
  const int64_t most = std::max<int64_t>(1, kScratchBytes / row_bytes);
  const int64_t weights = s.groups * layout.padded_out() * layout.four_bytes * 4;
  const Split parts = split(s.n, s.oh, layout.blocks(), threads.count(), most,
                            weights > s.h * s.w * s.c);
  const int64_t per_part = ceil_div(layout.blocks(), parts.block_parts);

  parallel_for(threads, s.n * parts.row_parts * parts.block_parts, [&](int64_t task) {
    const int64_t b = task % parts.block_parts * per_part;
    const int64_t image = task / parts.block_parts / parts.row_parts;
    const int64_t first = task / parts.block_parts % parts.row_parts * parts.rows;
    const int64_t last = std::min(first + parts.rows, s.oh);
    std::vector<Segment> segments;
    segments.reserve((last - first) * segment_count<Set>(s.ow));
    std::vector<ptrdiff_t> offsets;
    for (int64_t g = 0; g < s.groups; ++g) {
      const uint8_t* from = x.data + (image * s.h + first * s.stride_h) * s.w * s.c + g * nc;
      ptrdiff_t pixel = s.c, row = s.w * s.c;  // distances in the input, in bytes
      int64_t stride_h = s.stride_h, stride_w = s.stride_w;
      if (copies_pixels) {
        pixel = padded * x.width, row = s.ow * pixel, stride_h = stride_w = 1;
        uint8_t* to = Scratch::of_thread().reserve((last - first) * row);
        copy_pixels(x, s, image, first, last, g * nc, nc, padded, to);
        from = to;
      } else if (copies) {
        const int64_t rows = (last - 1 - first) * s.stride_h + (s.kh - 1) * s.dilation_h + 1;
        pixel = nc * x.width, row = (reach_w + 1) * pixel;
        uint8_t* to = Scratch::of_thread().reserve(rows * row);
        copy_window(x, s, image, first, last, g * nc, nc, to);
        from = to;
      }
      // One run a window row where its columns are contiguous, else one a tap.
      offsets.clear();
      const bool row_runs = s.row_runs() && pixel == nc * x.width;
      for (int64_t i = 0; i < s.kh; ++i) {
        for (int64_t j = 0; j < (row_runs ? 1 : s.kw); ++j)
          offsets.push_back(i * s.dilation_h * row + j * s.dilation_w * pixel);
      }
      const int64_t taps = int64_t(offsets.size());
      Runs runs{offsets.data(), taps, layout.four_bytes / taps, stride_w * pixel};
      segments.clear();
      // The rows of a padded copy follow each other, and the columns between them cost less than
      // segments that are far from full.
      const int64_t columns = reach_w + 1, flat = (last - first - 1) * columns + s.ow;
      const int64_t by_rows = (last - first) * segment_count<Set>(s.ow);
      const bool runs_on = Set::kRunsOn && copies && !copies_pixels && s.stride_h == 1 &&
                           s.stride_w == 1 && 10 * segment_count<Set>(flat) <= 9 * by_rows;
      const int64_t pixels = (last - first) * s.ow;
      const int64_t height = segment_height<Set>(runs_on ? flat : copies_pixels ? pixels : s.ow);
      const int64_t out = (image * s.oh + first) * s.ow * s.o;
      if (runs_on) {
        runs.row = columns, runs.kept = s.ow;
        add_flat_segments(segments, flat, height, from, runs, out, s.o);
      } else if (copies_pixels) {  // they follow each other, and so do the outputs
        add_segments(segments, pixels, height, from, pixel, out, s.o);
      } else {
        for (int64_t i = 0; i < last - first; ++i) {
          add_segments(segments, s.ow, height, from + i * stride_h * row, stride_w * pixel,
                       out + i * s.ow * s.o, s.o);
        }
      }
      product.run({segments, height, runs, g, b, std::min(b + per_part, layout.blocks()),
                   x.is_signed});
    }
  });
}

}  // namespace jaxquant
