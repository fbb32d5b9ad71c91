// Every C function with the n-th allocation failing, for every n: it returns a status, the process lives, and
// nothing leaks.
#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "decoder.hpp"

namespace {

std::atomic<int64_t> until_failure{-1};  // allocations still granted; negative: all
std::atomic<int64_t> live{0};

void* take(std::size_t size, std::size_t alignment = alignof(std::max_align_t)) {
  int64_t left = until_failure.load();
  while (left > 0 && !until_failure.compare_exchange_weak(left, left - 1)) {
  }
  if (left == 0) return nullptr;
  // What is not aligned further may be given back to free() as well.
  void* found = std::aligned_alloc(alignment, (size / alignment + 1) * alignment);
  if (found != nullptr) live.fetch_add(1);
  return found;
}
void give(void* p) {
  if (p == nullptr) return;
  live.fetch_sub(1);
  std::free(p);
}
void* take_or_throw(std::size_t size) {
  void* found = take(size);
  if (found == nullptr) throw std::bad_alloc();
  return found;
}

}  // namespace

void* operator new(std::size_t size) { return take_or_throw(size); }
void* operator new[](std::size_t size) { return take_or_throw(size); }
void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return take(size); }
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept { return take(size); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  void* found = take(size, static_cast<std::size_t>(alignment));
  if (found == nullptr) throw std::bad_alloc();
  return found;
}
void operator delete(void* p) noexcept { give(p); }
void operator delete(void* p, std::align_val_t) noexcept { give(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { give(p); }
void operator delete[](void* p) noexcept { give(p); }
void operator delete(void* p, std::size_t) noexcept { give(p); }
void operator delete[](void* p, std::size_t) noexcept { give(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { give(p); }
void operator delete[](void* p, const std::nothrow_t&) noexcept { give(p); }

namespace {

int failures = 0;

// Calls f until no allocation of it fails any more. Each call before must say that memory ran out and leave
// as much allocated as there was; f cleans up after a success.
template <typename Function>
void starve(const char* what, Function f) {
  for (int64_t n = 0;; ++n) {
    const int64_t before = live.load();
    until_failure.store(n);
    const int status = f();
    const bool starved = until_failure.exchange(-1) == 0;
    if (status == ACTTAIL_OK) {
      // The last granted allocation may have been the last wanted one.
      if (n == 0 && starved) std::printf("note: %s allocates nothing\n", what);
      if (live.load() != before) ++failures, std::printf("FAILED: %s leaks\n", what);
      std::printf("%s: %lld allocations\n", what, static_cast<long long>(n));
      return;
    }
    if (status != ACTTAIL_OUT_OF_MEMORY || !starved || live.load() != before || n > 100000) {
      std::printf("FAILED: %s, allocation %lld: status %d, %lld more live\n", what, static_cast<long long>(n), status,
                  static_cast<long long>(live.load() - before));
      ++failures;
      return;
    }
  }
}

}  // namespace

int main() {
  decoder::Options o;
  o.format = acttail::kInt8;
  o.one_scale = true;
  o.rule = ACTTAIL_TOPK;
  o.kv = acttail::kKvInt8;
  const decoder::Decoder d(o);
  using D = decoder::Decoder;
  acttail_engine* engine = nullptr;
  for (int threads : {1, 4}) {
    // With four threads, failures fall between the starts of workers: those that run must be ended.
    starve("engine_new", [&] {
      const int status = acttail_engine_new(&d.model, threads, &engine);
      acttail_engine_free(engine);
      return status;
    });
  }
  if (acttail_engine_new(&d.model, 3, &engine) != ACTTAIL_OK) std::abort();
  starve("cache_new", [&] {
    acttail_cache* cache = nullptr;
    const int status = acttail_cache_new(engine, nullptr, 20, &cache);
    acttail_cache_free(cache);
    return status;
  });
  acttail_cache* cache = nullptr;
  if (acttail_cache_new(engine, nullptr, INT64_MAX / 4, &cache) != ACTTAIL_OUT_OF_MEMORY || cache != nullptr) {
    ++failures, std::printf("FAILED: an endless cache\n");
  }
  if (acttail_cache_new(engine, nullptr, 20, &cache) != ACTTAIL_OK) std::abort();
  std::vector<float> logits(D::vocabulary), rows(20 * D::kv_heads * D::head_dim, 0.5f), values = rows;
  const std::vector<int64_t> tokens = {5, 6, 7};
  // The first call on an engine makes room for the attention, that on a cache for its pages.
  acttail_engine* fresh = nullptr;
  acttail_cache* empty = nullptr;
  starve("engine_forward", [&] {
    const int64_t granted = until_failure.exchange(-1);
    if (acttail_engine_new(&d.model, 3, &fresh) != ACTTAIL_OK || acttail_cache_new(fresh, nullptr, 20, &empty)) std::abort();
    until_failure.store(granted);
    const int status = acttail_engine_forward(fresh, empty, tokens.data(), 3, 0, logits.data(), nullptr);
    const int64_t left = until_failure.exchange(-1);
    if (status != ACTTAIL_OK && acttail_cache_length(empty) != 0) ++failures, std::printf("FAILED: half a forward\n");
    acttail_cache_free(empty);
    acttail_engine_free(fresh);
    until_failure.store(left);
    return status;
  });
  // Where there is room for as many positions, nothing is allocated.
  for (int64_t i = 0; i < 2; ++i) {
    if (acttail_engine_forward(engine, cache, tokens.data(), 3, 0, logits.data(), nullptr)) std::abort();
  }
  if (acttail_cache_truncate(cache, 3)) std::abort();
  until_failure.store(0);
  if (acttail_engine_forward(engine, cache, tokens.data(), 3, 0, logits.data(), nullptr) != ACTTAIL_OK) {
    ++failures, std::printf("FAILED: a later forward allocates\n");
  }
  until_failure.store(-1);
  starve("cache_fork", [&] {
    acttail_cache* fork = nullptr;
    const int status = acttail_cache_fork(cache, 6, 20, &fork);
    if (status != ACTTAIL_OK) return status;
    // Its last page is another's as well: it writes to a copy.
    const int written = acttail_cache_write(fork, 0, 6, 2, rows.data(), values.data());
    acttail_cache_free(fork);
    return written;
  });
  starve("cache_write", [&] { return acttail_cache_write(cache, 0, 0, 20, rows.data(), values.data()); });
  if (acttail_cache_set_length(cache, 20)) std::abort();
  starve("cache_read", [&] { return acttail_cache_read(cache, 1, 0, 20, rows.data(), values.data()); });

  const acttail_matrix& m = d.model.block[0].qkv.matrix[0];
  const acttail_matrix& head = d.model.head;
  std::vector<float> x(static_cast<size_t>(8 * std::max(m.rows, head.columns)), 0.25f);
  std::vector<float> y(static_cast<size_t>(8 * std::max(m.columns, head.rows)));
  std::vector<float> decoded(static_cast<size_t>(m.rows * m.columns));
  for (int threads : {1, 4}) {
    starve("decode_rows", [&] { return acttail_decode_rows(&m, 0, m.rows, 0, m.columns, 1, decoded.data(), threads); });
    starve("sparse_linear", [&] { return acttail_sparse_linear(&m, x.data(), 5, 9, y.data(), threads); });
  }
  starve("dot_rows", [&] { return acttail_dot_rows(&head, x.data(), y.data()); });
  starve("add_rows", [&] { return acttail_add_rows(&m, nullptr, x.data(), m.rows, 0, m.columns, y.data(), 1, 0); });

  std::vector<float> wide(200 * 300, 1.0f), masked(wide.size());
  std::vector<uint16_t> wide16(wide.size(), 0x3F80), masked16(wide.size());
  for (int threads : {1, 4}) {
    starve("topk_mask_f32", [&] { return acttail_topk_mask_f32(wide.data(), masked.data(), 200, 300, 7, threads); });
    starve("topk_mask_16",
           [&] { return acttail_topk_mask_16(wide16.data(), masked16.data(), 200, 300, 7, 0x7F80, threads); });
    const float* v[] = {wide.data()};
    const int64_t dropped[] = {10, 100};
    double sums[2];
    starve("curves_f32",
           [&] { return acttail_curves_f32(wide.data(), v, 1, 200, 300, dropped, 2, sums, threads); });
    const std::vector<uint64_t> words(4096, 1);
    starve("read_seconds", [&] {
      return acttail_read_seconds(words.data(), 4096, threads) >= 0 ? ACTTAIL_OK : ACTTAIL_OUT_OF_MEMORY;
    });
  }
  acttail_cache_free(cache);
  acttail_engine_free(engine);
  std::printf("faults (%s): %s\n", acttail_isa(), failures == 0 ? "ok" : "FAILED");
  return failures == 0 ? 0 : 1;
}
