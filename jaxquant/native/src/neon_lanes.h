// Registers of four float32 or int32, or of 16 bytes, on ARM.
#pragma once

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#define JAXQUANT_NEON 1
#include <arm_neon.h>

#include <cstring>

#include "lane_epilogue.h"
#include "vectors.h"

namespace jaxquant {

struct NeonLanes {
  static constexpr int kCount = 4;
  using Floats = VectorTypes<4>::Floats;
  using Ints = VectorTypes<4>::Ints;

  static Floats splat(float value) { return (Floats)vdupq_n_f32(value); }
  static Ints splat(int32_t value) { return (Ints)vdupq_n_s32(value); }

  static Floats load(const float* from, int64_t n) { return some<Floats>(from, n); }
  static Ints load_ints(const int32_t* from, int64_t n) { return some<Ints>(from, n); }
  static Ints load_bytes(const int8_t* from, int64_t n) {
    uint64_t bytes = 0;
    std::memcpy(&bytes, from, n == kCount ? 4 : n);
    return (Ints)vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(bytes))));
  }
  static void store(float* to, Floats floats, int64_t n) {
    if (n == kCount) vst1q_f32(to, (float32x4_t)floats);
    else std::memcpy(to, &floats, 4 * n);
  }
  static void store_bytes(int8_t* to, Ints ints, int64_t n) {
    const int16x4_t words = vmovn_s32((int32x4_t)ints);
    const int8x8_t bytes = vmovn_s16(vcombine_s16(words, words));
    const uint32_t four = vget_lane_u32(vreinterpret_u32_s8(bytes), 0);
    std::memcpy(to, &four, n == kCount ? 4 : n);
  }
  static Ints splat_words(int16_t value) { return (Ints)vdupq_n_s16(value); }
  static Ints splat_bytes(int8_t value) { return (Ints)vdupq_n_s8(value); }
  static Ints to_words(Ints a, Ints b) {
    return (Ints)vcombine_s16(vqmovn_s32((int32x4_t)a), vqmovn_s32((int32x4_t)b));
  }
  static Ints to_bytes(Ints a, Ints b) {
    return (Ints)vcombine_s8(vqmovn_s16((int16x8_t)a), vqmovn_s16((int16x8_t)b));
  }
  static Ints add_words(Ints a, Ints b) { return (Ints)vqaddq_s16((int16x8_t)a, (int16x8_t)b); }
  static Ints least_bytes(Ints a, Ints b) { return (Ints)vminq_s8((int8x16_t)a, (int8x16_t)b); }
  static Ints most_bytes(Ints a, Ints b) { return (Ints)vmaxq_s8((int8x16_t)a, (int8x16_t)b); }
  static void store_all(int8_t* to, Ints bytes) { vst1q_s8(to, (int8x16_t)bytes); }
  template <int R>
  static void store_two(int8_t* to_a, int8_t* to_b, Ints bytes) {
    static_assert(R == 2, "eight channels of two pixels");
    vst1_s8(to_a, vget_low_s8((int8x16_t)bytes));
    vst1_s8(to_b, vget_high_s8((int8x16_t)bytes));
  }
  static void stream(float* to, Floats floats) { store(to, floats, kCount); }
  static void fence() {}

  static Floats fma(Floats a, Floats b, Floats c) {
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  }
  static Floats least(Floats a, Floats b) {
    return (Floats)vminq_f32((float32x4_t)a, (float32x4_t)b);
  }
  static Floats most(Floats a, Floats b) {
    return (Floats)vmaxq_f32((float32x4_t)a, (float32x4_t)b);
  }
  static Floats floats(Ints ints) { return (Floats)vcvtq_f32_s32((int32x4_t)ints); }
  static Ints rounded(Floats floats) { return (Ints)vcvtnq_s32_f32((float32x4_t)floats); }

 private:
  template <class Vector>
  static Vector some(const void* from, int64_t n) {
    Vector read{};
    std::memcpy(&read, from, n == kCount ? sizeof(read) : 4 * n);
    return read;
  }
};

using NeonSums = LaneSums<NeonLanes>;

// What the depthwise kernels do with registers of 16 bytes.
struct NeonBytes {
  using Vector = NeonLanes::Ints;
  using Sums = NeonSums;
  static constexpr int kBytes = 16;

  static Vector load_ints(const int32_t* from) { return NeonLanes::load_ints(from, 4); }
  static Vector load_bytes(const void* from) {
    return (Vector)vld1q_s8(static_cast<const int8_t*>(from));
  }
  static Vector low_bytes(Vector a, Vector b) { return (Vector)vzip1q_s8((int8x16_t)a, (int8x16_t)b); }
  static Vector high_bytes(Vector a, Vector b) {
    return (Vector)vzip2q_s8((int8x16_t)a, (int8x16_t)b);
  }
  static Vector low_pairs(Vector a, Vector b) { return (Vector)vzip1q_s16((int16x8_t)a, (int16x8_t)b); }
  static Vector high_pairs(Vector a, Vector b) {
    return (Vector)vzip2q_s16((int16x8_t)a, (int16x8_t)b);
  }
  static void store(int8_t* to, Vector bytes, int64_t n) {
    if (n >= kBytes) vst1q_s8(to, (int8x16_t)bytes);
    else std::memcpy(to, &bytes, n);
  }
};

}  // namespace jaxquant

#endif
