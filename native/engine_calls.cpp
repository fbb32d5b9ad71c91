// The engine's calls of the C ABI: what they are given is judged here, before any thread sees it.
#include <algorithm>

#include "batch.hpp"
#include "check.hpp"
#include "guard.hpp"

extern "C" {

int acttail_engine_new(const acttail_model* model, int threads, acttail_engine** engine) {
  if (engine == nullptr) return ACTTAIL_BAD_ARGUMENT;
  *engine = nullptr;
  if (model == nullptr || threads < 1 || threads > 256 || !acttail::runnable(*model)) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  return acttail::guarded([&] {
    *engine = new acttail_engine(*model, threads);
    return ACTTAIL_OK;
  });
}

void acttail_engine_free(acttail_engine* engine) {
  // In a forked child it is left as it is: what its threads wait on cannot be destroyed without them.
  if (engine != nullptr && engine->pool.here()) delete engine;
}

int acttail_engine_forward(acttail_engine* engine, acttail_cache* cache, const int64_t* tokens,
                           int64_t count, int all_logits, float* logits, double* read) {
  if (engine == nullptr || cache == nullptr || tokens == nullptr || count < 1 ||
      count > cache->capacity - cache->length || !cache->fits(engine->model)) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  if (!engine->pool.here()) return ACTTAIL_FAILED;
  const int64_t vocabulary = engine->model.vocabulary;
  for (int64_t i = 0; i < count; ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocabulary) return ACTTAIL_BAD_ARGUMENT;
  }
  return acttail::guarded([&] {
    engine->reserve(cache->length + count);
    cache->reserve(cache->length, cache->length + count);
    engine->workers[0]->read = 0;
    for (int64_t i = 0; i < count; ++i) {
      const bool wanted = logits != nullptr && (all_logits || i + 1 == count);
      engine->step(*cache, tokens[i], wanted ? logits + (all_logits ? i * vocabulary : 0) : nullptr);
    }
    if (read != nullptr) *read = engine->workers[0]->read;
    return ACTTAIL_OK;
  });
}

int acttail_engine_step(acttail_engine* engine, acttail_cache* const* caches, const int64_t* tokens, int64_t count,
                        float* const* logits, double* read) {
  if (engine == nullptr || caches == nullptr || tokens == nullptr || logits == nullptr || count < 1 ||
      count > acttail::kMostRows) {
    return ACTTAIL_BAD_ARGUMENT;
  }
  if (!engine->pool.here()) return ACTTAIL_FAILED;
  acttail::Row rows[acttail::kMostRows];
  int64_t longest = 0;
  for (int64_t i = 0; i < count; ++i) {
    acttail_cache* const cache = caches[i];
    if (cache == nullptr || !cache->fits(engine->model) || tokens[i] < 0 || tokens[i] >= engine->model.vocabulary) {
      return ACTTAIL_BAD_ARGUMENT;
    }
    const int64_t before = std::count(caches, caches + i, cache);
    if (before >= cache->capacity - cache->length) return ACTTAIL_BAD_ARGUMENT;
    rows[i] = {cache, tokens[i], cache->length + before, logits[i], 0};
    longest = std::max(longest, rows[i].position + 1);
  }
  return acttail::guarded([&] {
    engine->reserve(longest);
    for (int64_t i = 0; i < count; ++i) rows[i].cache->reserve(rows[i].position, rows[i].position + 1);
    if (engine->batch == nullptr) engine->batch = std::make_unique<acttail::Batch>(*engine);
    engine->batch->reserve(count);
    engine->batch->run(rows, count);
    for (int64_t i = 0; i < count; ++i) {
      ++rows[i].cache->length;
      if (read != nullptr) read[i] = rows[i].read;
    }
    return ACTTAIL_OK;
  });
}

}  // extern "C"
