#include "cache.hpp"

#include <cstring>
#include <limits>

#include "engine.hpp"
#include "guard.hpp"

namespace {

// The storage of one position, as floats on the way in and out.
class Position {
 public:
  explicit Position(const acttail_cache& cache)
      : cache_(cache), floats_(static_cast<size_t>(cache.width), 0.0f) {}

  void write(const float* from, uint8_t* slab, float* scales, int64_t at) {
    std::memcpy(floats_.data(), from, size());
    acttail::kernels().encode_kv(cache_.format, floats_.data(), cache_.width,
                                 slab + at * cache_.position_bytes(), scales ? scales + at : nullptr);
  }
  void read(float* to, const uint8_t* slab, const float* scales, int64_t at) {
    acttail::kernels().decode_kv(cache_.format, slab + at * cache_.position_bytes(),
                                 scales ? scales[at] : 1.0f, cache_.width, floats_.data());
    std::memcpy(to, floats_.data(), size());
  }

 private:
  size_t size() const { return sizeof(float) * static_cast<size_t>(cache_.head_dim); }

  const acttail_cache& cache_;
  std::vector<float> floats_;
};

}  // namespace

extern "C" {

int acttail_cache_new(const acttail_engine* engine, int64_t capacity, acttail_cache** cache) {
  if (cache == nullptr) return ACTTAIL_BAD_ARGUMENT;
  *cache = nullptr;
  if (engine == nullptr || capacity < 1) return ACTTAIL_BAD_ARGUMENT;
  if (engine->model.position != nullptr && capacity > engine->model.positions) return ACTTAIL_BAD_ARGUMENT;
  return acttail::guarded([&]() -> int {
    const acttail_model& m = engine->model;
    auto made = std::make_unique<acttail_cache>();
    made->format = m.kv_format;
    made->blocks = m.blocks;
    made->kv_heads = m.kv_heads;
    made->head_dim = m.head_dim;
    made->width = (m.head_dim + 15) / 16 * 16;
    made->capacity = capacity;
    made->length = 0;
    const int64_t slabs = 2 * m.blocks * m.kv_heads;
    // By turns, for their product alone could wrap; 8 bytes hold an element of any format and its scale.
    int64_t most = std::numeric_limits<int64_t>::max() / 8;
    for (int64_t factor : {int64_t{2} * m.blocks, m.kv_heads, made->width}) most /= factor;
    if (capacity > most) {
      return ACTTAIL_OUT_OF_MEMORY;
    }
    // Not initialised: a page that no position has reached yet takes no memory.
    made->data.reset(new uint8_t[static_cast<size_t>(slabs * made->slab())]);
    if (acttail::kKvTraits[m.kv_format].scaled) {
      made->scales.resize(static_cast<size_t>(slabs * capacity));
    }
    *cache = made.release();
    return ACTTAIL_OK;
  });
}

void acttail_cache_free(acttail_cache* cache) { delete cache; }

int64_t acttail_cache_length(const acttail_cache* cache) { return cache == nullptr ? -1 : cache->length; }

int64_t acttail_cache_bytes(const acttail_cache* cache) {
  if (cache == nullptr) return -1;
  return 2 * cache->blocks * cache->kv_heads * cache->slab() +
         static_cast<int64_t>(cache->scales.size() * sizeof(float));
}

int acttail_cache_truncate(acttail_cache* cache, int64_t length) {
  if (cache == nullptr || length < 0 || length > cache->length) return ACTTAIL_BAD_ARGUMENT;
  cache->length = length;
  return ACTTAIL_OK;
}

int acttail_cache_set_length(acttail_cache* cache, int64_t length) {
  if (cache == nullptr || length < 0 || length > cache->capacity) return ACTTAIL_BAD_ARGUMENT;
  cache->length = length;
  return ACTTAIL_OK;
}

int acttail_cache_write(acttail_cache* cache, int64_t block, int64_t first, int64_t count,
                        const float* keys, const float* values) {
  if (cache == nullptr || keys == nullptr || values == nullptr || block < 0 ||
      block >= cache->blocks || first < 0 || first > cache->capacity || count < 0 || count > cache->capacity - first) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  return acttail::guarded([&] {
    Position position(*cache);
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t h = 0; h < cache->kv_heads; ++h) {
        const int64_t from = (t * cache->kv_heads + h) * cache->head_dim, at = first + t;
        position.write(keys + from, cache->keys(block, h), cache->key_scales(block, h), at);
        position.write(values + from, cache->values(block, h), cache->value_scales(block, h), at);
      }
    }
    return ACTTAIL_OK;
  });
}

int acttail_cache_read(acttail_cache* cache, int64_t block, int64_t first, int64_t count, float* keys,
                       float* values) {
  if (cache == nullptr || keys == nullptr || values == nullptr || block < 0 ||
      block >= cache->blocks || first < 0 || first > cache->length || count < 0 ||
      count > cache->length - first) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  return acttail::guarded([&] {
    Position position(*cache);
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t h = 0; h < cache->kv_heads; ++h) {
        const int64_t to = (t * cache->kv_heads + h) * cache->head_dim, at = first + t;
        position.read(keys + to, cache->keys(block, h), cache->key_scales(block, h), at);
        position.read(values + to, cache->values(block, h), cache->value_scales(block, h), at);
      }
    }
    return ACTTAIL_OK;
  });
}

}  // extern "C"
