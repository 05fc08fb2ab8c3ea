// Products of many rows x [M, K] with matrices [K, N] of stored integers.
//
// With many rows the sums take longer than the memory.  A panel, some neighbouring columns, becomes
// floats that stay in the cache of a core; all rows meet it there, some of them at a time:
//
//   y = sum (x * (q * scale))
//
// A sum goes along K from the first to the last, whatever the panel, the tile and the thread.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "stored.h"

namespace jaxquant {

constexpr int64_t kManyRows = 17;         // from which on this is faster than `multiply_stored`
constexpr int64_t kRowsOfTask = 64;       // at least, as each task makes floats of its panel anew
constexpr int64_t kPanelLength = 1 << 11;  // places along K of a panel: half a megabyte at most
constexpr int kTileRows = 6;

// How many vectors of columns a panel has: the sums of a tile, its weights and a number of x stay in
// registers.
template <class L>
constexpr int panel_vectors() { return L::sums_of(kTileRows) >= 4 ? 4 : 2; }

// The floats of `count` columns from `column` at places [first, last) along K: [K, kVectors], zeros
// beside the columns.
template <class L, int kVectors, bool kPart, class S>
void fill_panel(const Stored<S>& s, int64_t first, int64_t last, int64_t column, int64_t count,
                float* to) {
  constexpr int kLanes = L::kCount;
  const typename L::Codes codes(s.codes);
  typename L::Floats scale[kVectors];
  int64_t group = -1;
  const auto bytes = [&](const int8_t* from, int64_t left) {
    if constexpr (kPart) return L::bytes(from, left);
    else return L::bytes(from);
  };
  const int64_t each = s.packed ? 2 : 1;
  for (int64_t k = first; k < last; k += each, to += each * kVectors * kLanes) {
    const bool is_new = k / s.size != group;
    group = k / s.size;
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = std::clamp<int64_t>(count - v * kLanes, 0, kLanes);
      const int64_t at = column + v * kLanes;
      if (is_new) scale[v] = L::load(s.scale + group * s.columns + at, left);
      const auto read = bytes(s.weights + k / each * s.columns + at, left);
      typename L::Floats low, high;
      if (s.packed) L::halves(read, codes, low, high);
      else low = L::floats(read);
      low *= scale[v];
      std::memcpy(to + v * kLanes, &low, sizeof(low));
      if (!s.packed || k + 1 == last) continue;
      high *= scale[v];
      std::memcpy(to + (kVectors + v) * kLanes, &high, sizeof(high));
    }
  }
}

// kRows rows of x times a panel: the sums go on from those in `out` but at the first place.
template <class L, int kRows, int kVectors>
void panel_tile(const Rows& x, int64_t row, int64_t first, int64_t last, const float* panel,
                float* out, int64_t columns, int64_t count) {
  constexpr int kLanes = L::kCount;
  typename L::Floats sums[kRows][kVectors] = {};
  const auto left = [&](int v) { return std::clamp<int64_t>(count - v * kLanes, 0, kLanes); };
  if (first) {
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v)
        sums[r][v] = L::load(out + (row + r) * columns + v * kLanes, left(v));
  }
  const float* in = x.data + row * x.stride;
  for (int64_t k = first; k < last; ++k, panel += kVectors * kLanes) {
    typename L::Floats weights[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) weights[v] = L::load(panel + v * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const float number = in[r * x.stride + k];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] += weights[v] * number;
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      std::memcpy(out + (row + r) * columns + v * kLanes, &sums[r][v], 4 * left(v));
}

// Rows [row, end) in tiles of kRows, and of one less for what those leave.
template <class L, int kVectors, int kRows = kTileRows>
void panel_rows(const Rows& x, int64_t row, int64_t end, int64_t first, int64_t last,
                const float* panel, float* out, int64_t columns, int64_t count) {
  for (; row + kRows <= end; row += kRows)
    panel_tile<L, kRows, kVectors>(x, row, first, last, panel, out, columns, count);
  if constexpr (kRows > 1)
    panel_rows<L, kVectors, kRows - 1>(x, row, end, first, last, panel, out, columns, count);
}

// The products with vectors of the kind `L`: of floats, with matrices [K, N] that differ in their
// columns alone.
template <class L, class S>
void multiply_panels(Threads& threads, const std::vector<Stored<S>>& all, const Rows& x) {
  constexpr int kVectors = panel_vectors<L>();
  constexpr int64_t kColumns = kVectors * L::kCount;
  const int64_t rows = all[0].rows, length = all[0].length;
  int64_t panels = 0;
  for (const Stored<S>& s : all) panels += ceil_div(s.columns, kColumns);
  if (panels == 0) return;
  const int64_t wanted = threads.count() == 1 ? 1 : ceil_div(4 * threads.count(), panels);
  const int64_t parts = std::min(wanted, ceil_div(rows, kRowsOfTask));
  const int64_t part = round_up(ceil_div(rows, parts), kTileRows);
  parallel_for(threads, panels * parts, [&](int64_t task) {
    int64_t panel = task / parts;
    size_t which = 0;
    for (; panel >= ceil_div(all[which].columns, kColumns); ++which)
      panel -= ceil_div(all[which].columns, kColumns);
    const Stored<S>& s = all[which];
    const int64_t column = panel * kColumns, count = std::min(kColumns, s.columns - column);
    const int64_t start = task % parts * part, end = std::min(rows, start + part);
    float* const out = static_cast<float*>(s.out) + column;
    static thread_local Scratch scratch;
    const int64_t most = std::min(length, kPanelLength);
    float* floats = reinterpret_cast<float*>(scratch.reserve(most * kColumns * sizeof(float)));
    for (int64_t first = 0; first < length; first += kPanelLength) {
      const int64_t last = std::min(first + kPanelLength, length);
      const auto fill =
          count < kColumns ? fill_panel<L, kVectors, true, S> : fill_panel<L, kVectors, false, S>;
      fill(s, first, last, column, count, floats);
      panel_rows<L, kVectors>(x, start, end, first, last, floats, out, s.columns, count);
    }
  });
}

// The products in the form that is faster for so many rows; see `multiply_stored`.
template <class L, class S, class X, class F>
void multiply_any(Threads& threads, const std::vector<Stored<S>>& all, const X* x,
                  const F& to_float) {
  if (all.empty() || all[0].rows < kManyRows || !all[0].sums_first || !all[0].scale)
    return multiply_stored<L>(threads, all, x, to_float);
  const int64_t rows = all[0].rows, length = all[0].length;
  if constexpr (std::is_same_v<X, float>) {
    multiply_panels<L>(threads, all, {x, length});
  } else {
    std::vector<float> floats(rows * length);
    parallel_for(threads, rows, [&](int64_t row) {
      for (int64_t k = row * length; k < (row + 1) * length; ++k) floats[k] = to_float(x[k]);
    });
    multiply_panels<L>(threads, all, {floats.data(), length});
  }
}

}  // namespace jaxquant
