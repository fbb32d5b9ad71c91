// Eight float lanes in plain C++, which the compiler turns into whatever the target has (SSE2, NEON).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.hpp"

// Unnamed: the same names in another instruction set's translation unit are other functions.
namespace {
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
// Of x where a < b, of y elsewhere, NaN included.
inline F less(F a, F b, F x, F y) {
  return each([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
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
inline F load_f16(const uint16_t* p) {
  return each([=](int i) { return half_to_float(p[i]); });
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

// Integer vectors of as many bytes as a vector of floats has, in 128-bit lanes: low_* and high_* interleave the
// lower and upper halves of each lane of a and b, as bytes or as 16-bit words.
struct I {
  uint8_t v[4 * W];
};
constexpr int kBytes = 4 * W;

inline I load_int(const void* p) {
  I r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store_int(void* p, const I& a) { std::memcpy(p, a.v, sizeof a.v); }
// The words of type T of up to two vectors, one by one.
template <typename T, typename Op>
inline I words(const I& a, const I& b, Op op) {
  constexpr int n = kBytes / static_cast<int>(sizeof(T));
  T x[n], y[n];
  std::memcpy(x, a.v, sizeof x);
  std::memcpy(y, b.v, sizeof y);
  for (int i = 0; i < n; ++i) x[i] = static_cast<T>(op(x[i], y[i]));
  return load_int(x);
}
inline I splat(int32_t v) {
  int32_t all[W];
  for (int i = 0; i < W; ++i) all[i] = v;
  return load_int(all);
}
// The same 16 bytes in every lane; the same 32 in every two lanes.
inline I repeat16(const void* p) {
  I r;
  std::memcpy(r.v, p, 16);
  std::memcpy(r.v + 16, p, 16);
  return r;
}
inline I repeat32(const void* p) { return load_int(p); }
// Parts of `size` bytes of one half of each lane of a and b, by turns.
inline I zip(const I& a, const I& b, int size, int half) {
  I r;
  for (int i = 0; i < kBytes; ++i) {
    const int lane = i / 16 * 16, part = i % 16 / size;
    const int from = lane + 8 * half + part / 2 * size + i % size;
    r.v[i] = part % 2 ? b.v[from] : a.v[from];
  }
  return r;
}
inline I low_bytes(const I& a, const I& b) { return zip(a, b, 1, 0); }
inline I high_bytes(const I& a, const I& b) { return zip(a, b, 1, 1); }
inline I low_words(const I& a, const I& b) { return zip(a, b, 2, 0); }
inline I high_words(const I& a, const I& b) { return zip(a, b, 2, 1); }
inline I both(const I& a, const I& b) {
  return words<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x & y; });
}
inline I either(const I& a, const I& b) {
  return words<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x | y; });
}
// Of 16-bit words.
template <int N>
inline I left16(const I& a) {
  return words<uint16_t>(a, a, [](unsigned x, unsigned) { return x << N; });
}
template <int N>
inline I right16(const I& a) {
  return words<uint16_t>(a, a, [](unsigned x, unsigned) { return x >> N; });
}
// Of 32-bit words.
template <int N>
inline I left32(const I& a) {
  return words<uint32_t>(a, a, [](uint32_t x, uint32_t) { return x << N; });
}
inline I right32(const I& a, const I& counts) {
  return words<uint32_t>(a, counts, [](uint32_t x, uint32_t n) { return x >> n; });
}
inline I add32(const I& a, const I& b) {
  return words<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x + y; });
}
inline I mul32(const I& a, const I& b) {
  return words<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x * y; });
}
// W bytes, one per 32-bit word.
inline I widen_unsigned(const void* p) {
  int32_t wide[W];
  for (int i = 0; i < W; ++i) wide[i] = static_cast<const uint8_t*>(p)[i];
  return load_int(wide);
}
inline I widen_signed(const void* p) {
  int32_t wide[W];
  for (int i = 0; i < W; ++i) wide[i] = static_cast<const int8_t*>(p)[i];
  return load_int(wide);
}
// To the nearest, ties to even.
inline I to_int(const F& a) {
  int32_t v[W];
  for (int i = 0; i < W; ++i) v[i] = static_cast<int32_t>(std::lrint(a.v[i]));
  return load_int(v);
}
inline F to_float(const I& a) {
  int32_t v[W];
  std::memcpy(v, a.v, sizeof v);
  return each([&](int i) { return static_cast<float>(v[i]); });
}

// Adds the products of four unsigned bytes of a and signed ones of b to each 32-bit word of sums; kept in pairs
// of 16 bits where kPairs; whole() makes them one.
constexpr bool kPairs = false;
inline I dots(const I& sums, const I& a, const I& b) {
  uint32_t s[W];
  std::memcpy(s, sums.v, sizeof s);
  for (int i = 0; i < W; ++i) {
    int32_t four = 0;
    for (int e = 4 * i; e < 4 * i + 4; ++e) four += a.v[e] * static_cast<int8_t>(b.v[e]);
    s[i] += static_cast<uint32_t>(four);
  }
  return load_int(s);
}
inline I whole(const I& sums) { return sums; }

inline void prefetch(const void*) {}
inline void prefetch_near(const void*) {}

}  // namespace simd
}  // namespace
