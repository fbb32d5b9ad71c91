// Sixteen float lanes, for AVX-512 F/BW/VL/DQ. The same names exist for every instruction set, so that
// each kernel is written once.
#pragma once

#include <immintrin.h>

#include <cstdint>

// Unnamed: the same names in another instruction set's translation unit are other functions.
namespace {
namespace simd {

constexpr int W = 16;
using F = __m512;

inline F zero() { return _mm512_setzero_ps(); }
inline F set1(float v) { return _mm512_set1_ps(v); }
inline F load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline F min(F a, F b) { return _mm512_min_ps(a, b); }
inline F max(F a, F b) { return _mm512_max_ps(a, b); }
// Of x where a < b, of y elsewhere, NaN included.
inline F less(F a, F b, F x, F y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
// p * 2^n for integral n.
inline F scale2(F p, F n) { return _mm512_scalef_ps(p, n); }
inline float sum(F v) { return _mm512_reduce_add_ps(v); }
// The sums of four vectors, with half the instructions of four sums.
inline void sum_four(const F* v, float* out) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512 ab = _mm512_add_ps(
      _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))),
      _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(ab), _mm512_extractf32x8_ps(ab, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

inline F load_bf16(const uint16_t* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store_bf16(uint16_t* p, F v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  r = _mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7FC0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
}

inline F load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline F load_i8(const int8_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw));
}

// Sixteen bytes, one per lane, each with two levels.
struct Bytes {
  __m512i v;
};
inline Bytes load_bytes(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
// One shuffle turns four bits into a float: the permutation looks at the low four bits only.
struct Levels {
  __m512 v;
};
inline Levels levels(const float* sixteen) { return {_mm512_loadu_ps(sixteen)}; }
inline F low_nibble(Bytes b, Levels t) { return _mm512_permutexvar_ps(b.v, t.v); }
inline F high_nibble(Bytes b, Levels t) {
  return _mm512_permutexvar_ps(_mm512_srli_epi32(b.v, 4), t.v);
}

// Integer vectors of as many bytes as a vector of floats has, in 128-bit lanes: low_* and high_* interleave the
// lower and upper halves of each lane of a and b, as bytes or as 16-bit words.
using I = __m512i;
constexpr int kBytes = 64;

inline I splat(int32_t v) { return _mm512_set1_epi32(v); }
inline I load_int(const void* p) { return _mm512_loadu_si512(p); }
inline void store_int(void* p, I v) { _mm512_storeu_si512(p, v); }
// The same 16 bytes in every lane; the same 32 in every two lanes.
inline I repeat16(const void* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
inline I repeat32(const void* p) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
inline I low_bytes(I a, I b) { return _mm512_unpacklo_epi8(a, b); }
inline I high_bytes(I a, I b) { return _mm512_unpackhi_epi8(a, b); }
inline I low_words(I a, I b) { return _mm512_unpacklo_epi16(a, b); }
inline I high_words(I a, I b) { return _mm512_unpackhi_epi16(a, b); }
inline I both(I a, I b) { return _mm512_and_si512(a, b); }
inline I either(I a, I b) { return _mm512_or_si512(a, b); }
// Of 16-bit words.
template <int N>
inline I left16(I v) { return _mm512_slli_epi16(v, N); }
template <int N>
inline I right16(I v) { return _mm512_srli_epi16(v, N); }
// Of 32-bit words.
template <int N>
inline I left32(I v) { return _mm512_slli_epi32(v, N); }
inline I right32(I v, I counts) { return _mm512_srlv_epi32(v, counts); }
inline I add32(I a, I b) { return _mm512_add_epi32(a, b); }
inline I mul32(I a, I b) { return _mm512_mullo_epi32(a, b); }
// W bytes, one per 32-bit word.
inline I widen_unsigned(const void* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
inline I widen_signed(const void* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
// To the nearest, ties to even.
inline I to_int(F v) { return _mm512_cvtps_epi32(v); }
inline F to_float(I v) { return _mm512_cvtepi32_ps(v); }

// Adds the products of four unsigned bytes of a and signed ones of b to each 32-bit word of sums; kept in pairs
// of 16 bits where kPairs, so that a pair's products must stay within 32,767; whole() makes them one.
#if defined(__AVX512VNNI__)
constexpr bool kPairs = false;
inline I dots(I sums, I a, I b) { return _mm512_dpbusd_epi32(sums, a, b); }
inline I whole(I sums) { return sums; }
#else
constexpr bool kPairs = true;
inline I dots(I sums, I a, I b) { return _mm512_add_epi16(sums, _mm512_maddubs_epi16(a, b)); }
inline I whole(I sums) { return _mm512_madd_epi16(sums, _mm512_set1_epi16(1)); }
#endif

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
inline void prefetch_near(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace simd
}  // namespace
