// One head's keys and values in a KV cache.
#pragma once

#include <cstdint>

namespace acttail {

constexpr int64_t kMostHeads = 4;  // query heads whose scores `attend` holds at once

// Positions first .. length - 1 are read; the last one comes from `last_*`, so that a thread need not
// wait for another to write it into the cache.
struct KvHead {
  int32_t format;
  int64_t width;  // floats per position, padded to a multiple of 16
  int64_t first;
  int64_t length;
  const void* keys;          // [positions][width]
  const void* values;        // [positions][width]
  const float* key_scale;    // [positions], of scaled formats only
  const float* value_scale;  // [positions], of scaled formats only
  const void* last_key;
  const void* last_value;
  float last_key_scale;
  float last_value_scale;
};

}  // namespace acttail
