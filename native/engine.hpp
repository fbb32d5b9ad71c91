// A decoder that runs one token in one call.
#pragma once

#include <memory>
#include <vector>

#include "cache.hpp"
#include "engine.h"
#include "kernels.hpp"
#include "pool.hpp"
#include "route.hpp"
#include "select.hpp"

namespace acttail {

// What one thread works with. Every thread holds the whole residual stream and computes norms,
// activations and selections for itself: that is cheaper than meeting at one more barrier.
struct Worker {
  Worker(const acttail_model& m, int64_t most_experts, int64_t most_visits);
  Selection selection;
  Route route;
  std::vector<float> stream, normed, inner, heads, scores, out, added;
  std::vector<uint8_t> key, value, dot;
  std::vector<float> masked;  // the head's input
  double read = 0;
};

// The rotations of one position: per rope table, [half] each.
struct Angles {
  explicit Angles(const std::vector<acttail_rope>& ropes);
  void turn(const std::vector<acttail_rope>& ropes, int64_t position);
  std::vector<std::vector<float>> cosines, sines;
};

// Partial sums of a stage, a part of each thread: of thread t from first + t * stride on.
struct Sums {
  const float* first;
  int64_t stride;
};

// One token on its way through the blocks, as the attention sees it.
struct Position {
  acttail_cache& cache;
  int64_t index;        // in the sequence
  const Angles& angles;
  Sums qkv;
  float* attended;      // [heads * head_dim]
};

class Batch;

}  // namespace acttail

struct acttail_engine {
  acttail_engine(const acttail_model& m, int threads);
  ~acttail_engine();

  // Allocates what the last of so many positions needs; `step` allocates nothing.
  void reserve(int64_t positions);
  // One token of a cache that has a page of its own for it; logits [vocabulary] or null.
  void step(acttail_cache& cache, int64_t token, float* logits);

  // What threads do, of one token or of each of several.
  void embed(int64_t token, int64_t position, std::vector<float>& stream) const;
  // From the head's products to logits first .. last - 1: the factor, the bias, the bound.
  void finish_logits(float* logits, int64_t first, int64_t last) const;
  void collect(const acttail_fused& fused, acttail::Sums sums, int64_t begin, int64_t n, float* out) const;
  void norm(const acttail_norm& n, const float* x, int64_t width, float* y) const;
  // Norms what the attention or the MLPs made and adds it to the stream.
  void add_to_stream(const acttail_norm& n, float* out, float* stream) const;
  // What an MLP's activation makes of its first stage; inner has room for twice of it.
  void activate(const acttail_mlp& mlp, acttail::Sums sums, float* inner) const;
  // Adds what an MLP made to what those before it made, each times its weight; room is for one of them.
  void add_visit(const acttail::Visit& visit, bool first, acttail::Sums sums, float* room, float* out) const;
  // The key and value of one group of heads, as the cache has them, into w.key and w.value.
  void make_entry(acttail::Worker& w, const acttail_block& b, const acttail::Position& p, int64_t group,
                  float* key_scale, float* value_scale) const;
  // Writes them into the cache, at the token's place.
  void keep_entry(const acttail::Worker& w, int64_t block, const acttail::Position& p, int64_t group,
                  float key_scale, float value_scale) const;
  // Query heads first .. first + count - 1, all of one group, over what the cache holds and the last entry in kv.
  void attend(acttail::Worker& w, const acttail_block& b, int64_t block, const acttail::Position& p, int64_t first,
              int64_t count, acttail::KvHead kv) const;

  acttail_model model;
  std::vector<acttail_block> blocks;
  std::vector<acttail_rope> ropes;
  const acttail::Kernels& kernels;
  acttail::Pool pool;
  std::vector<std::unique_ptr<acttail::Worker>> workers;
  int64_t widest;              // columns of the widest stage
  int64_t most_experts;        // of a block
  int64_t most_visits;         // MLPs of one block that a token visits
  std::vector<float> partial[4];  // per stage (qkv, o, gate_up, down): [threads][visits, 1 of qkv and o][widest]
  std::vector<float> products;    // of a block's router
  std::vector<float> attended;    // [heads * head_dim]
  acttail_fused head_selection;   // of a head without rows of its own: what of its input stays
  std::vector<float> head_sums;   // [columns] of a head with rows of its own
  acttail::Angles angles;         // of the current position
  std::unique_ptr<acttail::Batch> batch;  // made when several tokens are first run together

 private:
  // Everything of thread `t`. Partial products of the threads meet in `partial`.
  void token(int t, acttail_cache& cache, int64_t token, int64_t position, float* logits);
  void project(int t, acttail::Worker& w, const acttail_fused& fused, const float* x, int stage, int64_t visit = 0);
  acttail::Sums sums(int stage, int64_t visit = 0) const {
    return {partial[stage].data() + visit * widest, stride(stage)};
  }
  int64_t stride(int stage) const;  // between threads
  void mlps(int t, acttail::Worker& w, const acttail_block& b);
  void attention(int t, acttail::Worker& w, const acttail_block& b, int64_t block, const acttail::Position& p);
  void head(int t, acttail::Worker& w, float* logits);
};
