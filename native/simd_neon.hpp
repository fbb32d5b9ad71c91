// Eight float lanes in two registers, for AArch64, where NEON is part of the baseline.
#pragma once

#include <arm_neon.h>

#include <cstdint>

// Unnamed: the same names in another instruction set's translation unit are other functions.
namespace {
namespace simd {

constexpr int W = 8;
struct F {
  float32x4_t a, b;
};

inline F zero() { return {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)}; }
inline F set1(float v) { return {vdupq_n_f32(v), vdupq_n_f32(v)}; }
inline F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
inline void store(float* p, F v) {
  vst1q_f32(p, v.a);
  vst1q_f32(p + 4, v.b);
}
inline F add(F x, F y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b)}; }
inline F sub(F x, F y) { return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b)}; }
inline F mul(F x, F y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
inline F div(F x, F y) { return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b)}; }
// The second operand where the comparison fails, NaN included, as on the other instruction sets.
inline F min(F x, F y) {
  return {vbslq_f32(vcltq_f32(x.a, y.a), x.a, y.a), vbslq_f32(vcltq_f32(x.b, y.b), x.b, y.b)};
}
inline F max(F x, F y) {
  return {vbslq_f32(vcgtq_f32(x.a, y.a), x.a, y.a), vbslq_f32(vcgtq_f32(x.b, y.b), x.b, y.b)};
}
// Of x where a < b, of y elsewhere, NaN included.
inline F less(F a, F b, F x, F y) {
  return {vbslq_f32(vcltq_f32(a.a, b.a), x.a, y.a), vbslq_f32(vcltq_f32(a.b, b.b), x.b, y.b)};
}
inline F fma(F x, F y, F z) { return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)}; }
inline F round(F x) { return {vrndnq_f32(x.a), vrndnq_f32(x.b)}; }

// p * 2^n for integral n, in two steps so that results below 2^-126 are not flushed early.
inline float32x4_t scale2(float32x4_t p, float32x4_t n) {
  const int32x4_t whole = vcvtnq_s32_f32(n);
  const int32x4_t half = vshrq_n_s32(whole, 1);
  const auto power = [](int32x4_t e) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(e, vdupq_n_s32(127)), 23));
  };
  return vmulq_f32(vmulq_f32(p, power(half)), power(vsubq_s32(whole, half)));
}
inline F scale2(F p, F n) { return {scale2(p.a, n.a), scale2(p.b, n.b)}; }

inline float sum(F v) { return vaddvq_f32(vaddq_f32(v.a, v.b)); }
inline void sum_four(const F* v, float* out) {
  for (int i = 0; i < 4; ++i) out[i] = sum(v[i]);
}

inline F load_bf16(const uint16_t* p) {
  const uint16x8_t raw = vld1q_u16(p);
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(raw), 16)),
          vreinterpretq_f32_u32(vshll_n_u16(vget_high_u16(raw), 16))};
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline uint16x4_t to_bf16(float32x4_t v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
  const uint32x4_t number = vceqq_f32(v, v);
  return vmovn_u32(vbslq_u32(number, vshrq_n_u32(up, 16), vdupq_n_u32(0x7FC0)));
}
inline void store_bf16(uint16_t* p, F v) { vst1q_u16(p, vcombine_u16(to_bf16(v.a), to_bf16(v.b))); }

inline F load_f16(const uint16_t* p) {
  const float16x8_t raw = vreinterpretq_f16_u16(vld1q_u16(p));
  return {vcvt_f32_f16(vget_low_f16(raw)), vcvt_f32_f16(vget_high_f16(raw))};
}

inline F load_i8(const int8_t* p) {
  const int16x8_t wide = vmovl_s8(vld1_s8(p));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(wide)))};
}

// Eight bytes, each with two levels.
struct Bytes {
  uint8x8_t v;
};
inline Bytes load_bytes(const uint8_t* p) { return {vld1_u8(p)}; }
// The levels of both tables are evenly spaced, one apart: the first is all that is needed.
struct Levels {
  float32x4_t first;
};
inline Levels levels(const float* sixteen) { return {vdupq_n_f32(sixteen[0])}; }
inline F level(uint8x8_t index, Levels t) {
  const uint16x8_t wide = vmovl_u8(index);
  return {vaddq_f32(vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))), t.first),
          vaddq_f32(vcvtq_f32_u32(vmovl_u16(vget_high_u16(wide))), t.first)};
}
inline F low_nibble(Bytes b, Levels t) { return level(vand_u8(b.v, vdup_n_u8(15)), t); }
inline F high_nibble(Bytes b, Levels t) { return level(vshr_n_u8(b.v, 4), t); }

// Integer vectors of as many bytes as a vector of floats has, in 128-bit lanes: low_* and high_* interleave the
// lower and upper halves of each lane of a and b, as bytes or as 16-bit words.
struct I {
  uint8x16_t a, b;
};
constexpr int kBytes = 32;

inline I from32(uint32x4_t a, uint32x4_t b) { return {vreinterpretq_u8_u32(a), vreinterpretq_u8_u32(b)}; }
inline uint16x8_t as16(uint8x16_t v) { return vreinterpretq_u16_u8(v); }
inline uint32x4_t as32(uint8x16_t v) { return vreinterpretq_u32_u8(v); }
inline I splat(int32_t v) {
  const uint32x4_t all = vdupq_n_u32(static_cast<uint32_t>(v));
  return from32(all, all);
}
inline I load_int(const void* p) {
  const uint8_t* bytes = static_cast<const uint8_t*>(p);
  return {vld1q_u8(bytes), vld1q_u8(bytes + 16)};
}
inline void store_int(void* p, I v) {
  vst1q_u8(static_cast<uint8_t*>(p), v.a);
  vst1q_u8(static_cast<uint8_t*>(p) + 16, v.b);
}
// The same 16 bytes in every lane; the same 32 in every two lanes.
inline I repeat16(const void* p) {
  const uint8x16_t lane = vld1q_u8(static_cast<const uint8_t*>(p));
  return {lane, lane};
}
inline I repeat32(const void* p) { return load_int(p); }
inline I low_bytes(I x, I y) { return {vzip1q_u8(x.a, y.a), vzip1q_u8(x.b, y.b)}; }
inline I high_bytes(I x, I y) { return {vzip2q_u8(x.a, y.a), vzip2q_u8(x.b, y.b)}; }
inline I low_words(I x, I y) {
  return {vreinterpretq_u8_u16(vzip1q_u16(as16(x.a), as16(y.a))),
          vreinterpretq_u8_u16(vzip1q_u16(as16(x.b), as16(y.b)))};
}
inline I high_words(I x, I y) {
  return {vreinterpretq_u8_u16(vzip2q_u16(as16(x.a), as16(y.a))),
          vreinterpretq_u8_u16(vzip2q_u16(as16(x.b), as16(y.b)))};
}
inline I both(I x, I y) { return {vandq_u8(x.a, y.a), vandq_u8(x.b, y.b)}; }
inline I either(I x, I y) { return {vorrq_u8(x.a, y.a), vorrq_u8(x.b, y.b)}; }
// Of 16-bit words.
template <int N>
inline I left16(I v) {
  return {vreinterpretq_u8_u16(vshlq_n_u16(as16(v.a), N)), vreinterpretq_u8_u16(vshlq_n_u16(as16(v.b), N))};
}
template <int N>
inline I right16(I v) {
  return {vreinterpretq_u8_u16(vshrq_n_u16(as16(v.a), N)), vreinterpretq_u8_u16(vshrq_n_u16(as16(v.b), N))};
}
// Of 32-bit words.
template <int N>
inline I left32(I v) { return from32(vshlq_n_u32(as32(v.a), N), vshlq_n_u32(as32(v.b), N)); }
inline I right32(I v, I counts) {
  const auto back = [](uint8x16_t n) { return vnegq_s32(vreinterpretq_s32_u8(n)); };
  return from32(vshlq_u32(as32(v.a), back(counts.a)), vshlq_u32(as32(v.b), back(counts.b)));
}
inline I add32(I x, I y) { return from32(vaddq_u32(as32(x.a), as32(y.a)), vaddq_u32(as32(x.b), as32(y.b))); }
inline I mul32(I x, I y) { return from32(vmulq_u32(as32(x.a), as32(y.a)), vmulq_u32(as32(x.b), as32(y.b))); }
// W bytes, one per 32-bit word.
inline I widen_unsigned(const void* p) {
  const uint16x8_t wide = vmovl_u8(vld1_u8(static_cast<const uint8_t*>(p)));
  return from32(vmovl_u16(vget_low_u16(wide)), vmovl_u16(vget_high_u16(wide)));
}
inline I widen_signed(const void* p) {
  const int16x8_t wide = vmovl_s8(vld1_s8(static_cast<const int8_t*>(p)));
  return from32(vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(wide))),
                vreinterpretq_u32_s32(vmovl_s16(vget_high_s16(wide))));
}
// To the nearest, ties to even.
inline I to_int(F v) {
  return {vreinterpretq_u8_s32(vcvtnq_s32_f32(v.a)), vreinterpretq_u8_s32(vcvtnq_s32_f32(v.b))};
}
inline F to_float(I v) {
  return {vcvtq_f32_s32(vreinterpretq_s32_u8(v.a)), vcvtq_f32_s32(vreinterpretq_s32_u8(v.b))};
}

// Adds the products of four unsigned bytes of x, none above 127, and signed ones of y to each 32-bit word of
// sums; kept in pairs of 16 bits where kPairs; whole() makes them one.
constexpr bool kPairs = false;
inline uint8x16_t dots(uint8x16_t sums, uint8x16_t x, uint8x16_t y) {
  const int8x16_t a = vreinterpretq_s8_u8(x), b = vreinterpretq_s8_u8(y);
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
  const int16x8_t high = vmull_s8(vget_high_s8(a), vget_high_s8(b));
  const int32x4_t four = vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
  return vreinterpretq_u8_s32(vaddq_s32(vreinterpretq_s32_u8(sums), four));
}
inline I dots(I sums, I x, I y) { return {dots(sums.a, x.a, y.a), dots(sums.b, x.b, y.b)}; }
inline I whole(I sums) { return sums; }

inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void prefetch_near(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace simd
}  // namespace
