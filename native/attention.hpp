// One head's keys and values in a KV cache.
#pragma once

#include <cstdint>

namespace acttail {

enum KvFormat : int32_t { kKvF32 = 0, kKvBf16 = 1, kKvInt8 = 2 };

inline int64_t kv_bytes(int32_t format) {
  return format == kKvF32 ? 4 : format == kKvBf16 ? 2 : 1;
}

constexpr int64_t kMostHeads = 4;  // query heads whose scores `attend` holds at once

// Positions first .. length - 1 are read; the last one comes from `last_*`, so that a thread need not
// wait for another to write it into the cache.
struct KvHead {
  int32_t format;
  int64_t width;         // floats per position, padded to a multiple of 16
  int64_t first;
  int64_t length;
  const void* keys;      // [positions][width]
  const void* values;    // [positions][width]
  const float* key_scale;    // [positions], int8 only
  const float* value_scale;  // [positions], int8 only
  const void* last_key;
  const void* last_value;
  float last_key_scale;
  float last_value_scale;
};

}  // namespace acttail
