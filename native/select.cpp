#include "select.hpp"

#include <cstring>

namespace acttail {

namespace {

constexpr int64_t kAbove = int64_t{1} << 31;  // no key reaches it

bool keeps_all(const acttail_segment& s, int64_t d) {
  return s.rule == ACTTAIL_DENSE || (s.rule == ACTTAIL_TOPK && s.k >= d);
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
  for (int i = 0; i < 3; ++i) {
    index_[i].resize(room);
    value_[i].resize(room);
  }
}

Selection::Cut Selection::cut(const Kernels& kernels, const acttail_segment& s, int64_t d,
                              const int32_t* keys) {
  if (keeps_all(s, d)) return {0, true};
  if (s.rule == ACTTAIL_THRESHOLD) return {key_above(s.threshold), true};
  int64_t at_least;
  const int32_t low = kernels.kth_largest(keys, d, s.k, &at_least);
  return {low, at_least == s.k};
}

const std::vector<Part>& Selection::choose(const Kernels& kernels, const acttail_fused& fused,
                                           const float* x) {
  parts_.clear();
  const int64_t d = fused.matrix.d_in;
  bool all = true;
  // With scales along the input, the few rows that one projection keeps and the next does not are spread
  // over all groups, each of which then costs a whole sweep's end for one or two rows: 20 % of a token of
  // SmolLM2-135M in int8. Projections are then read one by one.
  bool simple = fused.matrix.scale == nullptr || fused.matrix.group >= d;
  for (int i = 0; i < fused.segments; ++i) {
    const acttail_segment& s = fused.segment[i];
    all = all && keeps_all(s, d);
    simple = simple && s.score_scale == nullptr && !s.dense_kernel;
  }
  if (all) {
    parts_.push_back({{nullptr, x, d, 0}, 0, fused.matrix.columns});
    return parts_;
  }
  kernels.magnitude_keys(x, nullptr, d, keys_.data());
  if (simple) {
    Cut cuts[3];
    bool ordered = true;
    for (int i = 0; i < fused.segments; ++i) {
      cuts[i] = cut(kernels, fused.segment[i], d, keys_.data());
      ordered = ordered && cuts[i].exact && (i == 0 || cuts[i].low >= cuts[i - 1].low);
    }
    if (ordered) {
      nested(kernels, fused, x, cuts);
      return parts_;
    }
  }
  separate(kernels, fused, x);
  return parts_;
}

// What a later segment keeps, an earlier one keeps too: a row is read from its start to the end of the
// last segment that keeps it, in one run.
void Selection::nested(const Kernels& kernels, const acttail_fused& fused, const float* x,
                       const Cut* cuts) {
  const int64_t d = fused.matrix.d_in;
  for (int i = fused.segments - 1; i >= 0; --i) {
    const int64_t high = i + 1 < fused.segments ? cuts[i + 1].low : kAbove;
    if (high <= cuts[i].low) continue;
    const int64_t count = kernels.gather(keys_.data(), x, d, cuts[i].low, high, index_[i].data(),
                                         value_[i].data());
    if (count == 0) continue;
    parts_.push_back({{index_[i].data(), value_[i].data(), count, 0}, 0, fused.segment[i].end});
  }
}

void Selection::separate(const Kernels& kernels, const acttail_fused& fused, const float* x) {
  const int64_t d = fused.matrix.d_in;
  for (int i = 0; i < fused.segments; ++i) {
    const acttail_segment& s = fused.segment[i];
    if (keeps_all(s, d)) {
      parts_.push_back({{nullptr, x, d, 0}, s.begin, s.end});
      continue;
    }
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
    if (s.dense_kernel) {
      // Written back over the whole width, zeros included, from the last entry to the first.
      float* full = value_[i].data();
      int64_t from = count - 1;
      for (int64_t j = d - 1; j >= 0; --j) {
        const bool kept = from >= 0 && index_[i][static_cast<size_t>(from)] == j;
        full[j] = kept ? x[j] : 0.0f;
        from -= kept;
      }
      parts_.push_back({{nullptr, full, d, 0}, s.begin, s.end});
    } else if (count > 0) {
      parts_.push_back({{index_[i].data(), value_[i].data(), count, 0}, s.begin, s.end});
    }
  }
}

double Selection::weights() const {
  double total = 0;
  for (const Part& p : parts_) {
    total += static_cast<double>(p.rows.count) * static_cast<double>(p.end - p.begin);
  }
  return total;
}

}  // namespace acttail
