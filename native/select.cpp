#include "select.hpp"

#include <cstring>

namespace acttail {

namespace {

constexpr int64_t kAbove = int64_t{1} << 31;  // no key reaches it

bool keeps_all(const acttail_segment& s, int64_t d) {
  return s.rule == ACTTAIL_DENSE || (s.rule == ACTTAIL_TOPK && s.k >= d);
}

// Whether two projections keep the same rows of any vector.
bool alike(const acttail_segment& a, const acttail_segment& b) {
  return a.rule == b.rule && a.k == b.k && a.threshold == b.threshold && a.score_scale == b.score_scale &&
         a.dense_kernel == b.dense_kernel;
}

// Adds the columns of every segment i with rows[i] to read; neighbours of which same[i] is true, and which lie
// in one matrix, are read in one run.
void join(Parts& parts, const acttail_fused& fused, const Rows* rows, const bool* same) {
  int m = 0;
  int64_t at = 0;
  for (int i = 0; i < fused.segments; ++i) {
    const acttail_segment& s = fused.segment[i];
    bool joined = i > 0 && same[i];
    while (s.begin >= at + fused.matrix[m].columns) {
      at += fused.matrix[m++].columns;
      joined = false;
    }
    if (rows[i].count == 0) continue;
    if (joined) {
      parts.widen(s.end - at, s.outputs);
    } else {
      parts.add({rows[i], s.begin - at, s.end - at, s.outputs, &fused.matrix[m], at});
    }
  }
}

// The smallest key strictly above the threshold's own.
int32_t key_above(float threshold) {
  int32_t key;
  std::memcpy(&key, &threshold, sizeof key);
  return (key & 0x7FFFFFFF) + 1;
}

}  // namespace

Selection::Selection(int64_t largest_input) {
  const size_t room = static_cast<size_t>(largest_input) + 16;  // gather stores whole vectors
  keys_.resize(room);
  scored_keys_.resize(room);
  for (int i = 0; i < kMostSegments; ++i) {
    index_[i].resize(room);
    value_[i].resize(room);
  }
}

Selection::Cut Selection::cut(const Kernels& kernels, const acttail_segment& s, int64_t d,
                              const int32_t* keys) const {
  if (keeps_all(s, d)) return {0, true};
  if (s.rule == ACTTAIL_THRESHOLD) return {key_above(s.threshold), true};
  int64_t at_least;
  const int32_t low = kernels.kth_largest(keys, d, s.k, &at_least);
  return {low, at_least == s.k};
}

const Parts& Selection::choose(const Kernels& kernels, const acttail_fused& fused, const float* x) {
  parts_.clear();
  const int64_t d = fused.matrix[0].rows;
  bool all = true, simple = true;
  // With scales along the input, the few rows that one projection keeps and the next does not are spread
  // over all groups, each of which then costs a whole sweep's end for one or two rows: 20 % of a token of
  // SmolLM2-135M in int8. Projections are then read one by one.
  for (int i = 0; i < fused.matrices; ++i) {
    simple = simple && (fused.matrix[i].scale == nullptr || fused.matrix[i].group >= d);
  }
  for (int i = 0; i < fused.segments; ++i) {
    const acttail_segment& s = fused.segment[i];
    all = all && keeps_all(s, d);
    simple = simple && s.score_scale == nullptr && !s.dense_kernel;
  }
  if (all) {
    const Rows every{nullptr, x, d, 0}, rows[kMostSegments] = {every, every, every};
    const bool same[kMostSegments] = {true, true, true};
    join(parts_, fused, rows, same);
    return parts_;
  }
  kernels.magnitude_keys(x, nullptr, d, keys_.data());
  if (simple) {
    Cut cuts[kMostSegments];
    bool exact = true;
    for (int i = 0; i < fused.segments; ++i) {
      cuts[i] = cut(kernels, fused.segment[i], d, keys_.data());
      exact = exact && cuts[i].exact;
    }
    if (exact) {
      nested(kernels, fused, x, cuts);
      return parts_;
    }
  }
  separate(kernels, fused, x);
  return parts_;
}

// What a projection keeps, one with a lower cut keeps too. So rows are listed by how many projections keep
// them, and a row is read in one run over those of them that are neighbours in memory. Which projection lies
// where decides how many runs there are, not what is read or in which order it is added up.
void Selection::nested(const Kernels& kernels, const acttail_fused& fused, const float* x,
                       const Cut* cuts) {
  const int64_t d = fused.matrix[0].rows;
  const int n = fused.segments;
  int order[kMostSegments];  // from the lowest cut to the highest
  for (int i = 0; i < n; ++i) {
    int at = i;
    for (; at > 0 && cuts[order[at - 1]].low > cuts[i].low; --at) order[at] = order[at - 1];
    order[at] = i;
  }
  bool keeps[kMostSegments] = {true, true, true};
  int64_t high = kAbove;
  for (int i = n - 1; i >= 0; keeps[order[i--]] = false) {
    const int32_t low = cuts[order[i]].low;
    if (high <= low) continue;
    const int64_t count =
        kernels.gather(keys_.data(), x, d, low, high, index_[i].data(), value_[i].data());
    high = low;
    if (count == 0) continue;
    Rows rows[kMostSegments] = {};
    bool same[kMostSegments] = {};
    for (int j = 0; j < n; ++j) {
      if (keeps[j]) rows[j] = {index_[i].data(), value_[i].data(), count, 0};
      same[j] = j > 0 && keeps[j - 1];
    }
    join(parts_, fused, rows, same);
  }
}

void Selection::separate(const Kernels& kernels, const acttail_fused& fused, const float* x) {
  const int64_t d = fused.matrix[0].rows;
  Rows rows[kMostSegments];
  bool same[kMostSegments] = {};
  for (int i = 0; i < fused.segments; ++i) {
    const acttail_segment& s = fused.segment[i];
    int j = 0;
    while (j < i && !alike(fused.segment[j], s)) ++j;
    same[i] = i > 0 && alike(fused.segment[i - 1], s);
    rows[i] = j < i ? rows[j] : kept(kernels, s, x, d, i);
  }
  join(parts_, fused, rows, same);
}

// The rows that one projection keeps, listed in the place of segment i.
Rows Selection::kept(const Kernels& kernels, const acttail_segment& s, const float* x, int64_t d, int i) {
  if (keeps_all(s, d)) return {nullptr, x, d, 0};
  const int32_t* keys = keys_.data();
  if (s.score_scale != nullptr) {
    kernels.magnitude_keys(x, s.score_scale, d, scored_keys_.data());
    keys = scored_keys_.data();
  }
  const Cut c = cut(kernels, s, d, keys);
  if (!c.exact) {
    // Ties go to the lower index: of the keys equal to the cut only the first few stay.
    if (keys != scored_keys_.data()) {
      std::memcpy(scored_keys_.data(), keys, sizeof(int32_t) * static_cast<size_t>(d));
      keys = scored_keys_.data();
    }
    int64_t above = 0;
    for (int64_t j = 0; j < d; ++j) above += keys[j] > c.low;
    int64_t ties = s.k - above;
    for (int64_t j = 0; j < d; ++j) {
      if (keys[j] == c.low && ties-- <= 0) scored_keys_[static_cast<size_t>(j)] = -1;
    }
  }
  const int64_t count = kernels.gather(keys, x, d, c.low, kAbove, index_[i].data(), value_[i].data());
  if (!s.dense_kernel) return {index_[i].data(), value_[i].data(), count, 0};
  // Written back over the whole width, zeros included, from the last entry to the first.
  float* full = value_[i].data();
  int64_t from = count - 1;
  for (int64_t j = d - 1; j >= 0; --j) {
    const bool stays = from >= 0 && index_[i][static_cast<size_t>(from)] == j;
    full[j] = stays ? x[j] : 0.0f;
    from -= stays;
  }
  return {nullptr, full, d, 0};
}

double Selection::weights() const {
  double total = 0;
  for (const Part& p : parts_) {
    total += static_cast<double>(p.rows.count) * static_cast<double>(p.outputs);
  }
  return total;
}

}  // namespace acttail
