// The KV cache of one sequence.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "engine.h"
#include "formats.hpp"

struct acttail_cache {
  int32_t format;
  int64_t blocks, kv_heads, head_dim, width, capacity, length;
  // Per block and head: capacity x width elements of keys, then the same of values.
  std::unique_ptr<uint8_t[]> data;
  std::vector<float> scales;  // of scaled formats: per block, head, key/value and position

  // Whether it was made for engines of this model's shape.
  bool fits(const acttail_model& m) const {
    return format == m.kv_format && blocks == m.blocks && kv_heads == m.kv_heads && head_dim == m.head_dim &&
           (m.position == nullptr || capacity <= m.positions);
  }
  int64_t position_bytes() const { return width * acttail::kKvTraits[format].bytes; }
  int64_t slab() const { return capacity * position_bytes(); }
  uint8_t* keys(int64_t block, int64_t head) const {
    return data.get() + 2 * (block * kv_heads + head) * slab();
  }
  uint8_t* values(int64_t block, int64_t head) const { return keys(block, head) + slab(); }
  float* key_scales(int64_t block, int64_t head) {
    return scales.empty() ? nullptr : scales.data() + 2 * (block * kv_heads + head) * capacity;
  }
  float* value_scales(int64_t block, int64_t head) {
    float* k = key_scales(block, head);
    return k == nullptr ? nullptr : k + capacity;
  }
};
