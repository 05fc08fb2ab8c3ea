// Vectors of floats, and stored integers as such: what the products of few rows are made of.
//
// The compiler's own vectors, which it makes of whatever the processor has, 4 floats of them or 16.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace jaxquant {

#if defined(__AVX512F__)
constexpr int kLanesHere = 16, kRegistersHere = 32;
#elif defined(__AVX__)
constexpr int kLanesHere = 8, kRegistersHere = 16;
#elif defined(__aarch64__)
constexpr int kLanesHere = 4, kRegistersHere = 32;
#else
constexpr int kLanesHere = 4, kRegistersHere = 16;
#endif

// The compiler's vectors of so many lanes; written out, since sizes that depend on a template's
// arguments are lost on GCC 12.
template <int kLanes>
struct VectorTypes;
#define JAXQUANT_VECTOR_TYPES(lanes)                                   \
  template <>                                                     \
  struct VectorTypes<lanes> {                                         \
    typedef float Floats __attribute__((vector_size(4 * lanes))); \
    typedef int32_t Ints __attribute__((vector_size(4 * lanes))); \
    typedef int8_t Bytes __attribute__((vector_size(lanes)));     \
    typedef uint16_t Halves __attribute__((vector_size(2 * lanes))); \
  }
JAXQUANT_VECTOR_TYPES(4);
JAXQUANT_VECTOR_TYPES(8);
JAXQUANT_VECTOR_TYPES(16);
#undef JAXQUANT_VECTOR_TYPES

// Vectors of `kLanes` floats, of which the processor has `kRegisters`.
template <int kLanes, int kRegisters>
struct Vectors {
  static constexpr int kCount = kLanes;
  using Floats = typename VectorTypes<kLanes>::Floats;
  using Ints = typename VectorTypes<kLanes>::Ints;
  using Bytes = typename VectorTypes<kLanes>::Bytes;
  using Halves = typename VectorTypes<kLanes>::Halves;

  // How many vectors of sums, for each of `rows`, stay in registers beside what they are made of.
  static constexpr int sums_of(int rows) {
    int most = 16;
    while (most > 1 && most * rows > kRegisters - 4) most /= 2;
    return most;
  }

  static Floats load(const float* from) { return read<Floats>(from, sizeof(Floats)); }
  // Floats of bfloat16, which is the upper half of one.
  static Floats load(const uint16_t* from) { return widened(read<Halves>(from, sizeof(Halves))); }
  static Floats load(const uint16_t* from, int64_t count) {
    return widened(read<Halves>(from, 2 * count));
  }
  static float number(float value) { return value; }
  static float number(uint16_t bits) {
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof(value));
    return value;
  }
  static Bytes bytes(const int8_t* from) { return read<Bytes>(from, sizeof(Bytes)); }
  // The first `count` of a vector, zeros behind them.
  static Floats load(const float* from, int64_t count) { return read<Floats>(from, 4 * count); }
  static Bytes bytes(const int8_t* from, int64_t count) { return read<Bytes>(from, count); }

  static Floats floats(Bytes bytes) { return __builtin_convertvector(ints(bytes), Floats); }
  // GCC 12 goes through single bytes where it is left to it.
  static Ints ints(Bytes bytes) {
#if defined(__AVX512F__)
    if constexpr (kLanes == 16) return (Ints)_mm512_cvtepi8_epi32((__m128i)bytes);
#endif
#if defined(__AVX2__)
    if constexpr (kLanes == 8) {
      int64_t eight;
      std::memcpy(&eight, &bytes, sizeof(eight));
      return (Ints)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(eight));
    }
#endif
    return __builtin_convertvector(bytes, Ints);
  }
  static Ints ints(Floats floats) { return __builtin_convertvector(floats, Ints); }
  // The low byte of each.
  static Bytes narrow(Ints ints) {
#if defined(__AVX512F__)
    if constexpr (kLanes == 16) return (Bytes)_mm512_cvtepi32_epi8((__m512i)ints);
#endif
    return __builtin_convertvector(ints, Bytes);
  }

  // What the 16 codes of four bits stand for: values, or integers with their sign where there are none.
  struct Codes {
    explicit Codes(const float* values) : values(values) {
#if defined(__AVX512F__)
      const __m512 integers =
          _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
      table = values ? _mm512_loadu_ps(values) : integers;
#endif
    }
    const float* values;
#if defined(__AVX512F__)
    __m512 table;
#endif
  };

  // What the low and the high half of every byte stand for.
  static void halves(Bytes bytes, const Codes& codes, Floats& low, Floats& high) {
#if defined(__AVX512F__)
    if constexpr (kLanes == 16) {  // the index is in the low four bits of a lane
      const __m512i both = _mm512_cvtepu8_epi32((__m128i)bytes);
      low = (Floats)_mm512_permutexvar_ps(both, codes.table);
      high = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), codes.table);
      return;
    }
#endif
    const Ints both = ints(bytes);
    if (codes.values) {
      low = look_up(codes.values, both & 15);
      high = look_up(codes.values, (both >> 4) & 15);
    } else {
      low = __builtin_convertvector((both << 28) >> 28, Floats);
      high = __builtin_convertvector(both >> 4, Floats);
    }
  }

  // The lanes of a vector, added in pairs of halves.
  static float sum(Floats vector) { return halves_added<float>(vector); }
  static int32_t sum(Ints vector) { return halves_added<int32_t>(vector); }

 private:
  static Floats widened(Halves halves) {
    const Ints words = __builtin_convertvector(halves, Ints) << 16;
    Floats floats;
    std::memcpy(&floats, &words, sizeof(floats));
    return floats;
  }
  template <class Lane, class Vector>
  static Lane halves_added(Vector vector) {
    constexpr int kHere = sizeof(Vector) / sizeof(Lane);
    if constexpr (kHere == 4) {
      return (vector[0] + vector[2]) + (vector[1] + vector[3]);
    } else {
      using Types = VectorTypes<kHere / 2>;
      using Half = std::conditional_t<std::is_same_v<Lane, float>, typename Types::Floats,
                                      typename Types::Ints>;
      Half low, high;
      std::memcpy(&low, &vector, sizeof(Half));
      std::memcpy(&high, reinterpret_cast<const char*>(&vector) + sizeof(Half), sizeof(Half));
      return halves_added<Lane>(low + high);
    }
  }
  static Floats look_up(const float* values, Ints places) {
#if defined(__AVX2__)
    if constexpr (kLanes == 8) return (Floats)_mm256_i32gather_ps(values, (__m256i)places, 4);
#endif
    Floats found;
    for (int lane = 0; lane < kLanes; ++lane) found[lane] = values[places[lane]];
    return found;
  }
  template <class Vector>
  static Vector read(const void* from, int64_t bytes) {
    Vector vector{};
    std::memcpy(&vector, from, bytes);
    return vector;
  }
};

using VectorsHere = Vectors<kLanesHere, kRegistersHere>;

}  // namespace jaxquant
