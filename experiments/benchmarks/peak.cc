// The most that a machine does: int8 multiply-adds on registers alone, and a copy of memory.
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif
#if defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

template <class Body>
void on_threads(int64_t threads, Body body) {
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(body, i);
  body(0);
  for (std::thread& thread : others) thread.join();
}

#if defined(__AMX_INT8__) && defined(__linux__)

bool has_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

constexpr int64_t kTileOperations = 4 * 2 * 16 * 16 * 64;  // of four products of tiles

void multiply_tiles(int64_t times) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = 16;
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t i = 0; i < times; ++i) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
}

#else
bool has_tiles() { return false; }
constexpr int64_t kTileOperations = 0;
void multiply_tiles(int64_t) {}
#endif

#if defined(__AVX512VNNI__)

constexpr int64_t kVectorOperations = 12 * 2 * 64;  // of twelve products of vectors

void multiply_vectors(int64_t times) {
  __m512i sums[12];
  __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  for (__m512i& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < times; ++i) {
    for (__m512i& sum : sums) sum = _mm512_dpbusd_epi32(sum, a, b);
    __asm__ volatile("" : "+v"(a), "+v"(b));  // so that no product is known beforehand
  }
  for (__m512i& sum : sums) __asm__ volatile("" : : "v"(sum));
}

#else
constexpr int64_t kVectorOperations = 0;
void multiply_vectors(int64_t) {}
#endif

}  // namespace

// Runs at least `operations` int8 multiplications and additions on each thread, and returns how
// many; 0 where the compiler targets neither AMX nor AVX512-VNNI.
extern "C" int64_t multiply_int8(int64_t threads, int64_t operations) {
  const bool tiles = has_tiles();
  const int64_t each = tiles ? kTileOperations : kVectorOperations;
  if (!each) return 0;
  const int64_t times = operations / each + 1;
  on_threads(threads, [&](int64_t) { tiles ? multiply_tiles(times) : multiply_vectors(times); });
  return threads * times * each;
}

// Copies `bytes` from one buffer to another, each thread its part.
extern "C" void copy_bytes(int64_t threads, const char* from, char* to, int64_t bytes) {
  const int64_t part = bytes / threads;
  on_threads(threads, [&](int64_t i) { std::memcpy(to + i * part, from + i * part, part); });
}
