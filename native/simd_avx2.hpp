// Eight float lanes, for AVX2 + FMA + F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

// Unnamed: the same names in another instruction set's translation unit are other functions.
namespace {
namespace simd {

constexpr int W = 8;
using F = __m256;

inline F zero() { return _mm256_setzero_ps(); }
inline F set1(float v) { return _mm256_set1_ps(v); }
inline F load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, F v) { _mm256_storeu_ps(p, v); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F div(F a, F b) { return _mm256_div_ps(a, b); }
inline F min(F a, F b) { return _mm256_min_ps(a, b); }
inline F max(F a, F b) { return _mm256_max_ps(a, b); }
// Of x where a < b, of y elsewhere, NaN included.
inline F less(F a, F b, F x, F y) { return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

// p * 2^n for integral n, in two steps so that results below 2^-126 are not flushed early.
inline F scale2(F p, F n) {
  const __m256i whole = _mm256_cvtps_epi32(n);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const __m256i rest = _mm256_sub_epi32(whole, half);
  const auto power = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  return _mm256_mul_ps(_mm256_mul_ps(p, power(half)), power(rest));
}

inline float sum(F v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline void sum_four(const F* v, float* out) {
  for (int i = 0; i < 4; ++i) out[i] = sum(v[i]);
}

inline F load_bf16(const uint16_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store_bf16(uint16_t* p, F v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7FC0), nan);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}

inline F load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline F load_i8(const int8_t* p) {
  const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw));
}

// Eight bytes, one per lane, each with two levels.
struct Bytes {
  __m256i v;
};
inline Bytes load_bytes(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
// The permutation has eight entries, so the levels come in two halves that bit 3 chooses between.
struct Levels {
  __m256 low, high;
};
inline Levels levels(const float* sixteen) {
  return {_mm256_loadu_ps(sixteen), _mm256_loadu_ps(sixteen + 8)};
}
inline F level(__m256i index, Levels t) {
  const F low = _mm256_permutevar8x32_ps(t.low, index);
  const F high = _mm256_permutevar8x32_ps(t.high, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
inline F low_nibble(Bytes b, Levels t) { return level(b.v, t); }
inline F high_nibble(Bytes b, Levels t) { return level(_mm256_srli_epi32(b.v, 4), t); }

// Integer vectors of as many bytes as a vector of floats has, in 128-bit lanes: low_* and high_* interleave the
// lower and upper halves of each lane of a and b, as bytes or as 16-bit words.
using I = __m256i;
constexpr int kBytes = 32;

inline I splat(int32_t v) { return _mm256_set1_epi32(v); }
inline I load_int(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_int(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
// The same 16 bytes in every lane; the same 32 in every two lanes.
inline I repeat16(const void* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
inline I repeat32(const void* p) { return load_int(p); }
inline I low_bytes(I a, I b) { return _mm256_unpacklo_epi8(a, b); }
inline I high_bytes(I a, I b) { return _mm256_unpackhi_epi8(a, b); }
inline I low_words(I a, I b) { return _mm256_unpacklo_epi16(a, b); }
inline I high_words(I a, I b) { return _mm256_unpackhi_epi16(a, b); }
inline I both(I a, I b) { return _mm256_and_si256(a, b); }
inline I either(I a, I b) { return _mm256_or_si256(a, b); }
// Of 16-bit words.
template <int N>
inline I left16(I v) { return _mm256_slli_epi16(v, N); }
template <int N>
inline I right16(I v) { return _mm256_srli_epi16(v, N); }
// Of 32-bit words.
template <int N>
inline I left32(I v) { return _mm256_slli_epi32(v, N); }
inline I right32(I v, I counts) { return _mm256_srlv_epi32(v, counts); }
inline I add32(I a, I b) { return _mm256_add_epi32(a, b); }
inline I mul32(I a, I b) { return _mm256_mullo_epi32(a, b); }
// W bytes, one per 32-bit word.
inline I widen_unsigned(const void* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
}
inline I widen_signed(const void* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
}
// To the nearest, ties to even.
inline I to_int(F v) { return _mm256_cvtps_epi32(v); }
inline F to_float(I v) { return _mm256_cvtepi32_ps(v); }

// Adds the products of four unsigned bytes of a and signed ones of b to each 32-bit word of sums; kept in pairs
// of 16 bits where kPairs, so that a pair's products must stay within 32,767; whole() makes them one.
constexpr bool kPairs = true;
inline I dots(I sums, I a, I b) { return _mm256_add_epi16(sums, _mm256_maddubs_epi16(a, b)); }
inline I whole(I sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
inline void prefetch_near(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace simd
}  // namespace
