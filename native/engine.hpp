// A decoder that runs one token in one call.
#pragma once

#include <memory>
#include <vector>

#include "cache.hpp"
#include "engine.h"
#include "kernels.hpp"
#include "pool.hpp"
#include "select.hpp"

namespace acttail {

// What one thread works with. Every thread holds the whole residual stream and computes norms,
// activations and selections for itself: that is cheaper than meeting at one more barrier.
struct Worker {
  explicit Worker(const acttail_model& m);
  Selection selection;
  std::vector<float> stream, normed, inner, heads, scores, out;
  std::vector<uint8_t> key, value, dot;
  std::vector<float> masked;  // the head's input
  double read = 0;
};

}  // namespace acttail

struct acttail_engine {
  acttail_engine(const acttail_model& m, int threads);

  // Allocates what tokens of a cache of this capacity need; `step` allocates nothing.
  void reserve(int64_t capacity);
  // One token; logits [vocabulary] or null.
  void step(acttail_cache& cache, int64_t token, float* logits);

  acttail_model model;
  std::vector<acttail_block> blocks;
  std::vector<acttail_rope> ropes;
  const acttail::Kernels& kernels;
  acttail::Pool pool;
  std::vector<std::unique_ptr<acttail::Worker>> workers;
  int64_t widest;              // columns of the widest stage
  std::vector<float> partial[4];  // per stage (qkv, o, gate_up, down): [threads][widest]
  std::vector<float> attended;    // [heads * head_dim]
  acttail_fused head_selection;   // of a head without rows of its own: what of its input stays
  std::vector<float> head_sums;   // [columns] of a head with rows of its own
  std::vector<std::vector<float>> cosines, sines;  // per rope table, of the current position

 private:
  // Everything of thread `t`. Partial products of the threads meet in `partial`.
  void token(int t, acttail_cache& cache, int64_t token, int64_t position, float* logits);
  void project(int t, acttail::Worker& w, const acttail_fused& fused, const float* x, int stage);
  void collect(const acttail_fused& fused, int stage, int64_t begin, int64_t n, float* out) const;
  void norm(const acttail_norm& n, const float* x, int64_t width, float* y) const;
  void attention(int t, acttail::Worker& w, const acttail_block& b, int64_t index, acttail_cache& cache,
                 int64_t position);
  void head(int t, acttail::Worker& w, float* logits);
  void add_to_stream(acttail::Worker& w, const acttail_fused& fused, int stage, const acttail_norm& n);
};
