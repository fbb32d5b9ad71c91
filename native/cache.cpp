#include "cache.hpp"

#include <cstring>
#include <new>

#include "engine.hpp"

extern "C" {

acttail_cache* acttail_cache_new(const acttail_engine* engine, int64_t capacity) {
  if (engine == nullptr || capacity < 1) return nullptr;
  try {
    const acttail_model& m = engine->model;
    auto cache = std::make_unique<acttail_cache>();
    cache->format = m.kv_format;
    cache->blocks = m.blocks;
    cache->kv_heads = m.kv_heads;
    cache->head_dim = m.head_dim;
    cache->width = (m.head_dim + 15) / 16 * 16;
    cache->capacity = capacity;
    cache->length = 0;
    // Not initialised: a page that no position has reached yet takes no memory.
    cache->data.reset(new uint8_t[static_cast<size_t>(2 * m.blocks * m.kv_heads * cache->slab())]);
    if (m.kv_format == acttail::kKvInt8) {
      cache->scales.resize(static_cast<size_t>(2 * m.blocks * m.kv_heads * capacity));
    }
    return cache.release();
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void acttail_cache_free(acttail_cache* cache) { delete cache; }

int64_t acttail_cache_length(const acttail_cache* cache) { return cache->length; }

int64_t acttail_cache_bytes(const acttail_cache* cache) {
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
      block >= cache->blocks || first < 0 || count < 0 || first + count > cache->capacity) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  const acttail::Kernels& kernels = acttail::kernels();
  const int64_t bytes = cache->width * acttail::kv_bytes(cache->format);
  std::vector<float> padded(static_cast<size_t>(cache->width), 0.0f);
  float unused = 0;
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t h = 0; h < cache->kv_heads; ++h) {
      const int64_t from = (t * cache->kv_heads + h) * cache->head_dim, at = first + t;
      float* ks = cache->key_scales(block, h);
      float* vs = cache->value_scales(block, h);
      std::memcpy(padded.data(), keys + from, sizeof(float) * static_cast<size_t>(cache->head_dim));
      kernels.encode_kv(cache->format, padded.data(), cache->width,
                        cache->keys(block, h) + at * bytes, ks ? ks + at : &unused);
      std::memcpy(padded.data(), values + from, sizeof(float) * static_cast<size_t>(cache->head_dim));
      kernels.encode_kv(cache->format, padded.data(), cache->width,
                        cache->values(block, h) + at * bytes, vs ? vs + at : &unused);
    }
  }
  return ACTTAIL_OK;
}

int acttail_cache_read(acttail_cache* cache, int64_t block, int64_t first, int64_t count, float* keys,
                       float* values) {
  if (cache == nullptr || keys == nullptr || values == nullptr || block < 0 ||
      block >= cache->blocks || first < 0 || count < 0 || first + count > cache->length) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  const acttail::Kernels& kernels = acttail::kernels();
  const int64_t bytes = cache->width * acttail::kv_bytes(cache->format);
  std::vector<float> padded(static_cast<size_t>(cache->width));
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t h = 0; h < cache->kv_heads; ++h) {
      const int64_t to = (t * cache->kv_heads + h) * cache->head_dim, at = first + t;
      const float* ks = cache->key_scales(block, h);
      const float* vs = cache->value_scales(block, h);
      kernels.decode_kv(cache->format, cache->keys(block, h) + at * bytes, ks ? ks[at] : 1.0f,
                        cache->width, padded.data());
      std::memcpy(keys + to, padded.data(), sizeof(float) * static_cast<size_t>(cache->head_dim));
      kernels.decode_kv(cache->format, cache->values(block, h) + at * bytes, vs ? vs[at] : 1.0f,
                        cache->width, padded.data());
      std::memcpy(values + to, padded.data(), sizeof(float) * static_cast<size_t>(cache->head_dim));
    }
  }
  return ACTTAIL_OK;
}

}  // extern "C"
