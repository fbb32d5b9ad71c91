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

  void write(const float* from, uint8_t* at, float* scale) {
    std::memcpy(floats_.data(), from, size());
    acttail::kernels().encode_kv(cache_.format, floats_.data(), cache_.width, at, scale);
  }
  void read(float* to, const uint8_t* at, const float* scale) {
    acttail::kernels().decode_kv(cache_.format, at, scale ? *scale : 1.0f, cache_.width, floats_.data());
    std::memcpy(to, floats_.data(), size());
  }

 private:
  size_t size() const { return sizeof(float) * static_cast<size_t>(cache_.head_dim); }

  const acttail_cache& cache_;
  std::vector<float> floats_;
};

}  // namespace

int64_t acttail_cache::lacks(int64_t first, int64_t end) const {
  int64_t found = 0;
  for (int64_t p = first / acttail::kPage; p * acttail::kPage < end; ++p) {
    const size_t i = static_cast<size_t>(p);
    found += i >= pages.size() || pages[i].use_count() > 1 ? page_bytes() : 0;
  }
  return found;
}

void acttail_cache::reserve(int64_t first, int64_t end) {
  const size_t wanted = static_cast<size_t>((end + acttail::kPage - 1) / acttail::kPage);
  pages.reserve(wanted);
  starts.reserve(wanted);
  for (size_t i = static_cast<size_t>(first / acttail::kPage); i < wanted; ++i) {
    if (i < pages.size() && pages[i].use_count() == 1) continue;
    auto made = std::make_shared<acttail::Page>(page_bytes(), counted);
    if (i < pages.size()) {
      std::memcpy(made->data(), starts[i], static_cast<size_t>(page_bytes()));
      starts[i] = made->data();
      pages[i] = std::move(made);
    } else {
      starts.push_back(made->data());
      pages.push_back(std::move(made));
    }
  }
}

void acttail_cache::shrink(int64_t kept) {
  const size_t wanted = static_cast<size_t>((kept + acttail::kPage - 1) / acttail::kPage);
  if (wanted >= pages.size()) return;
  pages.resize(wanted);
  starts.resize(wanted);
}

extern "C" {

int acttail_pool_new(acttail_pool** pool) {
  if (pool == nullptr) return ACTTAIL_BAD_ARGUMENT;
  *pool = nullptr;
  return acttail::guarded([&] {
    *pool = new acttail_pool;
    return ACTTAIL_OK;
  });
}

void acttail_pool_free(acttail_pool* pool) { delete pool; }

int64_t acttail_pool_bytes(const acttail_pool* pool) { return pool == nullptr ? -1 : pool->bytes->load(); }

int acttail_cache_new(const acttail_engine* engine, const acttail_pool* pool, int64_t capacity, acttail_cache** cache) {
  if (cache == nullptr) return ACTTAIL_BAD_ARGUMENT;
  *cache = nullptr;
  if (engine == nullptr || capacity < 1) return ACTTAIL_BAD_ARGUMENT;
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
    if (!made->fits(m)) return ACTTAIL_BAD_ARGUMENT;
    made->counted = pool == nullptr ? acttail_pool{}.bytes : pool->bytes;
    // By turns, for their product alone could wrap; 8 bytes hold an element of any format and its scale.
    int64_t most = std::numeric_limits<int64_t>::max() / 8 - acttail::kPage;
    for (int64_t factor : {int64_t{2} * m.blocks, m.kv_heads, made->width}) most /= factor;
    if (capacity > most) {
      return ACTTAIL_OUT_OF_MEMORY;
    }
    *cache = made.release();
    return ACTTAIL_OK;
  });
}

int acttail_cache_fork(const acttail_cache* from, int64_t length, int64_t capacity, acttail_cache** cache) {
  if (cache == nullptr) return ACTTAIL_BAD_ARGUMENT;
  *cache = nullptr;
  if (from == nullptr || length < 0 || length > from->length || capacity < 1 || capacity < length) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  return acttail::guarded([&] {
    auto made = std::make_unique<acttail_cache>(*from);
    made->length = length;
    made->capacity = capacity;
    made->shrink(length);
    *cache = made.release();
    return ACTTAIL_OK;
  });
}

void acttail_cache_free(acttail_cache* cache) { delete cache; }

int64_t acttail_cache_length(const acttail_cache* cache) { return cache == nullptr ? -1 : cache->length; }

int64_t acttail_cache_bytes(const acttail_cache* cache) {
  return cache == nullptr ? -1 : static_cast<int64_t>(cache->pages.size()) * cache->page_bytes();
}

int64_t acttail_cache_lacks(const acttail_cache* cache, int64_t count) {
  if (cache == nullptr || count < 0 || count > cache->capacity - cache->length) return -1;
  return cache->lacks(cache->length, cache->length + count);
}

int acttail_cache_truncate(acttail_cache* cache, int64_t length) {
  if (cache == nullptr || length < 0 || length > cache->length) return ACTTAIL_BAD_ARGUMENT;
  cache->length = length;
  cache->shrink(length);
  return ACTTAIL_OK;
}

int acttail_cache_set_length(acttail_cache* cache, int64_t length) {
  // No further than there are pages: what a page holds that nobody wrote may be read, what is not there may not.
  if (cache == nullptr || length < 0 || length > cache->capacity ||
      length > static_cast<int64_t>(cache->pages.size()) * acttail::kPage) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  cache->length = length;
  return ACTTAIL_OK;
}

int acttail_cache_write(acttail_cache* cache, int64_t block, int64_t first, int64_t count,
                        const float* keys, const float* values) {
  if (cache == nullptr || keys == nullptr || values == nullptr || block < 0 ||
      block >= cache->blocks || first < 0 || first > static_cast<int64_t>(cache->pages.size()) * acttail::kPage || count < 0 || count > cache->capacity - first) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  return acttail::guarded([&] {
    cache->reserve(first, first + count);
    Position position(*cache);
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t h = 0; h < cache->kv_heads; ++h) {
        const int64_t from = (t * cache->kv_heads + h) * cache->head_dim, at = first + t;
        position.write(keys + from, cache->key(block, h, at), cache->key_scale(block, h, at));
        position.write(values + from, cache->value(block, h, at), cache->value_scale(block, h, at));
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
        position.read(keys + to, cache->key(block, h, at), cache->key_scale(block, h, at));
        position.read(values + to, cache->value(block, h, at), cache->value_scale(block, h, at));
      }
    }
    return ACTTAIL_OK;
  });
}

}  // extern "C"
