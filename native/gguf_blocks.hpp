// The blocks of GGUF files taken apart (ggml-common.h says how they lie): levels, scales and minima as they are.
#pragma once

#include <cstdint>
#include <cstring>

#include "formats.hpp"

namespace acttail {

// Weights of the longest block.
constexpr int kMostInputs = 256;

// The numbers of one block of one output.
struct Block {
  uint8_t* level;         // [inputs]
  uint16_t scale, minimum;
  uint8_t sub_scale[16], sub_minimum[8];
};

// ggml's kvalues_iq4nl.
constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static inline uint16_t half_at(const uint8_t* p) {
  uint16_t h;
  std::memcpy(&h, p, sizeof h);
  return h;
}

// Q4_K's and Q5_K's twelve bytes of six-bit scales and minima.
static inline void six_bits(const uint8_t* p, Block& b) {
  for (int g = 0; g < 4; ++g) {
    b.sub_scale[g] = p[g] & 63;
    b.sub_minimum[g] = p[4 + g] & 63;
    b.sub_scale[4 + g] = static_cast<uint8_t>((p[8 + g] & 15) | (p[g] >> 6 << 4));
    b.sub_minimum[4 + g] = static_cast<uint8_t>((p[8 + g] >> 4) | (p[4 + g] >> 6 << 4));
  }
}

static inline void read_q4_k(const uint8_t* p, Block& b) {
  b.scale = half_at(p);
  b.minimum = half_at(p + 2);
  six_bits(p + 4, b);
  const uint8_t* q = p + 16;
  for (int c = 0; c < 4; ++c) {
    for (int i = 0; i < 32; ++i) {
      b.level[64 * c + i] = q[32 * c + i] & 15;
      b.level[64 * c + 32 + i] = q[32 * c + i] >> 4;
    }
  }
}

static inline void read_q5_k(const uint8_t* p, Block& b) {
  b.scale = half_at(p);
  b.minimum = half_at(p + 2);
  six_bits(p + 4, b);
  const uint8_t *top = p + 16, *q = p + 48;
  for (int c = 0; c < 4; ++c) {
    for (int i = 0; i < 32; ++i) {
      b.level[64 * c + i] = static_cast<uint8_t>((q[32 * c + i] & 15) | (top[i] >> (2 * c) & 1) << 4);
      b.level[64 * c + 32 + i] = static_cast<uint8_t>(q[32 * c + i] >> 4 | (top[i] >> (2 * c + 1) & 1) << 4);
    }
  }
}

static inline void read_q6_k(const uint8_t* p, Block& b) {
  const uint8_t *q = p, *top = p + 128;
  for (int half = 0; half < 2; ++half, q += 64, top += 32) {
    uint8_t* level = b.level + 128 * half;
    for (int i = 0; i < 32; ++i) {
      level[i] = static_cast<uint8_t>((q[i] & 15) | (top[i] & 3) << 4);
      level[32 + i] = static_cast<uint8_t>((q[32 + i] & 15) | (top[i] >> 2 & 3) << 4);
      level[64 + i] = static_cast<uint8_t>(q[i] >> 4 | (top[i] >> 4 & 3) << 4);
      level[96 + i] = static_cast<uint8_t>(q[32 + i] >> 4 | (top[i] >> 6) << 4);
    }
  }
  std::memcpy(b.sub_scale, p + 192, 16);
  b.scale = half_at(p + 208);
}

static inline void five_bits(const uint8_t* top, const uint8_t* q, uint8_t* level) {
  uint32_t bits;
  std::memcpy(&bits, top, sizeof bits);
  for (int i = 0; i < 16; ++i) {
    level[i] = static_cast<uint8_t>((q[i] & 15) | (bits >> i & 1) << 4);
    level[16 + i] = static_cast<uint8_t>(q[i] >> 4 | (bits >> (16 + i) & 1) << 4);
  }
}

static inline void read_q5_0(const uint8_t* p, Block& b) {
  b.scale = half_at(p);
  five_bits(p + 2, p + 6, b.level);
}

static inline void read_q5_1(const uint8_t* p, Block& b) {
  b.scale = half_at(p);
  b.minimum = half_at(p + 2);
  five_bits(p + 4, p + 8, b.level);
}

static inline void four_bits(const uint8_t* q, uint8_t* level) {
  for (int i = 0; i < 16; ++i) {
    level[i] = q[i] & 15;
    level[16 + i] = q[i] >> 4;
  }
}

static inline void read_q4_0(const uint8_t* p, Block& b) {
  b.scale = half_at(p);
  four_bits(p + 2, b.level);
}

static inline void read_q4_1(const uint8_t* p, Block& b) {
  b.scale = half_at(p);
  b.minimum = half_at(p + 2);
  four_bits(p + 4, b.level);
}

// Levels of one byte are signed.
static inline void read_q8_0(const uint8_t* p, Block& b) {
  b.scale = half_at(p);
  std::memcpy(b.level, p + 2, 32);
}

static inline void read_iq4_nl(const uint8_t* p, Block& b) {
  b.scale = half_at(p);
  four_bits(p + 2, b.level);
  for (int i = 0; i < 32; ++i) b.level[i] = static_cast<uint8_t>(kIq4Values[b.level[i]]);
}

// Three bits and a six-bit scale for every 16, both around a middle: as Q6_K has them.
static inline void read_q3_k(const uint8_t* p, Block& b) {
  const uint8_t *top = p, *q = p + 32, *scales = p + 96;
  for (int half = 0; half < 2; ++half, q += 32) {
    for (int part = 0; part < 4; ++part) {
      uint8_t* level = b.level + 128 * half + 32 * part;
      for (int i = 0; i < 32; ++i) {
        const int upper = top[i] >> (4 * half + part) & 1;
        level[i] = static_cast<uint8_t>(32 - 4 + (q[i] >> (2 * part) & 3) + 4 * upper);
      }
    }
  }
  for (int g = 0; g < 16; ++g) {
    const int low = scales[g % 8] >> (g / 8 * 4) & 15, high = scales[8 + g % 4] >> (g / 4 * 2) & 3;
    b.sub_scale[g] = static_cast<uint8_t>(low + 16 * high - 32);
  }
  b.scale = half_at(p + 108);
}

// A kind of blocks that some format holds number by number.
struct Kind {
  int32_t type;    // ggml's number
  int32_t format;  // that holds it, input-major
  int64_t inputs, bytes;  // of a block
  void (*read)(const uint8_t*, Block&);
};

constexpr int32_t kTypeQ41 = 3;

constexpr Kind kKinds[] = {
    {2, kInt4, 32, 18, read_q4_0},   {3, kInt4, 32, 20, read_q4_1},    {6, kQ50, 32, 22, read_q5_0},
    {7, kQ51, 32, 24, read_q5_1},    {8, kInt8, 32, 34, read_q8_0},    {11, kQ6K, 256, 110, read_q3_k},
    {12, kQ4K, 256, 144, read_q4_k}, {13, kQ5K, 256, 176, read_q5_k},  {14, kQ6K, 256, 210, read_q6_k},
    {20, kInt8, 32, 18, read_iq4_nl},
};

static inline const Kind* kind_of(int32_t type) {
  for (const Kind& kind : kKinds) {
    if (kind.type == type) return &kind;
  }
  return nullptr;
}

}  // namespace acttail
