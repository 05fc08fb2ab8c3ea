// Products of rows x [M, K] with matrices of stored integers, which are read as they lie.
//
// A product of few rows takes as long as the memory takes to give the weights.  So they are read
// once, as integers, and become floats in registers alone.  Where a matrix is [K, N], a tile is some
// rows of x and vectors of neighbouring columns; where it is [N, K], some rows and columns, each
// summed along vectors of K.  A tile adds up one group of K after the other, times its scales:
//
//   y = sum over groups (sum over the group (x * q)) * scale        floats
//   y = sum (x * q)                                                 int32, of rows of int8
//
// The integers of the second are computed as floats too, which are exact up to 2^24: no more than
// kExact products are added before they become int32.  How a sum is made up depends on K and the
// groups alone, not on the tile or the thread: a column has the same bits in any of them.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "vectors.h"
#include "parallel.h"
#include "shape.h"
#include "window.h"

namespace jaxquant {

constexpr int64_t kExact = 1024;      // products of two int8 that floats add up exactly
constexpr int64_t kColumnsEach = 64;  // a line of the cache: threads share none
constexpr int64_t kLinesAhead = 128;  // of a matrix [K, N] that are fetched before they are read
constexpr int64_t kCached = 1 << 18;  // bytes of a matrix that stay in the cache of a core
constexpr size_t kKeptRows = 1 << 22;  // bytes of rows whose memory is kept for the next call

// What lies where; S: floats, or uint16_t for bfloat16.
template <class S>
struct Stored {
  int64_t rows, length, columns;  // M, K, N
  int64_t size;                   // of a group: K, or a multiple of 32
  bool sums_first;                // [K, N], else [N, K]
  bool packed;                    // two 4-bit integers a byte, neighbours along K, the first low
  const int8_t* weights;
  const S* scale;  // [groups, N] or [N, groups]; null (a float*) where the results are int32
  void* out;           // [M, N], floats or int32
  const float* codes;  // [16], what packed integers stand for; null: themselves

  // Lines of columns, the last of them with what is left.
  int64_t lines() const { return columns ? std::max<int64_t>(1, columns / kColumnsEach) : 0; }
  int64_t groups() const { return ceil_div(length, size); }
  int64_t bytes() const { return packed ? ceil_div(length, 2) : length; }  // of a column
  // The floats of a row of x as the tiles read it: those behind K are zero.
  int64_t padded() const { return round_up(length, 64); }
};

// Rows of x as the tiles read them: floats, [M, padded].
struct Rows {
  const float* data;
  int64_t stride;
};

// What becomes of the sums of a group: times their scale, to floats, or to int32.
template <class L, bool kWhole>
struct Totals {
  using Number = std::conditional_t<kWhole, int32_t, float>;
  using Vector = std::conditional_t<kWhole, typename L::Ints, typename L::Floats>;

  template <class Scale>
  static void add(Vector& total, typename L::Floats sums, Scale scale) {
    if constexpr (kWhole) total += L::ints(sums);
    else total += sums * scale;
  }
};

// kRows rows of x from `row`, times kVectors vectors of columns from `column` of a matrix [K, N].
// Where it is one vector, only `count` columns of it may be there.
template <class L, bool kPacked, bool kWhole, int kRows, int kVectors, bool kPart, class S>
void columns_tile(const Stored<S>& s, const Rows& x, int64_t row, int64_t column, int64_t count,
                  typename Totals<L, kWhole>::Number* out) {
  using T = Totals<L, kWhole>;
  constexpr int kLanes = L::kCount;
  constexpr int64_t kEach = kPacked ? 2 : 1;  // places along K of a stored row
  const typename L::Codes codes(s.codes);
  constexpr int64_t kRowsAhead = kLinesAhead / ((kVectors * kLanes + 63) / 64);
  const auto bytes = [&](const int8_t* from) {
    if constexpr (kPart) return L::bytes(from, count);
    else return L::bytes(from);
  };
  typename T::Vector totals[kRows][kVectors] = {};
  const float* in = x.data + row * x.stride;
  const int64_t size = kWhole ? kExact : s.size;
  const int8_t* const end = s.weights + s.bytes() * s.columns;
  const auto fetch = [&](const int8_t* row) {
    for (int v = 0; v < kVectors && row < end; v += 64 / kLanes)
      __builtin_prefetch(row + v * kLanes);
  };
  for (int64_t ahead = 0; ahead < kRowsAhead; ++ahead)
    fetch(s.weights + ahead * s.columns + column);
  for (int64_t first = 0; first < s.length; first += size) {
    const int64_t last = std::min(first + size, s.length);
    typename L::Floats sums[kRows][kVectors] = {};
    const S* const scales = kWhole ? nullptr : s.scale + first / size * s.columns + column;
    for (int v = 0; !kWhole && v < kVectors; ++v) __builtin_prefetch(scales + v * kLanes);
    const int8_t* w = s.weights + first / kEach * s.columns + column;
    for (int64_t k = first; k < last; k += kEach, w += s.columns) {
      fetch(w + kRowsAhead * s.columns);
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (kPacked) {
          typename L::Floats low, high;
          L::halves(bytes(w + v * kLanes), codes, low, high);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            sums[r][v] += low * in[r * x.stride + k];
            sums[r][v] += high * in[r * x.stride + k + 1];
          }
        } else {
          const auto weights = L::floats(bytes(w + v * kLanes));
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) sums[r][v] += weights * in[r * x.stride + k];
        }
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      typename L::Floats scale{};
      if constexpr (!kWhole)
        scale = kPart ? L::load(scales, count) : L::load(scales + v * kLanes);
      for (int r = 0; r < kRows; ++r) T::add(totals[r][v], sums[r][v], scale);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      std::memcpy(out + (row + r) * s.columns + column + v * kLanes, &totals[r][v],
                  4 * (kPart ? count : kLanes));
    }
  }
}

// kRows rows of x from `row`, times kColumns columns from `column` of a matrix [N, K] of bytes.
template <class L, bool kWhole, int kRows, int kColumns, class S>
void sums_tile(const Stored<S>& s, const Rows& x, int64_t row, int64_t column,
               typename Totals<L, kWhole>::Number* out) {
  using T = Totals<L, kWhole>;
  constexpr int kLanes = L::kCount;
  const int64_t size = kWhole ? kExact : s.size, groups = s.groups();
  typename T::Vector totals[kRows][kColumns] = {};
  const int8_t* const weights = s.weights + column * s.length;
  for (int64_t first = 0; first < s.length; first += size) {
    const int64_t last = std::min(first + size, s.length);
    typename L::Floats sums[kRows][kColumns] = {};
    const auto add = [&](int64_t k, const auto& read) {
      const float* in = x.data + row * x.stride + k;
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) {
        const auto floats = L::floats(read(weights + c * s.length + k));
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sums[r][c] += floats * L::load(in + r * x.stride);
      }
    };
    int64_t k = first;
    for (; k + kLanes <= last; k += kLanes)
      add(k, [](const int8_t* from) { return L::bytes(from); });
    if (k < last) add(k, [&](const int8_t* from) { return L::bytes(from, last - k); });
    for (int c = 0; c < kColumns; ++c) {
      const float scale =
          kWhole ? 1.0f : L::number(s.scale[(column + c) * groups + first / size]);
      for (int r = 0; r < kRows; ++r) T::add(totals[r][c], sums[r][c], scale);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c)
      out[(row + r) * s.columns + column + c] = L::sum(totals[r][c]);
  }
}

// The same of packed integers.  A group of these is few vectors, so that its scale meets the weights,
// once for all rows.
template <class L, int kRows, int kColumns, class S>
void packed_sums_tile(const Stored<S>& s, const Rows& x, int64_t row, int64_t column, float* out) {
  constexpr int kLanes = L::kCount;
  const int64_t bytes = s.bytes(), groups = s.groups();
  const typename L::Codes codes(s.codes);
  typename L::Floats sums[kRows][kColumns] = {};
  const int8_t* const weights = s.weights + column * bytes;
  const S* scale = s.scale + column * groups;
  const auto add = [&](int64_t at, const auto& read) {
    const float* in = x.data + row * x.stride + 2 * at;
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) {
      typename L::Floats low, high;
      L::halves(read(weights + c * bytes + at), codes, low, high);
      const float unit = L::number(scale[c * groups]);
      low *= unit, high *= unit;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        sums[r][c] += low * L::load(in + r * x.stride);
        sums[r][c] += high * L::load(in + r * x.stride + kLanes);
      }
    }
  };
  int64_t at = 0;
  for (int64_t end = s.size / 2; at + kLanes <= bytes; at += kLanes) {
    if (at == end) ++scale, end += s.size / 2;
    add(at, [](const int8_t* from) { return L::bytes(from); });
  }
  if (at < bytes) {
    scale = s.scale + column * groups + 2 * at / s.size;
    add(at, [&](const int8_t* from) { return L::bytes(from, bytes - at); });
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kColumns; ++c)
      out[(row + r) * s.columns + column + c] = L::sum(sums[r][c]);
  }
}

// kRows rows of x times columns [column, last), in tiles of kMost vectors or columns and, for what
// those leave, of a quarter of it, and of one.
template <class L, bool kPacked, bool kWhole, int kRows, int kMost = L::sums_of(kRows), class S>
void tiles(const Stored<S>& s, const Rows& x, int64_t row, int64_t column, int64_t last,
           typename Totals<L, kWhole>::Number* out) {
  if (s.sums_first) {
    constexpr int64_t kColumns = kMost * L::kCount;
    for (; column + kColumns <= last; column += kColumns)
      columns_tile<L, kPacked, kWhole, kRows, kMost, false>(s, x, row, column, kColumns, out);
  } else {
    constexpr int kColumns = std::min(kMost, 8);
    for (; column + kColumns <= last; column += kColumns) {
      if constexpr (kPacked) packed_sums_tile<L, kRows, kColumns>(s, x, row, column, out);
      else sums_tile<L, kWhole, kRows, kColumns>(s, x, row, column, out);
    }
  }
  if (column == last) return;  // always so for [N, K] where kMost is 1
  constexpr int kLess = std::max(kMost / 4, 1);
  if constexpr (kMost > 1) tiles<L, kPacked, kWhole, kRows, kLess>(s, x, row, column, last, out);
  else columns_tile<L, kPacked, kWhole, kRows, 1, true>(s, x, row, column, last - column, out);
}

// Rows [row, rows) of x times columns [column, last), in tiles of kMost rows and of less and less.
template <class L, bool kPacked, bool kWhole, int kMost = 8, class S>
void all_rows(const Stored<S>& s, const Rows& x, int64_t row, int64_t column, int64_t last,
              typename Totals<L, kWhole>::Number* out) {
  for (; row + kMost <= s.rows; row += kMost)
    tiles<L, kPacked, kWhole, kMost>(s, x, row, column, last, out);
  if constexpr (kMost > 1) all_rows<L, kPacked, kWhole, kMost / 2>(s, x, row, column, last, out);
}

// x as the tiles read it, [M, padded]: floats; beside packed columns [N, K] those of the low and of
// the high halves of a vector of bytes apart.
template <class S, class X, class F>
void copy_rows(const Stored<S>& s, const X* x, int lanes, const F& to_float, float* to) {
  const bool apart = s.packed && !s.sums_first;
  const int64_t padded = s.padded();
  std::memset(to, 0, s.rows * padded * sizeof(float));
  for (int64_t row = 0; row < s.rows; ++row, x += s.length, to += padded) {
    if (!apart) {
      for (int64_t k = 0; k < s.length; ++k) to[k] = to_float(x[k]);
      continue;
    }
    for (int64_t k = 0; k < s.length; ++k) {
      const int64_t start = k / (2 * lanes) * (2 * lanes), within = k - start;
      to[start + within % 2 * lanes + within / 2] = to_float(x[k]);
    }
  }
}

// Columns of lines [first, last) of a matrix.
template <class L, bool kPacked, bool kWhole, class S>
void multiply_lines(const Stored<S>& s, const Rows& x, int64_t first, int64_t last) {
  // Where several tiles of rows meet the same columns, these are so many that they stay in the cache.
  const bool once = (s.rows & (s.rows - 1)) == 0 && s.rows <= 8;
  const int64_t part = once ? s.columns : round_up(kCached / s.bytes() + 1, kColumnsEach);
  const int64_t end = last < s.lines() ? last * kColumnsEach : s.columns;
  auto* const out = static_cast<typename Totals<L, kWhole>::Number*>(s.out);
  for (int64_t column = first * kColumnsEach; column < end; column += part)
    all_rows<L, kPacked, kWhole>(s, x, 0, column, std::min(column + part, end), out);
}

// All matrices, whose lines the threads share as if they lay side by side.
template <class L, bool kPacked, bool kWhole, class S>
void multiply_columns(Threads& threads, const std::vector<Stored<S>>& all, const Rows& x) {
  int64_t lines = 0;
  for (const Stored<S>& s : all) lines += s.lines();
  const int64_t tasks = std::min(lines, threads.count());
  parallel_for(threads, tasks, [&](int64_t task) {
    int64_t first = task * lines / tasks, last = (task + 1) * lines / tasks;
    for (const Stored<S>& s : all) {
      const int64_t start = std::max<int64_t>(first, 0), end = std::min(last, s.lines());
      if (start < end) multiply_lines<L, kPacked, kWhole>(s, x, start, end);
      first -= s.lines(), last -= s.lines();
    }
  });
}

// The products with vectors of the kind `L`.
//
//   all  matrices that differ in their columns alone, and where their results are
//   x    rows [M, K] of any type, which `to_float` makes floats of
template <class L, class S, class X, class F>
void multiply_stored(Threads& threads, const std::vector<Stored<S>>& all, const X* x,
                     const F& to_float) {
  if (all.empty() || all[0].rows == 0 || all[0].length == 0) return;
  const Stored<S>& s = all[0];
  static thread_local Scratch scratch;
  float* rows = reinterpret_cast<float*>(scratch.reserve(s.rows * s.padded() * sizeof(float)));
  copy_rows(s, x, L::kCount, to_float, rows);
  const Rows read{rows, s.padded()};
  if (s.scale && s.packed) multiply_columns<L, true, false>(threads, all, read);
  else if (s.scale) multiply_columns<L, false, false>(threads, all, read);
  else if constexpr (std::is_same_v<S, float>) multiply_columns<L, false, true>(threads, all, read);
  scratch.trim(kKeptRows);
}

}  // namespace jaxquant
