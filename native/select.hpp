// Which rows each projection of a fused matrix reads for one vector.
#pragma once

#include <cstdint>
#include <vector>

#include "engine.h"
#include "kernels.hpp"

namespace acttail {

inline const Matrix& as_matrix(const acttail_matrix& m) {
  static_assert(sizeof(Matrix) == sizeof(acttail_matrix), "the two describe the same matrix");
  return reinterpret_cast<const Matrix&>(m);
}

// Rows to read and the columns to read of each.
struct Part {
  Rows rows;
  int64_t begin, end;
};

// Room for one selection; owned by one thread.
class Selection {
 public:
  explicit Selection(int64_t largest_input);

  // Chooses the rows for x [d_in]. The parts are valid until the next call; x must stay unchanged.
  const std::vector<Part>& choose(const Kernels& kernels, const acttail_fused& fused, const float* x);

  // Weights that the last choice reads.
  double weights() const;

 private:
  struct Cut {
    int32_t low;  // keys at or above it stay
    bool exact;   // false: ties at `low` must be broken by position
  };
  Cut cut(const Kernels& kernels, const acttail_segment& s, int64_t d, const int32_t* keys);
  void nested(const Kernels& kernels, const acttail_fused& fused, const float* x, const Cut* cuts);
  void separate(const Kernels& kernels, const acttail_fused& fused, const float* x);
  void masked(const Kernels& kernels, const acttail_segment& s, int64_t d, const float* x, int list);

  std::vector<int32_t> keys_, scored_keys_;
  std::vector<int32_t> index_[3];
  std::vector<float> value_[3];
  std::vector<Part> parts_;
};

}  // namespace acttail
