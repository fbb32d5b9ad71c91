// Which of a block's MLPs a token visits.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "engine.h"

namespace acttail {

// One MLP on a token's way through a block.
struct Visit {
  const acttail_mlp* mlp;
  int64_t number;  // among the block's: its own comes after all experts
  float weight;    // of what it adds
};

// Whether a block has an MLP that every token visits.
static inline bool own_mlp(const acttail_block& b) { return b.mlp.gate_up.matrices > 0; }

// MLPs that a token visits in a block.
static inline int64_t visits_of(const acttail_block& b) {
  return (b.experts > 0 ? b.active : 0) + (own_mlp(b) ? 1 : 0);
}

// Room for one token's way; owned by one thread. Nothing is allocated after the constructor.
class Route {
 public:
  Route(int64_t most_experts, int64_t most_visits);

  // The block's own MLP alone, of a block without experts.
  void plain(const acttail_block& b);
  // The experts of a block that the router's products, [experts + shared_gate], name, and its own MLP.
  void choose(const acttail_block& b, const float* products);

  const Visit* begin() const { return visit_.data(); }
  const Visit* end() const { return visit_.data() + count_; }
  int64_t size() const { return count_; }

 private:
  std::vector<std::pair<float, int64_t>> queue_;
  std::vector<Visit> visit_;
  int64_t count_ = 0;
};

}  // namespace acttail
