// Several tokens in one pass: each weight is read and unpacked once for all of them.
#pragma once

#include <memory>
#include <vector>

#include "engine.hpp"

namespace acttail {

// One token of a batch, and where it goes.
struct Row {
  acttail_cache* cache;
  int64_t token;
  int64_t position;  // in its sequence
  float* logits;     // [vocabulary], or null
  double read;       // weights, as acttail_engine_forward counts
};

// What becomes of one row. Unlike a single token's, its vectors are one thread's work, not every thread's.
struct Lane {
  explicit Lane(const acttail_engine& e);
  std::vector<Selection> selection;  // one for each MLP that it visits
  Angles angles;
  Route route;
  std::vector<float> stream, normed, inner, attended, out, added, products, masked;
  std::vector<const Parts*> parts;  // of the projections that come next: one, or one for each MLP
};

// One lane at one of the MLPs that it visits.
struct Stop {
  int64_t number;  // of the MLP in its block
  int64_t lane, visit;
  const acttail_mlp* mlp;
};

class Batch {
 public:
  // Allocates all that `run` needs but the attention's scores (acttail_engine::reserve).
  explicit Batch(acttail_engine& engine);

  // Runs 1 to kMostTogether rows, each of which gets what it would get alone, bit for bit. Rows of one cache are
  // its next tokens, in order. Does not change the caches' lengths.
  void run(Row* rows, int64_t count);

 private:
  void thread(int t);
  void begin(Lane& lane, int64_t block);
  void attention(int t, int64_t block);
  // Which MLPs a lane visits.
  void route(int t, const acttail_block& b, Lane& lane);
  void mlps(int t, const acttail_block& b);
  // The lanes' stops in a block, those at one MLP side by side; the sums of the i-th are at i.
  const std::vector<Stop>& stops(int t);
  // Of `count` vectors that meet one stage: their sums go to `at` and after it.
  void project(int t, const acttail_fused& fused, const Parts* const* parts, int64_t count, int64_t at);
  // Of every lane.
  void project(int t, const acttail_fused& fused);
  void head(int t);
  // Of the sums of the last projection, those of lane i, of an MLP's those of stop i.
  Sums sums(int64_t i) const { return {partial_.data() + i * engine_.widest, stride()}; }
  int64_t stride() const { return kMostTogether * engine_.most_visits * engine_.widest; }  // between threads
  Position position(int64_t i);
  // Calls f(lane, row) for those that are this thread's.
  template <typename Function>
  void own(int t, Function f) {
    for (int64_t i = t; i < count_; i += engine_.pool.threads()) f(*lanes_[static_cast<size_t>(i)], i);
  }
  void choose(Lane& lane, const acttail_fused& fused, const float* x, int64_t row, int64_t visit = 0);

  acttail_engine& engine_;
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::vector<float> partial_;  // [threads][kMostTogether * most_visits][widest]
  std::vector<std::vector<Stop>> stops_;  // of each thread
  std::vector<int32_t> scratch_;  // [threads][kTogetherScratch]
  std::vector<float> head_sums_;  // [kMostTogether][columns] of a head with rows of its own
  Row* rows_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace acttail
