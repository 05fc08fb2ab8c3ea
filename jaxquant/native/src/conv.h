// Convolution and dot as tiles of the matrix kernel, split into tasks for XLA's threads.
#pragma once

#include <vector>

#include "amx.h"
#include "parallel.h"
#include "window.h"

namespace jaxquant {

constexpr int64_t kTasksPerThread = 4;      // so that threads finish together
constexpr int64_t kOutputBytes = 1 << 18;   // what a task writes, and the residual that it adds
constexpr int64_t kScratchBytes = 1 << 18;  // a task's copy of the input stays in the L2 cache

// The weights and the epilogue of a call, and what each sum starts from.
class Product {
 public:
  Product(const PackedMatrix& layout, const int8_t* packed, const Epilogue& epilogue,
          int64_t outputs, int32_t zero_point)
      : layout_(layout), packed_(packed), epilogue_(epilogue), outputs_(outputs), init_(layout.groups * layout.padded_out() + kBlock) {
    const int32_t* sums = layout.sums(packed);
    for (int64_t i = 0; i < layout.groups * layout.padded_out(); ++i)
      init_[i] = int32_t(0u - uint32_t(zero_point) * uint32_t(sums[i]));
  }

  static Activations activations(const void* data, bool is_int8, int32_t zero_point,
                                 bool subtract = true) {
    return has_amx() ? Activations::as_stored(data, is_int8, zero_point, subtract)
                     : Activations::as_u8(data, is_int8, zero_point, subtract);
  }
  // Pixels of a segment at most, and the bytes of a run that are read at a time.
  static int64_t most_pixels() { return has_amx() ? 16 : kSegment; }
  static int64_t step() { return has_amx() ? 64 : 4; }

  // All output channels of blocks [first, last) of a group, for `segments` of `height` pixels.
  void run(const std::vector<Segment>& segments, int64_t height, const Runs& runs, int64_t group,
           int64_t first, int64_t last, [[maybe_unused]] bool is_signed) const {
#ifdef JAXQUANT_AMX
    if (has_amx()) run_amx(segments, height, runs, group, first, last, is_signed);
    else
#endif
      run_blocks(segments, height, runs, group, first, last);
    epilogue_.flush();
  }

  const PackedMatrix& layout() const { return layout_; }
  int64_t outputs() const { return outputs_; }
  int64_t output_bytes() const { return outputs_ * epilogue_.bytes(); }

 private:
  void run_blocks(const std::vector<Segment>& segments, int64_t height, const Runs& runs,
                  int64_t group, int64_t first, int64_t last) const {
    for (int64_t b = first; b < last; ++b) {
      const Tile tile = find_tile(height, wide(b), epilogue_);
      const Block block = block_at(group, b);
      for_pairs(segments, [&](const Segment& s0, const Segment& s1) {
        tile(s0, s1, runs, block, epilogue_);
      });
    }
  }
#ifdef JAXQUANT_AMX
  static void prefetch_inputs(const Segment* segments, int64_t count, int64_t height,
                              const Runs& runs) {
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t i = 0; i < height; ++i) {
        for (int64_t byte = 0; byte < 4 * runs.groups; byte += 64)
          _mm_prefetch(segments[k].in + i * runs.stride + byte, _MM_HINT_T0);
      }
    }
  }

  void run_amx(const std::vector<Segment>& segments, int64_t height, const Runs& runs,
               int64_t group, int64_t first, int64_t last, bool is_signed) const {
    const AmxTiles tiles(height);
    const auto finish_segment = !epilogue_.plain   ? finish<true, false>
                                : epilogue_.clamps ? finish<true, true>
                                                   : finish<false, true>;
    // Neighbouring blocks are written together, so that what a pixel writes is contiguous.
    const int64_t per_block = layout_.four_bytes * 4 * kBlock;
    const int64_t most = std::min<int64_t>(std::max<int64_t>(kAmxWeights / per_block, 1), kAmxBlocks);
    alignas(64) int32_t sums[2 * kAmxSegment * kAmxBlocks * kBlock];
    std::vector<int8_t> tails[kAmxBlocks];
    for (int64_t start = first; start < last; start += most) {
      const int64_t count = std::min(most, last - start), row = count * kBlock;
      Lanes lanes[2 * kAmxBlocks];
      Block blocks[kAmxBlocks];
      int64_t vectors = 0;
      for (int64_t i = 0; i < count; ++i) {
        blocks[i] = block_at(group, start + i);
        copy_tails(runs, blocks[i].weights, wide(start + i) ? 128 : 64, tails[i]);
        for (int64_t c = 0; c < blocks[i].channels; c += 16)
          lanes[vectors++] = epilogue_.lanes(blocks[i].channel + c, blocks[i].channels - c);
      }
      const Segment* const end = segments.data() + segments.size();
      for_pairs(segments, [&](const Segment& s0, const Segment& s1) {
        // Rows of a few lines each, which the processor does not see coming.
        if (start == first && runs.taps == 1 && end - &s0 > 2)
          prefetch_inputs(&s0 + 2, std::min<int64_t>(2, end - &s0 - 2), height, runs);
        for (const Segment* s : {&s0, &s1})
          epilogue_.prefetch(s->out + blocks[0].channel, height, outputs_, 16 * vectors);
        for (int64_t i = 0; i < count; ++i) {
          const auto tile = wide(start + i) ? (is_signed ? amx_tile<true, 2> : amx_tile<false, 2>)
                                            : (is_signed ? amx_tile<true, 1> : amx_tile<false, 1>);
          tile(s0, s1, height, runs, blocks[i], tails[i].data(), sums + i * kBlock, row);
        }
        const auto store = [&](const Segment& s, const int32_t* from) {
          finish_segment(from, row, height, s, outputs_, runs, blocks[0].init, lanes, vectors,
                         epilogue_);
        };
        store(s0, sums);
        if (&s1 != &s0) store(s1, sums + height * row);  // else an odd one, twice
      });
    }
  }
#endif

  template <class F>
  static void for_pairs(const std::vector<Segment>& segments, F f) {
    for (size_t i = 0; i < segments.size(); i += 2)
      f(segments[i], segments[std::min(i + 1, segments.size() - 1)]);
  }
  bool wide(int64_t b) const { return layout_.padded_out() - b * kBlock >= kBlock; }
  Block block_at(int64_t group, int64_t b) const {
    const int64_t start = b * kBlock;
    return {layout_.block(packed_, group, b), init_.data() + group * layout_.padded_out() + start,
            group * layout_.out + start, std::min<int64_t>(kBlock, layout_.out - start), outputs_};
  }

  PackedMatrix layout_;
  const int8_t* packed_;
  SumsEpilogue epilogue_;
  int64_t outputs_;
  std::vector<int32_t> init_;
};

// Segments of one height that cover `n` pixels; the last may overlap the one before it.
inline int64_t segment_count(int64_t n) { return ceil_div(n, Product::most_pixels()); }
inline int64_t segment_height(int64_t n) { return ceil_div(n, segment_count(n)); }

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
inline void dot(Threads& threads, const Activations& x, int64_t rows, int64_t c,
                const Product& product) {
  const PackedMatrix& layout = product.layout();
  const int64_t in = c / layout.groups;
  const int64_t padded = round_up(in, Product::step());
  const bool copies = x.flip || in != padded;
  const int64_t tile = 2 * Product::most_pixels();
  const int64_t fitting = std::min(kScratchBytes / 2 / padded,
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
    const int64_t height = segment_height(n);
    std::vector<Segment> segments;
    segments.reserve(ceil_div(n, height));
    const ptrdiff_t offset = 0;
    for (int64_t g = 0; g < layout.groups; ++g) {
      const uint8_t* from = x.data + first * c + g * in;
      ptrdiff_t stride = c;
      if (copies) {
        uint8_t* to = Scratch::of_thread().reserve(n * padded);
        if (in == padded && in == c) {
          x.copy(to, from, n * c);
        } else {
          for (int64_t i = 0; i < n; ++i) x.copy(to + i * padded, from + i * c, in);
        }
        from = to, stride = padded;
      }
      segments.clear();
      add_segments(segments, n, height, from, stride, first * product.outputs(),
                   product.outputs());
      const Runs runs{&offset, 1, layout.four_bytes, stride};
      product.run(segments, height, runs, g, b, std::min(b + per_part, layout.blocks()),
                  x.is_signed);
    }
  });
}

inline void conv(Threads& threads, const Activations& x, const ConvShape& s,
                 const Product& product) {
  const bool same_pixels = s.pad_h == 0 && s.pad_w == 0 && s.oh == s.h && s.ow == s.w;
  if (s.one_tap() && s.stride_h == 1 && s.stride_w == 1 && same_pixels)
    return dot(threads, x, s.n * s.h * s.w, s.c, product);

  const PackedMatrix& layout = product.layout();
  const int64_t nc = s.group_in();
  const int64_t reach_h = (s.oh - 1) * s.stride_h + (s.kh - 1) * s.dilation_h;
  const int64_t reach_w = (s.ow - 1) * s.stride_w + (s.kw - 1) * s.dilation_w;
  const bool inside = s.pad_h == 0 && s.pad_w == 0 && reach_h < s.h && reach_w < s.w;
  const bool copies = x.flip || !inside || nc % Product::step();
  const bool copies_pixels = copies && s.one_tap();
  const int64_t padded = round_up(nc, Product::step());  // of a copied pixel
  const int64_t row_bytes = copies_pixels ? s.ow * padded : (reach_w + 1) * nc * s.stride_h;
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
    segments.reserve((last - first) * segment_count(s.ow));
    std::vector<ptrdiff_t> offsets;
    for (int64_t g = 0; g < s.groups; ++g) {
      const uint8_t* from = x.data + (image * s.h + first * s.stride_h) * s.w * s.c + g * nc;
      ptrdiff_t pixel = s.c, row = s.w * s.c;  // distances in the input, in bytes
      int64_t stride_h = s.stride_h, stride_w = s.stride_w;
      if (copies_pixels) {
        pixel = padded, row = s.ow * pixel, stride_h = stride_w = 1;
        uint8_t* to = Scratch::of_thread().reserve((last - first) * row);
        copy_pixels(x, s, image, first, last, g * nc, nc, padded, to);
        from = to;
      } else if (copies) {
        const int64_t rows = (last - 1 - first) * s.stride_h + (s.kh - 1) * s.dilation_h + 1;
        pixel = nc, row = (reach_w + 1) * nc;
        uint8_t* to = Scratch::of_thread().reserve(rows * row);
        copy_window(x, s, image, first, last, g * nc, nc, to);
        from = to;
      }
      // One run a window row where its columns are contiguous, else one a tap.
      offsets.clear();
      const bool row_runs = s.row_runs() && pixel == nc;
      for (int64_t i = 0; i < s.kh; ++i) {
        for (int64_t j = 0; j < (row_runs ? 1 : s.kw); ++j)
          offsets.push_back(i * s.dilation_h * row + j * s.dilation_w * pixel);
      }
      const int64_t taps = int64_t(offsets.size());
      Runs runs{offsets.data(), taps, layout.four_bytes / taps, stride_w * pixel};
      segments.clear();
      // Of a padded copy the rows follow each other, and the columns between them cost less than
      // segments that are far from full.
      const int64_t columns = reach_w + 1, flat = (last - first - 1) * columns + s.ow;
      const bool runs_on = has_amx() && copies && !copies_pixels && s.stride_h == 1 &&
                           s.stride_w == 1 &&
                           10 * segment_count(flat) <= 9 * (last - first) * segment_count(s.ow);
      const int64_t height = segment_height(runs_on ? flat : s.ow);
      const int64_t out = (image * s.oh + first) * s.ow * s.o;
      if (runs_on) {
        runs.row = columns, runs.kept = s.ow;
        add_flat_segments(segments, flat, height, from, runs, out, s.o);
      } else {
        for (int64_t i = 0; i < last - first; ++i) {
          add_segments(segments, s.ow, height, from + i * stride_h * row, stride_w * pixel,
                       out + i * s.ow * s.o, s.o);
        }
      }
      product.run(segments, height, runs, g, b, std::min(b + per_part, layout.blocks()),
                  x.is_signed);
    }
  });
}

}  // namespace jaxquant
