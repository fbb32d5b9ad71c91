// Which rows each projection of a fused matrix reads for one vector.
#pragma once

#include <cstdint>
#include <vector>

#include "engine.h"
#include "kernels.hpp"

namespace acttail {

constexpr int kMostSegments = 3;

// Rows of a matrix to read and the columns to read of each.
struct Part {
  Rows rows;
  int64_t begin, end;
  int64_t outputs;       // columns that are not padding
  const Matrix* matrix;  // of these columns
  int64_t at;            // where its column 0 lies among those of all matrices
};

// Columns of all matrices together.
static inline int64_t columns_of(const acttail_fused& fused) {
  int64_t columns = 0;
  for (int i = 0; i < fused.matrices; ++i) columns += fused.matrix[i].columns;
  return columns;
}

// At most one for each run of neighbours in one matrix among those segments that keep a row: 3 + 2 + 1 of three.
class Parts {
 public:
  void clear() { count_ = 0; }
  void add(const Part& part) { part_[count_++] = part; }
  // Adds columns up to `end` to the last part.
  void widen(int64_t end, int64_t outputs) {
    part_[count_ - 1].end = end;
    part_[count_ - 1].outputs += outputs;
  }
  const Part* begin() const { return part_; }
  const Part* end() const { return part_ + count_; }

 private:
  Part part_[6];
  int count_ = 0;
};

// Room for one selection; owned by one thread. Nothing is allocated after the constructor.
class Selection {
 public:
  explicit Selection(int64_t largest_input);

  // Chooses the rows for x [rows]. The parts are valid until the next call; x must stay unchanged.
  const Parts& choose(const Kernels& kernels, const acttail_fused& fused, const float* x);

  // Weights that the last choice reads.
  double weights() const;

 private:
  struct Cut {
    int32_t low;  // keys at or above it stay
    bool exact;   // false: ties at `low` must be broken by position
  };
  Cut cut(const Kernels& kernels, const acttail_segment& s, int64_t d, const int32_t* keys) const;
  Rows kept(const Kernels& kernels, const acttail_segment& s, const float* x, int64_t d, int i);
  void nested(const Kernels& kernels, const acttail_fused& fused, const float* x, const Cut* cuts);
  void separate(const Kernels& kernels, const acttail_fused& fused, const float* x);

  std::vector<int32_t> keys_, scored_keys_;
  std::vector<int32_t> index_[kMostSegments];
  std::vector<float> value_[kMostSegments];
  Parts parts_;
};

}  // namespace acttail
