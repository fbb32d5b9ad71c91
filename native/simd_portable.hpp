// Eight float lanes in plain C++, which the compiler turns into whatever the target has (SSE2, NEON).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace simd {

constexpr int W = 8;
struct F {
  float v[W];
};

template <typename Op>
inline F each(Op op) {
  F r;
  for (int i = 0; i < W; ++i) r.v[i] = op(i);
  return r;
}

inline F set1(float v) {
  return each([=](int) { return v; });
}
inline F zero() { return set1(0.0f); }
inline F load(const float* p) {
  F r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
inline F add(F a, F b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline F sub(F a, F b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline F mul(F a, F b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline F div(F a, F b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
inline F min(F a, F b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F max(F a, F b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F fma(F a, F b, F c) {
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline F round(F a) {
  return each([&](int i) { return std::nearbyintf(a.v[i]); });
}
inline F scale2(F p, F n) {
  return each([&](int i) { return std::ldexp(p.v[i], static_cast<int>(n.v[i])); });
}
inline float sum(F a) {
  float s = 0;
  for (int i = 0; i < W; ++i) s += a.v[i];
  return s;
}
inline void sum_four(const F* v, float* out) {
  for (int i = 0; i < 4; ++i) out[i] = sum(v[i]);
}
inline float maximum(F a) {
  float m = a.v[0];
  for (int i = 1; i < W; ++i) m = a.v[i] > m ? a.v[i] : m;
  return m;
}

inline float from_bits(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline F load_bf16(const uint16_t* p) {
  return each([=](int i) { return from_bits(static_cast<uint32_t>(p[i]) << 16); });
}
// Rounds to nearest, ties to even; NaN stays NaN.
inline void store_bf16(uint16_t* p, F a) {
  for (int i = 0; i < W; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &a.v[i], sizeof bits);
    const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    p[i] = nan ? 0x7FC0u : static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  }
}
// IEEE half by exponent arithmetic: subnormals come right from the multiplication.
inline float half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(h & 0x7FFFu) << 13;
  if ((h & 0x7C00u) == 0x7C00u) return from_bits(sign | 0x7F800000u | (rest & 0x7FFFFFu));
  return from_bits(sign | 0u) + (sign ? -1.0f : 1.0f) * from_bits(rest) * 5.192296858534828e33f;
}
inline F load_f16(const uint16_t* p) {
  return each([=](int i) { return half(p[i]); });
}
inline F load_i8(const int8_t* p) {
  return each([=](int i) { return static_cast<float>(p[i]); });
}

// Eight bytes, each with two levels.
struct Bytes {
  uint8_t v[W];
};
inline Bytes load_bytes(const uint8_t* p) {
  Bytes b;
  std::memcpy(b.v, p, sizeof b.v);
  return b;
}
struct Levels {
  const float* v;
};
inline Levels levels(const float* sixteen) { return {sixteen}; }
inline F low_nibble(const Bytes& b, Levels t) {
  return each([&](int i) { return t.v[b.v[i] & 15]; });
}
inline F high_nibble(const Bytes& b, Levels t) {
  return each([&](int i) { return t.v[b.v[i] >> 4]; });
}

inline void prefetch(const void*) {}
inline void prefetch_near(const void*) {}

}  // namespace simd
