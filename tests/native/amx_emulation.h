// The tile instructions of AMX in plain C++, so that its kernel runs on any processor with AVX-512.
//
// To be included before the kernels.  What the instructions do is as in Intel's manual: a tile has
// up to 16 rows of 64 bytes, and a product multiplies rows of four bytes with columns of such.
#pragma once

#ifndef __AMX_TILE__
#define __AMX_TILE__ 1
#endif
#ifndef __AMX_INT8__
#define __AMX_INT8__ 1
#endif
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace emulated {

struct Tile {
  int64_t rows = 0, row_bytes = 0;
  uint8_t bytes[16][64] = {};
};

inline thread_local Tile tiles[8];

inline void load_config(const void* config) {
  const auto* bytes = static_cast<const uint8_t*>(config);
  for (int i = 0; i < 8; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
    tiles[i] = Tile{bytes[48 + i], row_bytes, {}};
  }
}

inline void release() {
  for (Tile& tile : tiles) tile = Tile{};
}

inline void zero(int tile) { std::memset(tiles[tile].bytes, 0, sizeof(tiles[tile].bytes)); }

inline void load(int tile, const void* from, ptrdiff_t stride) {
  Tile& to = tiles[tile];
  for (int64_t i = 0; i < to.rows; ++i)
    std::memcpy(to.bytes[i], static_cast<const uint8_t*>(from) + i * stride, to.row_bytes);
}

inline void store(int tile, void* to, ptrdiff_t stride) {
  const Tile& from = tiles[tile];
  for (int64_t i = 0; i < from.rows; ++i)
    std::memcpy(static_cast<uint8_t*>(to) + i * stride, from.bytes[i], from.row_bytes);
}

// The sums of tile `to` take in the products of `left`, of type `Left`, and of signed `right`.
template <class Left>
void multiply(int to, int left, int right) {
  for (int64_t i = 0; i < tiles[to].rows; ++i) {
    for (int64_t column = 0; column < tiles[to].row_bytes / 4; ++column) {
      int32_t sum;
      std::memcpy(&sum, tiles[to].bytes[i] + 4 * column, 4);
      for (int64_t k = 0; k < tiles[left].row_bytes; ++k) {
        const auto a = static_cast<Left>(tiles[left].bytes[i][k]);
        const auto b = static_cast<int8_t>(tiles[right].bytes[k / 4][4 * column + k % 4]);
        sum += int32_t(a) * int32_t(b);
      }
      std::memcpy(tiles[to].bytes[i] + 4 * column, &sum, 4);
    }
  }
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbusd
#define _tile_loadconfig(config) emulated::load_config(config)
#define _tile_release() emulated::release()
#define _tile_zero(tile) emulated::zero(tile)
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_dpbssd(to, left, right) emulated::multiply<int8_t>(to, left, right)
#define _tile_dpbusd(to, left, right) emulated::multiply<uint8_t>(to, left, right)
