// Several tokens in one pass: each weight is read and unpacked once for up to kMostTogether of them.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "engine.hpp"

namespace acttail {

constexpr int64_t kMostRows = 128;  // of one pass: a token each of 64 sequences, and prompts beside them

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

// Lanes that go through the model side by side, and what of their work one thread does: its own share, meeting the
// others at barriers, or the shares of all threads, meeting nobody.
struct Crew {
  int thread;           // whose memory is worked with
  int64_t first, last;  // lanes
  int from, to;         // threads whose shares are done
};

// One lane at one of the MLPs that it visits.
struct Stop {
  int64_t number;  // of the MLP in its block
  int64_t lane, visit;
  const acttail_mlp* mlp;
};

// The stops of a crew's lanes in a block, those at one MLP side by side.
struct Stops {
  std::vector<Stop> list;
  std::vector<int64_t> at;  // [lanes][most_visits]: where a lane's visit is in the list
};

class Batch {
 public:
  explicit Batch(acttail_engine& engine);

  // Allocates all that `rows` rows need but the attention's scores (acttail_engine::reserve).
  void reserve(int64_t rows);
  // Runs 1 to kMostRows rows that there is room for, each of which gets what it would get alone, bit for bit. Rows of
  // one cache are its next tokens, in order. Does not change the caches' lengths.
  void run(Row* rows, int64_t count);

 private:
  // Lanes that one thread takes through the whole model.
  struct Unit {
    int64_t first, last;
  };

  void arrange(Row* rows, int64_t count);
  void divide();
  void thread(int t);
  void pass(const Crew& crew);
  void begin(Lane& lane, int64_t block);
  void attention(const Crew& crew, int64_t block);
  // Which MLPs a lane visits.
  void route(const Crew& crew, const acttail_block& b, Lane& lane);
  void mlps(const Crew& crew, const acttail_block& b);
  const Stops& stops(const Crew& crew);
  // Of `count` vectors that meet one stage: their sums go to `at` and after it.
  void project(const Crew& crew, const acttail_fused& fused, const Parts* const* parts, int64_t count, int64_t at);
  // One thread's share, of at most kMostTogether vectors.
  void share_of(const Crew& crew, int t, const acttail_fused& fused, const Parts* const* parts, int64_t count, int64_t at);
  // Of every lane.
  void project(const Crew& crew, const acttail_fused& fused);
  void head(const Crew& crew);
  // A thread's part of the logits of `count` lanes.
  void dense_head(const Crew& crew, int t, const int64_t* lanes, int64_t count);
  void listed_head(const Crew& crew, int t, const int64_t* lanes, int64_t count);
  // Of the sums of the last projection, those at one place.
  Sums sums(int64_t at) const { return {partial_.data() + at * engine_.widest, stride()}; }
  // Where the sums of a crew's lanes, or of their stops, begin.
  int64_t place(const Crew& crew) const { return crew.first * engine_.most_visits; }
  int64_t stride() const { return room_ * engine_.most_visits * engine_.widest; }  // between threads
  Position position(const Crew& crew, int64_t lane);
  void meet(const Crew& crew) {
    if (crew.to - crew.from < engine_.pool.threads()) engine_.pool.barrier().wait();
  }
  // Calls f(lane, its number) for those of a crew that its shares comprise.
  template <typename Function>
  void own(const Crew& crew, Function f) {
    for (int t = crew.from; t < crew.to; ++t) {
      for (int64_t i = crew.first + t; i < crew.last; i += engine_.pool.threads()) f(*lanes_[static_cast<size_t>(i)], i);
    }
  }
  void choose(Lane& lane, const acttail_fused& fused, const float* x, int64_t row, int64_t visit = 0);
  Row& row(int64_t lane) { return *rows_[static_cast<size_t>(lane)]; }

  acttail_engine& engine_;
  int64_t room_ = 0;  // rows
  std::vector<std::unique_ptr<Lane>> lanes_;
  std::vector<float> partial_;  // [threads][room * most_visits][widest]
  // Of each thread:
  std::vector<Stops> stops_;
  std::vector<int32_t> scratch_;    // [kTogetherScratch]
  std::vector<uint8_t> dot_;        // [kMostTogether * dot_scratch]
  std::vector<float> head_sums_;    // [kMostTogether][head_columns_] of a head with rows of its own
  int64_t head_columns_ = 0;        // of them that are taken at a time
  std::vector<Row*> rows_;          // of each lane: those of one cache side by side
  std::vector<Unit> units_;         // none: all threads take all lanes together
  std::atomic<size_t> next_{0};     // unit
};

}  // namespace acttail
