// The KV cache of one sequence, in pages that sequences which begin alike share.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "attention.hpp"
#include "engine.h"
#include "formats.hpp"

namespace acttail {

// Bytes of the pages of some caches, each page counted once.
using PageBytes = std::atomic<int64_t>;

// kPage positions of all blocks and heads.
class Page {
 public:
  // Not initialised. Throws std::bad_alloc.
  Page(int64_t bytes, std::shared_ptr<PageBytes> counted)
      : data_(static_cast<uint8_t*>(::operator new(static_cast<size_t>(bytes), kAlign))),
        bytes_(bytes),
        counted_(std::move(counted)) {
    *counted_ += bytes_;
  }
  ~Page() {
    *counted_ -= bytes_;
    ::operator delete(data_, kAlign);
  }
  Page(const Page&) = delete;
  Page& operator=(const Page&) = delete;

  uint8_t* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  uint8_t* const data_;
  const int64_t bytes_;
  const std::shared_ptr<PageBytes> counted_;
};

}  // namespace acttail

struct acttail_pool {
  std::shared_ptr<acttail::PageBytes> bytes = std::make_shared<acttail::PageBytes>(0);
};

struct acttail_cache {
  int32_t format;
  int64_t blocks, kv_heads, head_dim, width, capacity, length;
  std::shared_ptr<acttail::PageBytes> counted;
  // A page: per block and head, kPage x width elements of keys, then the same of values; after all of them, of scaled
  // formats, kPage scales of keys and of values in the same order.
  std::vector<std::shared_ptr<acttail::Page>> pages;
  std::vector<uint8_t*> starts;  // of the pages

  // Whether it was made for engines of this model's shape.
  bool fits(const acttail_model& m) const {
    return format == m.kv_format && blocks == m.blocks && kv_heads == m.kv_heads && head_dim == m.head_dim &&
           (m.position == nullptr || capacity <= m.positions);
  }
  bool scaled() const { return acttail::kKvTraits[format].scaled; }
  int64_t position_bytes() const { return width * acttail::kKvTraits[format].bytes; }
  int64_t slab() const { return acttail::kPage * position_bytes(); }
  int64_t page_bytes() const {
    return 2 * blocks * kv_heads * (slab() + (scaled() ? acttail::kPage * static_cast<int64_t>(sizeof(float)) : 0));
  }
  // Where a page has the keys of a head, and their scales.
  int64_t keys_at(int64_t block, int64_t head) const { return 2 * (block * kv_heads + head) * slab(); }
  int64_t scales_at(int64_t block, int64_t head) const {
    return 2 * blocks * kv_heads * slab() +
           2 * (block * kv_heads + head) * acttail::kPage * static_cast<int64_t>(sizeof(float));
  }
  uint8_t* key(int64_t block, int64_t head, int64_t position) const {
    return starts[static_cast<size_t>(position / acttail::kPage)] + keys_at(block, head) +
           position % acttail::kPage * position_bytes();
  }
  uint8_t* value(int64_t block, int64_t head, int64_t position) const { return key(block, head, position) + slab(); }
  // Null of a format without scales.
  float* key_scale(int64_t block, int64_t head, int64_t position) const {
    if (!scaled()) return nullptr;
    return reinterpret_cast<float*>(starts[static_cast<size_t>(position / acttail::kPage)] + scales_at(block, head)) +
           position % acttail::kPage;
  }
  float* value_scale(int64_t block, int64_t head, int64_t position) const {
    float* const k = key_scale(block, head, position);
    return k == nullptr ? nullptr : k + acttail::kPage;
  }

  // Bytes that `reserve` would allocate.
  int64_t lacks(int64_t first, int64_t end) const;
  // Makes the pages of positions first .. end - 1 this cache's own: those that there are not, and copies of those that
  // another cache has as well. Throws std::bad_alloc; what it has made by then stays.
  void reserve(int64_t first, int64_t end);
  // Gives back the pages after `kept` positions.
  void shrink(int64_t kept);
};
