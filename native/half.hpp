// IEEE half precision to float and back, one number at a time.
#pragma once

#include <cstdint>
#include <cstring>

// Internal linkage: compiled for every instruction set.
static inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(h & 0x7FFFu) << 13;
  float f;
  if ((h & 0x7C00u) == 0x7C00u) {
    const uint32_t bits = sign | 0x7F800000u | (rest & 0x7FFFFFu);
    std::memcpy(&f, &bits, sizeof f);
    return f;
  }
  // Rebias by a product with 2^112, which puts subnormals right as well.
  std::memcpy(&f, &rest, sizeof f);
  f *= 5.192296858534828e33f;
  return sign ? -f : f;
}

// Round to nearest even, as hardware does; an overflow is an infinity.
static inline uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (bits >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
  if (bits < 0x38800000u) {  // subnormal: a sum puts the last bit that counts at the float's own last bit
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3F000000u));
  }
  bits += 0xFFFu + (bits >> 13 & 1u);
  return static_cast<uint16_t>(sign | (bits - 0x38000000u) >> 13);
}
