// One head's keys and values in a KV cache.
#pragma once

#include <cstdint>

namespace acttail {

// Positions of a KV cache that lie together: 4 KB of 64 bf16 numbers, and a multiple of the four that `attend` takes at
// a time.
constexpr int64_t kPage = 32;
constexpr int64_t kMostHeads = 4;  // query heads whose scores `attend` holds at once

// Positions first .. length - 1 are read; the last one comes from `last_*`, so that a thread need not
// wait for another to write it into the cache.
struct KvHead {
  int32_t format;
  int64_t width;  // floats per position, padded to a multiple of 16
  int64_t first;
  int64_t length;
  const uint8_t* const* pages;  // of kPage positions each
  // Where a page has this head's [kPage][width] keys and values, and the [kPage] floats that scale them, in bytes.
  int64_t keys, values, key_scales, value_scales;
  bool scaled;
  const void* last_key;
  const void* last_value;
  float last_key_scale;
  float last_value_scale;
};

}  // namespace acttail
