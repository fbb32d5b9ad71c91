// IEEE half precision to float, one number at a time.
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
